"""The command of the comparison: rows that it reads and writes, runs that it makes, and what it refuses."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest

from studies.results import append_rows, read_rows
from studies.testbed import cells, command, plan, training
from trl_vpo.errors import UserError
from trl_vpo.training.run import parse

CELL = "cell --method dpo --rate 1e-3 --steps 60 --seed 0"


def row(method="dpo", seed=0, **numbers):
    numbers = {"samples": {"kl": [0.5, 0.25]}} | numbers
    key = dict(zip(plan.KEYS, (method, "near", 1e-3, 60, seed)))
    about = {"base": cells.digest("clip"), "arithmetic": "portable"}
    return key | {"false_mass": 0.2, "samples": {}} | about | numbers


@pytest.fixture
def stored(tmp_path):
    """Writes rows, and gives the words that name their file."""
    path = tmp_path / "results.jsonl"

    def write(*rows):
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
        return ["--results", str(path)]

    return write


def test_a_line_that_was_cut_off_is_said_and_made_again(tmp_path, capsys):
    path = tmp_path / "new" / "results.jsonl"
    append_rows(path, [row(said="\u2028\x85"), row(seed=1)])  # no ends of lines
    path.write_bytes(path.read_bytes()[:-9])
    append_rows(path, [row(seed=2)])
    assert [one["seed"] for one in read_rows(path)] == [0, 2]
    assert "results.jsonl, line 2: cut off" in capsys.readouterr().err
    with path.open("a") as file:
        file.writelines(f"{line}\n" for line in ("null", "[1]", "5", '"x"', "{}", json.dumps(row(["dpo"]))))
    assert [one["seed"] for one in read_rows(path)] == [0, 2]
    assert re.findall(r"line (\d+): cut off, or no row", capsys.readouterr().err) == ["2", *"456789"]
    append_rows(path, [row(false_mass=0.1)])  # its run was made again, with all of its cells
    assert [(one["seed"], one["false_mass"]) for one in read_rows(path)] == [(0, 0.1), (2, 0.2)]


def test_rows_that_cannot_be_written_end_the_run_with_a_message(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"file/results.jsonl cannot be written \(.*the same command then continues"):
        append_rows(tmp_path / "file" / "results.jsonl", [row()])


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (row(seed=1, base="0123"), "pairs near, rate 0.001, steps 60, seed 1: of the base 0123, and the present"),
        (row("orpo"), "method orpo, .*: not of the plan, method 'orpo'"),
        (row() | {"rate": "0.001"}, "not of the plan, rate '0.001'"),
        (row() | {"rate": float("nan"), "pairs": "far"}, "not of the plan, pairs 'far', rate nan"),
        (row(seed=0.5), "not of the plan, seed 0.5"),
        (row("lpoi_3"), "not of the plan, which has these values in other cells"),
        (row(seed=1, samples=None), "seed 1: no samples/kl"),
        (row(seed=1, samples={}), "samples/kl is None, which no run writes"),
        (row(seed=1, samples={"kl": [0.5]}), r"samples/kl is \[0.5\], which no run writes"),
        (row(seed=1, samples={"kl": [0.5, None]}), r"samples/kl is \[0.5, None\], which no run writes"),
        (row(seed=1, samples={"kl": "ab"}), "samples/kl is 'ab', which no run writes"),
        (row(seed=1, false_mass="0.2"), "false_mass is '0.2', which no run writes"),
        (row(seed=1, false_mass=True), "false_mass is True, which no run writes"),
        (row(seed=1, false_mass=float("nan")), "false_mass is nan, which no run writes"),
        ({key: value for key, value in row(seed=1).items() if key != "false_mass"}, "seed 1: no false_mass"),
        ({key: value for key, value in row(seed=1).items() if key != "pairs"}, "pairs None, .*: no pairs"),
    ],
)
@pytest.mark.parametrize("words", [["tables"], ["run", "--quick"], CELL])
def test_rows_of_something_else_are_not_mixed_in(words, wrong, why, stored, monkeypatch):
    monkeypatch.setattr(command, "_cells", None)  # said before anything is made
    words = words.split() if isinstance(words, str) else words
    with pytest.raises(SystemExit, match=f"1 of 2 rows cannot be used:\n  - .*{why}"):
        command.main([*stored(row(), wrong), *words])


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("cell --method lpoi_3 --rate 1e-3 --steps 60 --seed 0", "lpoi_3 is not run on near pairs, but on scenes."),
        ("cell --method dpo --pairs made --rate 1e-3 --steps 60 --seed 0", "dpo is not run on made pairs, but on"),
        ("cell --method base --rate 0 --steps 60 --seed 0", "60 steps: the base has 0."),
        ("cell --method dpo --rate 1e-3 --steps 0 --seed 0", "0 steps: give 1 or more."),
        (CELL.replace("1e-3", "-1"), "rate -1: give a number above 0."),
        (CELL.replace("1e-3", "nan"), "rate nan: give a number above 0."),
        (CELL.replace("1e-3", "inf"), "rate inf: give a number above 0."),
        (CELL.replace("seed 0", "seed -1"), "seed -1: give a whole number from 0 to 2147483647."),
        (f"{CELL} --out {__file__}/deep", f"{__file__} is a file. Name a folder"),
        (f"tables --results {os.path.dirname(__file__)}", "studies: a folder. Name the file of the rows"),
        ("run --workers 0", "--workers 0: give 1 or more."),
        ("run --quick --full", "not allowed with argument"),
    ],
)
def test_what_does_not_go_together_is_refused(words, why, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(words.split())
    assert end.value.code == 2 and why in capsys.readouterr().err


def test_without_rows_there_is_no_report(tmp_path):
    """The path stands before the command or behind it."""
    place = ["--results", str(tmp_path / "none.jsonl")]
    for words in ([*place, "tables"], ["tables", *place]):
        with pytest.raises(SystemExit, match=r"none\.jsonl has no rows"):
            command.main(words)


def test_a_cell_that_differs_from_its_row_is_an_error(stored, monkeypatch):
    words = [*stored(row()), *CELL.split()]
    for false_mass, wrong in ((0.2005, ""), (0.22, r"0\.22, 0\.2"), (float("nan"), "nan")):
        monkeypatch.setattr(command, "_cells", lambda run, out, f=false_mass: [row(false_mass=f)])
        if wrong:
            with pytest.raises(SystemExit, match=rf"false_mass.*{wrong}.*\n.*rounding alone"):
                command.main(words)
        else:
            command.main(words)


def test_a_run_that_fails_says_why(tmp_path, monkeypatch, capsys):
    """With a traceback only where the message may not say it all."""
    for error, traced in ((UserError("no pairs"), False), (OSError("disk full"), False), (KeyError("kl"), True)):
        monkeypatch.setattr(cells, "run_cells", Mock(side_effect=error))
        reason = command._cells(plan.quick_runs()[1], tmp_path)
        assert reason == f"dpo on near pairs at 0.003, seed 0: {error}"
        assert ("Traceback" in capsys.readouterr().err) == traced


def test_directions_that_do_not_hold_are_an_error(capsys):
    held = {
        "dpo": (-9, 1.0, 9, 0.2),
        "simpo": (-9, 1.0, 9, 0.2),
        "leanpo": (0.1, 0.3, 3, 0.1),
        "rrpo": (0.2, 0.2, 2, 0.1),
    }
    held["base"] = (0, 0, 0, 0.4)
    names = ("chosen_change_right", "fell_right", "kl", "false_mass")
    rows = [
        dict(zip(names, values)) | {"method": method, "accuracy": 0.7 if method == "base" else 1.0}
        for method, values in held.items()
    ]
    command.check_directions(rows)
    assert "kl: 2.000 (rrpo) < 9.000 (dpo)" in capsys.readouterr().out
    rows[0]["chosen_change_right"] = 0.2
    rows[3]["false_mass"] = float("nan")  # is not less either
    with pytest.raises(SystemExit, match="2 of 12 directions do not hold"):
        command.check_directions(rows)


def test_a_cell_leaves_the_folder_of_the_run_alone(tmp_path, monkeypatch):
    """It may be in training, by another command with the same --out."""
    used = []

    def trained(run, data, folder, out):
        used.append(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(cells, "train", trained)
    monkeypatch.setattr(cells, "training_data", lambda run, out: (tmp_path, {}))
    for steps in (plan.STEPS, plan.STEPS[-1:]):
        with pytest.raises(KeyboardInterrupt):
            cells.run_cells(plan.Run("dpo", "near", 1e-3, 0, steps), tmp_path)
    assert len(set(used)) == 2


class Executor:
    """Runs in this process, in place of `ProcessPoolExecutor`."""

    def __init__(self, workers, context, initializer):
        assert workers in (1, 2)  # no more than there are runs

    __enter__, __exit__ = lambda self: self, lambda *_: None

    def submit(self, work, *words):
        return lambda: work(*words)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(command, "ProcessPoolExecutor", Executor)
    monkeypatch.setattr(command, "as_completed", lambda asked: (Done(work()) for work in asked))


class Done:
    def __init__(self, rows):
        self.result = lambda: rows


def test_runs_are_continued_and_each_row_is_written_once(tmp_path, monkeypatch, here):
    path, made = tmp_path / "results.jsonl", []
    runs = plan.quick_runs()

    def cells_of(run, out):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(run)
        return rows_of(run)

    monkeypatch.setattr(command, "_cells", cells_of)
    with pytest.raises(KeyboardInterrupt):
        command.make_rows(runs, path, tmp_path, 2)
    assert len(read_rows(path)) == 2
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        command.make_rows(runs, path, tmp_path, 2)
    assert made == runs[2:4] and len(read_rows(path)) == 4
    monkeypatch.setattr(command, "_cells", lambda run, out: f"{run.method}: no pairs")
    with pytest.raises(SystemExit, match=rf"1 runs failed:\n{runs[4].method}: no pairs"):
        command.make_rows(runs, path, tmp_path, 2)
    assert len(read_rows(path)) == 4


def rows_of(run, **numbers):
    return [dict(zip(plan.KEYS, cell)) | {"base": cells.digest(run.kind)} | numbers for cell in run.cells()]


def test_a_finished_quick_study_is_made_anew(tmp_path, monkeypatch, here):
    """Its rows may be of the code before a change."""
    path, runs = tmp_path / "results.jsonl", plan.quick_runs()
    append_rows(path, [row | {"kl": 1.0} for run in runs for row in rows_of(run)])
    monkeypatch.setattr(command, "_cells", lambda run, out: rows_of(run, kl=2.0))
    command.make_rows(runs, path, tmp_path, 2)
    assert {row["kl"] for row in read_rows(path)} == {1.0}
    command.make_rows(runs, path, tmp_path, 2, anew=True)
    assert [row["kl"] for row in read_rows(path)] == [2.0] * len(runs)


def killed(run, out):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_ends_the_study_with_a_message(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_cells", killed)
    monkeypatch.setattr(command, "get_context", lambda kind: multiprocessing.get_context("fork"))
    with pytest.raises(SystemExit, match="A worker was killed"):
        command.make_rows(plan.quick_runs(), tmp_path / "results.jsonl", tmp_path, 2)


def interrupted(run, out):
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(600)


def test_ctrl_c_ends_the_workers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "_cells", interrupted)
    monkeypatch.setattr(command, "get_context", lambda kind: multiprocessing.get_context("fork"))
    with pytest.raises(SystemExit) as end:
        command.main(["--results", str(tmp_path / "results.jsonl"), "run", "--workers", "1"])
    assert end.value.code == 130 and "The same command continues." in capsys.readouterr().err
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("env", "found"), [(command.PORTABLE, "portable"), ({}, "native")])
def test_rows_say_how_their_sums_are_rounded(env, found):
    code = "from studies.testbed.cells import arithmetic; print(arithmetic())"
    env = {name: value for name, value in os.environ.items() if name not in command.PORTABLE} | env
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout == f"{found}\n"


def test_rows_of_unknown_rounding_are_made_again():
    run = plan.Run("dpo", "near", 1e-3, 0, (60,))
    assert plan.missing([run], [row()]) == []
    assert plan.missing([run], [row(arithmetic="unknown")]) == [run]


RUNS = {run.method: run for run in plan.full_runs() if run.rate}  # one of each method


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_every_method_has_options_that_are_valid(run, tmp_path):
    method, options = plan.ALL[run.method], training.options_of(run, tmp_path / "rows.jsonl", tmp_path, tmp_path)
    args = parse(method.recipe, training.as_words(options))[1]
    assert args.learning_rate == run.rate and args.max_steps == 240
    assert {name: getattr(args, name) for name in method.options} == dict(method.options)
