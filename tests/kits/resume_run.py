"""Runs of `run_training` that can be killed at any moment, started by resume_runs.py: importing TRL once is enough.

It reads one job a line from standard input, forks its processes, and says how they ended:
    {"method": "rrpo", "argv": [...], "log": FILE, "processes": 1, "rank": 0, "kill": null,
     "file_limit": null}  ->  {"codes": [0]}
`kill` is how the run ends:
    ["seconds", 0.7]         SIGKILL after so long
    ["file", PATH]           SIGKILL as soon as this file is there
    ["SIGKILL", 12, "checkpoint-4"]  before the 12th change that Python code makes to this folder; "": to any of them
    ["SIGTERM", 12, ""]      the same; SIGINT is Ctrl-C
With several processes, the one with number `rank` counts, and all are killed when one was. `file_limit`: bytes that a
file may have.
"""

import contextlib
import gc
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

ROOT = Path(__file__).parents[2]
BASE = ROOT / "trl_vpo" / "testbed" / "base"
RECIPE = {
    "use_peft": True,
    "lora_r": 2,
    "lora_dropout": 0.1,
    "lora_target_modules": r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)",
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "max_steps": 8,
    "logging_steps": 3,
    "save_steps": 2,
    "num_frames": 2,
    "report_to": "none",
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 3,
    "resume_from_checkpoint": True,
}
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


def import_everything():
    """What a run imports, once for all of them."""
    import torch
    import transformers.models.llava_onevision.modeling_llava_onevision
    import trl.kernels.chunked_divergence
    import trl.scripts.utils

    from trl_vpo.training.methods import METHODS, method_classes

    with contextlib.suppress(ImportError):
        import deepspeed  # noqa: F401 - accelerate looks for it and imports it
    for method in METHODS:
        method_classes(method)
    assert transformers and trl
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # every process would look through all of it again


def watch_changes(act, output_dir, folder):
    """Call `act(n)` before the n-th change to a folder of a run, or to any `checkpoint-N`."""
    count, prefix = 0, str(Path(output_dir) / (folder or "checkpoint-"))

    def hook(event, args):
        nonlocal count
        if event == "open":
            path, _, flags = args
            changes = isinstance(path, str) and bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
        else:
            changes = event in CHANGES
        if changes and str(args[0]).startswith(prefix):
            count += 1
            act(count)

    sys.addaudithook(hook)


def record_order(log):
    """Write which rows each step is computed on."""
    from trl_vpo.trainers.base import VisualPreferenceTrainer

    compute_loss = VisualPreferenceTrainer.compute_loss

    def recorded(self, model, inputs, **kwargs):
        if self.model.training:
            entry = {"rank": self.args.process_index, "step": self.state.global_step, "names": inputs["names"]}
            with open(log, "a") as file:
                file.write(json.dumps(entry) + "\n")
        return compute_loss(self, model, inputs, **kwargs)

    VisualPreferenceTrainer.compute_loss = recorded


def child(job, rank, port):
    """One process of a run; never returns."""
    from trl_vpo.training.run import run_training

    code = 1
    try:
        output = os.open(f"{job['log']}.{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if job["processes"] > 1:
            size = str(job["processes"])
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        record_order(job["log"])
        kind, *at = job["kill"] or [""]
        options = job["argv"]
        if kind.startswith("SIG") and rank == job["rank"]:
            number, (when, folder) = getattr(signal, kind), at
            output_dir = options[options.index("--output_dir") + 1]
            watch_changes(lambda n: os.kill(os.getpid(), number) if n == when else None, output_dir, folder)
        if job["file_limit"]:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"],) * 2)
        run_training(job["method"], options)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(job):
    """Start, perhaps kill, and wait."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    pids = {}
    for rank in range(job["processes"]):
        pid = os.fork()
        if pid == 0:
            child(job, rank, port)
        pids[pid] = rank
    kind, at, *_ = job["kill"] or ("", 0)
    codes = [None] * len(pids)
    deadline = started + (at if kind == "seconds" else 120)
    file = at if kind == "file" else None
    while None in codes:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pids[pid]] = os.waitstatus_to_exitcode(status)
            failed = codes[pids[pid]] not in (0, 128 + signal.SIGTERM)
        if time.monotonic() > deadline or (pid and failed) or (file and os.path.exists(file)):
            for other, rank in pids.items():
                if codes[rank] is None:
                    os.kill(other, signal.SIGKILL)
        time.sleep(0.0005)
    return {"codes": codes}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")  # imports print, too
    os.dup2(2, 1)
    import_everything()
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)
