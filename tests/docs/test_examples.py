"""The examples run, on the small world: complete, but for the number of steps."""

import json
import os
import runpy
import subprocess
import sys

import pytest
from pages import ROOT

from trl_vpo import cli

EXAMPLES = ROOT / "examples"


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Run a script's `main` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name, *args):
        return runpy.run_path(str(EXAMPLES / name))["main"](*args)

    return run


def test_train_leanpo_trains_and_measures(example, tmp_path, capsys):
    trainer = example("train_leanpo.py", ["--small_world", "--max_steps", "2", "--output_dir", "out"])
    assert trainer.state.global_step == 2
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    assert "preference/accuracy: " in capsys.readouterr().out


def test_train_leanpo_needs_data(example, capsys):
    with pytest.raises(SystemExit):
        example("train_leanpo.py", [])
    assert "give a file of rows, or --small_world" in capsys.readouterr().err


def test_custom_loss_is_what_it_says(example):
    trainer = example("custom_loss.py", "out", 2)
    first = trainer.state.log_history[0]
    assert first["loss/without_offset"] == pytest.approx(0.6931, abs=1e-4)  # the policy still is its reference
    assert first["loss"] == pytest.approx(0.9741, abs=1e-4)  # log(1 + e^0.5)


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "first_steps.ipynb").read_text(encoding="utf-8"))
    assert all(cell["cell_type"] == "markdown" or not cell["outputs"] for cell in notebook["cells"])
    scope = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), scope)
    assert scope["trainer"].state.global_step == 4
    assert scope["after"]["reward/margin"] > 0
    assert (tmp_path / "outputs/first-steps/leanpo/adapter_model.safetensors").is_file()


def write_script(path, line):
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def test_self_training_goes_from_questions_to_results(tmp_path, monkeypatch):
    """Bash runs the script with a `trl-vpo` that notes its arguments; then these calls are made in this process."""
    tools, calls = tmp_path / "bin", tmp_path / "calls"
    tools.mkdir()
    write_script(tools / "trl-vpo", f'(for word; do echo "$word"; done; echo) >> {calls}')
    write_script(tools / "python", f'exec {sys.executable} "$@"')
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "COUNT": "6", "PYTHONPATH": str(ROOT)}
    script = str(EXAMPLES / "self_training.sh")
    subprocess.run(["bash", script, "out"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    commands = [call.split("\n") for call in calls.read_text().strip().split("\n\n")]
    assert [words[0] for words in commands] == ["generate", "view", "train", "evaluate", "plot"]

    monkeypatch.chdir(tmp_path)
    for words in commands:
        assert cli.main(words + ["--max_steps", "2", "--logging_steps", "1"] * (words[0] == "train")) == 0
    results = json.loads((tmp_path / "out/evaluation/results.json").read_text())
    assert "preference/accuracy" in json.dumps(results)
    assert (tmp_path / "out/made.html").is_file() and (tmp_path / "out/curves.html").is_file()
