"""Refusals, dry runs and printed lines of `trl-vpo generate`, with real runs on the testbed's base."""

import math
import re
import shutil

import pytest
import torch
from run_kit import KINDS, generate, lines, write_inputs, written

from trl_vpo import cli
from trl_vpo.errors import GenerateError, ModelError, RecipeError, RunError, UserError
from trl_vpo.generate.leanpo import HINT_PROMPT, LeanPOGenerateConfig
from trl_vpo.generate.lpoi import LPOIGenerateConfig
from trl_vpo.generate.rrpo import RRPOGenerateConfig
from trl_vpo.generate.run import run_generation
from trl_vpo.testbed.rows import write_jsonl
from trl_vpo.testbed.tiny_vlm import BASE

COUNT = 12


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Twelve questions about four clips, and twelve pairs about scenes: kind -> file."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


# --- refusals -----------------------------------------------------------------------------------------------------


def test_changed_settings_are_refused_before_loading(inputs, tmp_path):
    folder, dataset = tmp_path / "run", tmp_path / "in.jsonl"
    shutil.copy(inputs["clip"], dataset)
    generate("rrpo", dataset, folder, "--limit", 1)
    before = written(folder)
    bare = ["--model_name_or_path", tmp_path / "weightless"]
    for options, names in (
        (["--temperature", 0.5, *bare], ["temperature: was 1.0, is 0.5", 'model_name_or_path: was "']),
        (["--num_frames", 4], ["num_frames: was 8, is 4"]),
        (["--seed", 3, "--attempts", 2], ["attempts: was 1, is 2", "seed: was 0, is 3"]),
    ):
        with pytest.raises(RunError, match="Name another output_dir") as error:
            generate("rrpo", dataset, folder, *options)
        assert all(f"\n  {name}" in str(error.value) for name in names)
    write_jsonl([*lines(inputs["clip"]), {"id": "more"}], dataset)
    with pytest.raises(RunError, match=r"inputs\.count: was 12, is 13\n"):
        generate("rrpo", dataset, folder)
    with pytest.raises(RunError, match=r'pipeline: was "rrpo", is "leanpo"'):
        generate("leanpo", inputs["clip"], folder)
    assert written(folder) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--dataset_name", ""], RecipeError, "`dataset_name` is not set: give the inputs"),
        (["--output_dir", ""], RecipeError, "`output_dir` is not set: give a folder"),
        (["--model_name_or_path", ""], RecipeError, "there is no model: set `model_name_or_path`"),
        (["--model_name_or_path", "/none"], ModelError, "/none cannot be loaded"),
        (["--dataset_name", "none.jsonl"], ValueError, r"none\.jsonl does not exist \(seen from"),
        (["--dataset_split", "test"], ValueError, r"clip\.jsonl has no split 'test'; it has train"),
        (["--temprature", "1"], RecipeError, "unknown option --temprature. Did you mean --temperature"),
        (["--perturbation", "mask+locl"], RecipeError, r"'mask\+locl' is not one of .* Did you mean mask\+local"),
        (["--server_media", "mp4"], RecipeError, "server_media: 'mp4' is not one of video, frames"),
        (["--batch_size", "0"], ValueError, "batch_size is 0"),
        (["--max_requests", "0"], ValueError, "max_requests is 0: give at least 1"),
        (["--timeout", "0"], ValueError, "timeout is 0.0: give a number above 0"),
        (["--from_adapter", "/none"], ModelError, "from_adapter: the folder /none does not exist"),
        (["--device", "cuda"], ModelError, "device is 'cuda', but"),
    ],
)
def test_what_a_run_cannot_start_with(options, error, message, inputs, tmp_path):
    if options[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(error, match=message):
        generate("rrpo", inputs["clip"], tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_what_loading_raises_is_shown_in_one_line(inputs, tmp_path, monkeypatch):
    def load(**options):
        raise ValueError("environment variable MASTER_ADDR expected, but not set")

    monkeypatch.setattr("trl_vpo.generate.run.load_model", load)
    with pytest.raises(UserError, match="MASTER_ADDR expected"):
        generate("rrpo", inputs["clip"], tmp_path / "run")


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (LeanPOGenerateConfig, {"hint_prompt": "{question} {answer} {other}"}, r"unknown placeholders \['other'\]"),
        (LeanPOGenerateConfig, {"reflection_prompt": HINT_PROMPT}, r"missing placeholders \['first_answer'\]"),
        (LeanPOGenerateConfig, {"num_damaged_frames": 0}, "num_damaged_frames is 0"),
        (LeanPOGenerateConfig, {"flip_probability": 1.5}, "flip_probability is 1.5"),
        (LeanPOGenerateConfig, {"min_trust": 1.1}, "min_trust is 1.1: give a number from 0 to 1"),
        (LeanPOGenerateConfig, {"min_trust_margin": -2}, "min_trust_margin is -2: give a number from -1 to 1"),
        (LeanPOGenerateConfig, {"min_margin": math.nan}, "min_margin is nan: give a finite number"),
        (LeanPOGenerateConfig, {"keep_top": 0}, "keep_top is 0: give a number above 0 and up to 1"),
        (LeanPOGenerateConfig, {"temperature": -1}, "temperature is -1"),  # the shared settings are still checked
        (RRPOGenerateConfig, {"attempts": 0}, "attempts is 0"),
        (RRPOGenerateConfig, {"open_check": "rules"}, "open_check is 'rules'"),
        (RRPOGenerateConfig, {"max_changed": 0.0}, "max_changed is 0.0"),
        (RRPOGenerateConfig, {"judge_temperature": -1.0}, "judge_temperature is -1.0"),
        (RRPOGenerateConfig, {"rewrite_prompt": "{question} {truth}"}, r"rewrite_prompt: .*missing .*'answer', 'diff"),
        (LPOIGenerateConfig, {"instances": "all"}, "instances"),
        (LPOIGenerateConfig, {"num_images": 1}, "num_images"),
        (LPOIGenerateConfig, {"min_box_area": 0.9, "max_box_area": 0.5}, "min_box_area"),
        (LPOIGenerateConfig, {"max_box_area": 1.5}, "max_box_area"),
        (LPOIGenerateConfig, {"box_threshold": 1.0}, "box_threshold"),
        (LPOIGenerateConfig, {"presence_question": "Is it there?"}, "presence_question"),
    ],
)
def test_settings_that_cannot_be_used(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_unknown_keys_and_methods(tmp_path):
    (tmp_path / "r.yaml").write_text("batchsize: 4\nhint_promt: x\n")
    hints = r"`batchsize`\. Did you mean batch_size.* `hint_promt`\. Did you mean hint_pr"
    with pytest.raises(RecipeError, match=hints):
        run_generation("leanpo", ["--config", str(tmp_path / "r.yaml")])
    with pytest.raises(RecipeError, match=r"unknown method 'leanp'; one of .* Did you mean leanpo"):
        run_generation("leanp", [])


def test_output_dirs_of_something_else(inputs, tmp_path):
    (tmp_path / "file").touch()
    for dry in ([], ["--dry_run"]):
        with pytest.raises(RecipeError, match=r"output_dir: .*file is a file\. Name a folder"):
            generate("rrpo", inputs["clip"], tmp_path / "file", *dry)
    (tmp_path / "rows.jsonl").write_text('{"precious": true}\n')
    with pytest.raises(RunError, match=r"holds rows\.jsonl but no settings\.json: it is not a run"):
        generate("rrpo", inputs["clip"], tmp_path)
    assert (tmp_path / "rows.jsonl").read_text() == '{"precious": true}\n'


# --- dry runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["leanpo", "rrpo", "lpoi"])
def test_a_dry_run(method, inputs, tmp_path, capsys):
    """Without weights: a copy of the base that has none. A real run can follow in the same folder."""
    shutil.copytree(BASE, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    folder, bare = tmp_path / "run", ["--model_name_or_path", tmp_path / "base"]
    assert generate(method, inputs[KINDS[method]], folder, *bare, "--dry-run") is None
    out = capsys.readouterr().out
    ids = [row["id"] for row in lines(inputs[KINDS[method]])]
    assert [name in out for name in ids] == [True] * 3 + [False] * (COUNT - 3)
    assert "<|im_start|>user" in out and "<|im_start|>assistant" in out  # the model's own template
    assert f"The pictures are in {folder}/dry_run." in out
    names = {path.name for path in (folder / "dry_run").iterdir()}
    assert {path.name for path in folder.iterdir()} == {"dry_run"}
    if method == "leanpo":
        assert "You said: <the first answer>" in out
        assert names == {f"{n}-{step}-0.png" for n in range(3) for step in range(4)}
    if method == "lpoi":
        assert "Is there a " in out and names == {f"{n}-0-{k}.png" for n in range(3) for k in range(5)}
    with pytest.raises(ModelError, match="cannot be loaded"):
        generate(method, inputs[KINDS[method]], folder, *bare)
    assert generate(method, inputs[KINDS[method]], folder, "--limit", 1)["inputs"] == 1


def test_a_dry_run_says_what_would_fail(inputs, tmp_path, capsys, monkeypatch):
    rows = [{**row, "answer": ""} for row in lines(inputs["clip"])[:1]] + lines(inputs["clip"])[1:2]
    dataset = write_jsonl(rows, tmp_path / "in.jsonl")
    generate("rrpo", dataset, tmp_path / "run", "--dry_run")
    out = capsys.readouterr().out
    assert "rejected: `answer` is ''" in out and "short question on perturbed media" in out
    with pytest.raises(GenerateError, match="the processor of /none cannot be loaded"):
        generate("rrpo", dataset, tmp_path / "run", "--dry_run", "--model_name_or_path", "/none")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    generate("rrpo", dataset, tmp_path / "run", "--dry_run")
    assert capsys.readouterr().out == ""


# --- what is printed ----------------------------------------------------------------------------------------------


def test_the_log_of_a_run(inputs, tmp_path, capfd):
    """Nobody else's bars or warnings, every line of the run's own."""
    generate("rrpo", inputs["clip"], tmp_path / "run", "--limit", 3)
    printed = capfd.readouterr()
    first, *_, last = filter(str.strip, printed.err.splitlines())
    assert first == f"Loading {BASE} ..."
    kept = len(lines(tmp_path / "run/rows.jsonl"))
    assert re.match(rf"3/3 inputs \[.*input/?s?, kept={kept}, rejected={3 - kept}\]", last)
    assert f"{kept} rows to train on: {tmp_path / 'run'}/rows.jsonl" in printed.out
    assert f"trl-vpo view {tmp_path / 'run'} -o page.html" in printed.out
    generate("rrpo", inputs["clip"], tmp_path / "run", "--limit", 3)
    assert capfd.readouterr().err.splitlines()[1:] == ["3 inputs: all finished before."]


def test_when_nothing_is_kept(inputs, tmp_path, capsys):
    dataset = write_jsonl([{**row, "video": "gone.mp4"} for row in lines(inputs["clip"])[:2]], tmp_path / "in.jsonl")
    argv = ["generate", "rrpo", "--dataset_name", dataset, "--output_dir", tmp_path / "run", "--device", "cpu"]
    assert cli.main([*map(str, argv), "--model_name_or_path", str(BASE)]) == 1
    captured = capsys.readouterr()
    assert "none of the 2 inputs gave a row (unreadable media: 2)" in captured.err
    out = captured.out
    assert "No input gave a row" in out and "rows to train on" not in out and "rejected.jsonl" in out
