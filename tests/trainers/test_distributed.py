"""Several processes: the same step as one process, whatever the engine; one rank's error ends all of them.

DDP runs in `make test`; ZeRO-2, ZeRO-3 and FSDP2 in `make test-slow`. All on two CPU processes, over gloo.
"""

import functools
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import distributed_run
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from adapter_kit import recipe_of
from helpers import KITS

from trl_vpo.trainers.compat import record_error

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
WRAPPERS = dict.fromkeys(("zero2", "zero3"), "DeepSpeedEngine")
WRAPPERS |= {"ddp": "DistributedDataParallel", "fsdp2": "FSDPPeftModel"}
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_HOME": "/nonexistent", "PATH": "/usr/bin:/bin"}


def torchrun(*args, timeout=550, processes=2):
    """Processes of distributed_run.py, and when they had ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--master_port", port]
    script = KITS / "distributed_run.py"
    done = subprocess.run([*command, str(script), *args], capture_output=True, text=True, env=ENV, timeout=timeout)
    return done, time.time()


@functools.cache
def alone(case):
    """The results of one process, with as many rows a step."""
    return distributed_run.run_case(**(distributed_run.CASES | distributed_run.SLOW)[case])


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """(results by case, process, seconds from rank 1's error to the end of all processes)"""
    out = tmp_path_factory.mktemp("ddp") / "out.pt"
    done, ended = torchrun("ddp", str(out), *distributed_run.CASES, "bad row")
    assert out.exists(), done.stderr[-3000:]
    return torch.load(out), done, ended - float(out.with_suffix(".failed").read_text())


def assert_same_step(got, want):
    """Every logged metric, every gradient, and the adapter that is saved after the step."""
    assert set(got["logged"]) == set(want["logged"]) >= {"loss", "grad_norm", "num_tokens", "rewards/margins"}
    assert set(got["eval"]) == set(want["eval"]) >= {"eval_loss", "eval_rewards/accuracies", "eval_entropy"}
    # Some are differences of log-probs of a hundred nats: they are as exact as float32 makes those.
    room = max(1e-5, 1e-6 * abs(want["logged"]["logps/rejected"]))
    for part in ("logged", "eval", "measures"):
        for key, value in want[part].items():
            assert got[part][key] == pytest.approx(value, rel=1e-5, abs=room), key
    assert_close({name.removeprefix("module."): grad for name, grad in got["grads"].items()}, want["grads"])
    assert_close(got["saved"], want["saved"])


def assert_close(got, want):
    """Tensors by name, relative to the norm of all of them."""
    assert set(got) == set(want)
    flat = [torch.cat([tensors[name].flatten().float() for name in sorted(want)]) for tensors in (got, want)]
    assert flat[1].norm() > 0.1
    assert (flat[0] - flat[1]).norm() <= 1e-5 * flat[1].norm()


@pytest.mark.distributed
@pytest.mark.parametrize("case", distributed_run.CASES)
def test_two_processes_do_the_step_of_one(case, ddp):
    """The metrics and gradients of two ranks that accumulate two micro-batches, under DDP, are those of one process
    that accumulates four. The cases mix text and images so that a rank has only one kind, and clips of unlike length
    so that a rank needs two model calls."""
    got, want = ddp[0][case], alone(case)
    assert got["wrapper"] == WRAPPERS["ddp"]
    layout = distributed_run.CASES[case].get("layout", "shared")  # "auto" proves the shared one
    assert got["layout"] == want["layout"] == layout
    assert_same_step(got, want)
    assert all(f"rank {rank} of 2: ddp, {case}\n" in ddp[1].stdout for rank in (0, 1))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_sharded_engines_do_the_step_of_one(engine, tmp_path):
    done, _ = torchrun(engine, str(tmp_path / "out.pt"), timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    for case, got in torch.load(tmp_path / "out.pt").items():
        assert got["wrapper"] == WRAPPERS[engine]
        assert_same_step(got, alone(case))
    assert all(f"rank {rank} of 2: {engine}, {case}\n" in done.stdout for rank in (0, 1))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
def test_slow_cases_do_the_step_of_one(processes, tmp_path):
    """The other methods. Two processes share each row, for every family; of four, two and two do, or all four."""
    cases = [case for case in distributed_run.SLOW if case.endswith("of 4") == (processes == 4)]
    done, _ = torchrun("ddp", str(tmp_path / "out.pt"), *cases, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    for case, got in torch.load(tmp_path / "out.pt").items():
        assert_same_step(got, alone(case))


def test_the_cases_can_tell():
    """The comparison would notice: the cases differ from each other, and the vision tower has gradients of its own."""
    with pytest.raises(AssertionError):
        assert_same_step(alone("dpo-shared"), alone("seven rows"))
    grads = alone("vision trained")["grads"]
    assert torch.cat([grads[name].flatten() for name in grads if "visual" in name]).norm() > 1e-2


@pytest.mark.distributed
def test_an_error_of_one_rank_stops_all_of_them(ddp):
    """Rank 1 meets a bad row while rank 0 waits for it: no timeout is waited for, and the row is named, at the end of
    the output, too."""
    _, done, seconds = ddp
    assert done.returncode != 0
    assert seconds < 60
    problem = r"RowError: row 6 \(id 'row6'\): \S+gone1.png does not exist"
    assert re.search(rf"\[rank1\]: .*{problem}", done.stderr)
    cause = done.stderr.split("Root Cause")[1]
    assert re.search(r"rank +: 1 ", cause) and re.search(problem, cause)


def test_the_launcher_never_reads_half_an_error(tmp_path, monkeypatch):
    path, dump = tmp_path / "error.json", json.dump

    def write(*args):
        assert not path.exists()
        dump(*args)

    @record_error
    def fail():
        raise ValueError("row 6")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    monkeypatch.setattr("json.dump", write)
    with pytest.raises(ValueError, match="row 6"):
        fail()
    assert json.loads(path.read_text())["message"]["message"] == "ValueError: row 6"
    assert os.environ["TORCHELASTIC_ERROR_FILE"] == str(path) and list(tmp_path.iterdir()) == [path]


def test_there_is_a_config_for_everything_that_is_promised():
    names = {path.stem for path in CONFIGS}
    assert names == {"single_gpu", "ddp", "zero2", "zero3", "zero3_offload", "fsdp2", "sp2", "multi_node", "cpu2"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_the_config(path):
    """By its own loader and its launcher's checks. Inside of the engines' sections it does not look at names."""
    load_config_from_file(str(path))  # refuses unknown keys
    sections = {k: v for k, v in yaml.safe_load(path.read_text()).items() if isinstance(v, dict)}
    options = vars(launch_command_parser().parse_args(["script.py"]))
    assert all(key in options for section in sections.values() for key in section)
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "script.py"]))
    assert not args.cpu  # it would start one process, whatever num_processes says
    engine = [args.multi_gpu, args.use_deepspeed, args.use_fsdp]
    ddp = path.stem in ("ddp", "sp2", "multi_node", "cpu2")
    assert engine == [ddp, path.stem.startswith("zero"), path.stem == "fsdp2"]
    for section in sections.values():
        for key, value in section.items():
            assert str(getattr(args, key)).lower() == str(value).lower(), key
    header = path.read_text().split("compute_environment")[0]
    assert f"trl-vpo recipes copy accelerate/{path.stem}" in header and f"--config_file {path.name}" in header


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("config", "unit"),
    [("cpu2", "2 processes"), pytest.param("sp2", "1 group of 2 processes", marks=pytest.mark.slow)],
)
def test_trl_vpo_train_in_two_processes(config, unit, tmp_path):
    """The config really runs two, and what they print and save comes from one of them."""
    recipe, method = recipe_of(tmp_path / "out", method="leanpo", per_device_train_batch_size=1)
    command = [sys.executable, "-m", "trl_vpo", "train", method, "--config", str(recipe)]
    command += ["--accelerate_config", config, "--num_processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Training completed.") == done.stdout.count("Saved to") == 1
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["processes"], record["steps"]) == (2, 2)
    assert f"per device x 1 accumulated x {unit}\n" in done.stdout
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_qlora_in_two_processes_does_the_step_of_one(engine, tmp_path):
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "out.pt"
    done, _ = torchrun(engine, str(out), *distributed_run.QUANTIZED)
    assert done.returncode == 0, done.stderr[-3000:]
    for case, got in torch.load(out).items():
        want = distributed_run.run_case(**distributed_run.QUANTIZED[case])
        assert got["wrapper"] == WRAPPERS[engine]
        assert all("lora_" in name for name in want["grads"])
        assert_same_step(got, want)
        assert all(f"rank {rank} of 2: {engine}, {case}\n" in done.stdout for rank in (0, 1))
