"""`trl-vpo plot`: runs found in their folders, their names, and the page with final values and settings."""

import base64
import html
import json
import re
import subprocess
import sys
from datetime import datetime
from xml.etree import ElementTree

import pytest
from PIL import Image

from trl_vpo.errors import PlotError, UserError
from trl_vpo.report.plot import page as plot
from trl_vpo.report.plot.runs import read_run, read_runs

HISTORY = [
    {"step": 0, "eval_loss": 0.9, "eval_logps/chosen": -9.0},
    {"step": 5, "epoch": 0.5, "loss": 0.7, "rewards/margins": 0.1, "logps/chosen": -8.0},
    {"step": 10, "epoch": 1.0, "loss": 0.51239, "rewards/margins": 0.6, "logps/chosen": -7.0, "num_tokens": 110080.0},
    {"step": 10, "epoch": 1.0, "eval_loss": 0.6, "eval_logps/chosen": -8.5},
    {"step": 10, "epoch": 1.0, "train_runtime": 3.25, "train_loss": 0.6, "total_flos": 1e9, "logps/chosen": -1.0},
]
RECIPE = {"learning_rate": 1e-6, "beta": 2.0, "output_dir": "out", "seed": 3}
RECORD = {
    "method": "leanpo", "rows": {"trained": 160, "skipped": 2}, "processes": 8, "device": "NVIDIA H100 80GB HBM3",
    "versions": {"trl": "1.16.0"}, "finished": "2026-01-02T03:04:05+00:00",
}  # fmt: skip


def write_state(folder, history=HISTORY, when=None, marker=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    if marker:
        (folder / "complete.json").write_text(json.dumps({"run": marker, "saved": when}))
    return folder


def write_run(folder, history=HISTORY, recipe=None, **record):
    write_state(folder, history)
    (folder / "run.json").write_text(json.dumps(RECORD | {"recipe": RECIPE | (recipe or {})} | record))
    return folder


def tables(page):
    """Heading -> row -> values; the heads of a table are the row None."""
    parts = re.split(r"<h[23]>(.*?)</h[23]>", page.read_text(encoding="utf-8"))[1:]
    result = {}
    for heading, body in zip(parts[::2], parts[1::2]):
        lines = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in re.findall(r"<tr>(.*?)</tr>", body, re.S)]
        rows = [[html.unescape(cell) for cell in line] for line in lines]
        result |= {html.unescape(heading): {name or None: values for name, *values in rows}} if rows else {}
    return result


# --- finding runs -------------------------------------------------------------------------------------------------


def test_an_unfinished_run_is_read_from_its_newest_checkpoint(tmp_path):
    """A copy's times say nothing."""
    marker = {"method": "rrpo", "recipe": {"alpha": 0.1}, "rows": 5}
    write_state(tmp_path / "checkpoint-10", HISTORY[:3], when=2000.5, marker=marker)
    write_state(tmp_path / "checkpoint-9", HISTORY[:2], when=1000.5, marker=marker)
    (run,) = read_runs([tmp_path])
    assert run.history == HISTORY[:3] and run.name == "RRPO" and run.record["recipe"] == {"alpha": 0.1}
    assert read_run(tmp_path / "checkpoint-9").history == HISTORY[:2]
    for folder, count in (("checkpoint-3", 3), ("checkpoint-2", 2), (".", 3)):  # of a trainer in Python
        write_state(tmp_path / "python" / folder, HISTORY[:count])
    assert read_run(tmp_path / "python").history == HISTORY[:3]


def test_what_an_earlier_run_left_is_ignored(tmp_path):
    assert read_run(write_run(tmp_path)).method == "LeanPO"
    finished = datetime.fromisoformat(RECORD["finished"]).timestamp()
    for seconds, method in ((0.9, "LeanPO"), (-9, "LeanPO"), (9, "DPO")):
        write_state(tmp_path / "checkpoint-5", HISTORY[:2], when=finished + seconds, marker={"method": "dpo"})
        run = read_run(tmp_path)
        assert run.method == method and len(run.history) == (2 if method == "DPO" else 5)


def test_runs_of_one_method_are_named_by_their_folders(tmp_path):
    a, b = write_run(tmp_path / "a" / "out"), write_run(tmp_path / "b" / "out")
    c = write_run(tmp_path / "c" / "out", method="dpo")
    assert [run.name for run in read_runs([a, b, c])] == ["LeanPO (a/out)", "LeanPO (b/out)", "DPO"]
    assert [run.name for run in read_runs([write_state(tmp_path / "_x")])] == ["run (_x)"]
    assert [run.name for run in read_runs([a, b], ["one", "two"])] == ["one", "two"]
    for names, message in ((["one"], "1 names for 2 runs"), (["x", "x"], "two runs are named 'x'")):
        with pytest.raises(PlotError, match=message):
            read_runs([a, b], names)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: [f / "none"], "there is no such folder"),
        (lambda f: [f], "has no trainer_state.json, neither itself nor in a checkpoint"),
        (lambda f: [write_state(f, [])], "nothing was logged. Set logging_steps"),
        (lambda f: [write_state(f, 5)], "its log_history does not list what was logged at which step"),
        (lambda f: [write_state(f, [*HISTORY, {"loss": 0.5}])], "its log_history does not list what was logged"),
        (lambda f: [write_run(f), f / "."], "is given twice"),
        (lambda f: [write_state(f), (f / "run.json").write_text("{")][:1], r"run\.json: it cannot be read"),
        (lambda f: [write_state(f), (f / "run.json").write_text("[" * 10**5)][:1], r"json: it cannot be read"),
    ],
)
def test_what_is_not_a_run(tmp_path, make, message):
    with pytest.raises(PlotError, match=message):
        read_runs(make(tmp_path))


@pytest.mark.parametrize("value", [None, [1], {"a": 1}, "abc", pytest.param(10**400, id="huge")])
def test_what_was_logged_must_be_numbers(tmp_path, value):
    state = write_state(tmp_path, [*HISTORY, {"step": 11, "loss": value}]) / "trainer_state.json"
    for key in ("loss", "eval_grad_norm", "eval_a_loss"):
        write_state(tmp_path, [*HISTORY, {"step": 11, key: value}])
        with pytest.raises(PlotError, match=f"{state}: at step 11, {key} is not a number. Restore it, or plot a copy"):
            plot.plot_runs([tmp_path], tmp_path / "page.html")
    write_state(tmp_path, [*HISTORY, {"step": 11, "own": value, "own_loss": value}])  # it is listed, and not drawn
    plot.plot_runs([tmp_path], tmp_path / "page.html")
    for step in (value, float("nan"), float("inf"), 10**30, -1):
        write_state(tmp_path, [{"step": step, "loss": 0.5}])
        with pytest.raises(PlotError, match=f"{state}: its log_history does not list"):
            plot.plot_runs([tmp_path], tmp_path / "page.html")


@pytest.mark.parametrize(
    "record",
    [{"recipe": [1]}, {"recipe": "x"}, {"versions": 3}, {"run": 5}, {"run": {"recipe": [1]}}, {"saved": "x"},
     {"saved": 1e300}, {"saved": [1]}],
)  # fmt: skip
def test_a_record_of_other_types_names_its_file(tmp_path, record):
    for folder, name in ((tmp_path / "a", "run.json"), (tmp_path / "b" / "checkpoint-5", "complete.json")):
        file = write_state(folder) / name
        file.write_text(json.dumps(record))
        with pytest.raises(PlotError, match=f"{file} does not hold what `trl-vpo train` writes there. Restore it, or"):
            plot.plot_runs([folder], tmp_path / "page.html")
    file.write_text(json.dumps({"run": {"method": 5, "rows": {}, "device": [1], "finished": 7}, "saved": None}))
    plot.plot_runs([folder], tmp_path / "page.html")


# --- tables -------------------------------------------------------------------------------------------------------


def test_final_values_are_the_last_of_each_metric(tmp_path):
    runs = read_runs(
        [write_run(tmp_path / "a"), write_run(tmp_path / "b", [{"step": 5, "loss": 0.25, "kl/chosen": 1.5}])]
    )
    training, evaluation, whole = map(dict, plot.final_values(runs).values())
    assert list(training) == ["loss", "rewards/margins", "logps/chosen", "kl/chosen", "num_tokens"]  # as in the figure
    assert training["loss"] == [0.51239, 0.25] and training["kl/chosen"] == [None, 1.5]
    assert training["logps/chosen"] == [-7.0, None]  # not the summary's
    assert evaluation == {"eval_loss": [0.6, None], "eval_logps/chosen": [-8.5, None]}
    assert whole == {"train_loss": [0.6, None], "train_runtime": [3.25, None]}


def test_settings_that_differ(tmp_path):
    write_run(tmp_path / "a", recipe={"output_dir": "a"})
    write_run(tmp_path / "b", recipe={"output_dir": "b", "learning_rate": 5e-6, "lora_r": 8}, versions={"trl": "1.17"})
    write_state(tmp_path / "c")
    runs = read_runs([tmp_path / name for name in "abc"])
    assert plot.differing_settings(runs) == [
        ("learning_rate", [1e-6, 5e-6]), ("lora_r", [None, 8]), ("version of trl", ["1.16.0", "1.17"])
    ]  # fmt: skip
    assert dict(plot.differing_settings(runs[:1])) == {
        "beta": [2.0], "learning_rate": [1e-6], "seed": [3], "version of trl": ["1.16.0"]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.51239, "0.5124"), (1e-6, "1e-06"), (110080.0, "110,080"), (8, "8"), (True, "True"), ("a", "a"),
     (float("nan"), "nan"), (float("inf"), "inf"), (1.0, "1"), ([1], "[1]"),
     pytest.param(10**400, f"{10**400:,}", id="huge")],
)  # fmt: skip
def test_show_value(value, shown):
    assert plot.show_value(value) == shown


# --- files --------------------------------------------------------------------------------------------------------


def test_page_holds_figure_settings_and_final_values(tmp_path):
    runs = [write_run(tmp_path / "a", recipe={"learning_rate": 5e-6}), write_run(tmp_path / "b", method="dpo")]
    out = tmp_path / "new" / "page.html"
    notes = plot.plot_runs(runs, out)
    assert "Preference accuracy: not logged by any run." in notes
    page, text = tables(out), out.read_text(encoding="utf-8")
    assert page["Settings that differ"] == {None: ["LeanPO", "DPO"], "learning_rate": ["5e-06", "1e-06"]}
    assert page["Runs"]["rows"] == ["160", "160"] and page["Runs"]["last step"] == ["10", "10"]
    training = page["Training: mean over the last logging window"]
    assert training["loss"] == ["0.5124", "0.5124"] and training["num_tokens"] == ["110,080"] * 2
    (picture,) = (base64.b64decode(source) for source in re.findall(r'="data:image/svg\+xml;base64,(.*?)"', text))
    assert ElementTree.fromstring(picture).tag.endswith("svg") and b"#ffffff" in picture
    assert "prefers-color-scheme: dark" in text and "filter: invert" in text
    assert all(f"<li>{note.replace(chr(39), '&#39;')}</li>" in text for note in notes)


def test_nothing_in_a_run_is_markup(tmp_path):
    name, value, out = '<img src=x onerror="alert(1)">', "</style><script>alert(1)</script>", tmp_path / "page.html"
    write_run(tmp_path / "a", recipe={"learning_rate": value}, device="<b>gpu</b>")
    plot.plot_runs([tmp_path / "a"], out, names=[name])
    text = out.read_text(encoding="utf-8")
    assert not re.search(r"<(script|b|link|iframe|object)\b", text) and text.count("<img") == 1
    assert tables(out)["Settings"]["learning_rate"] == [value] and tables(out)["Settings"][None] == [name]


def test_a_run_without_record_is_plotted_and_that_is_said(tmp_path):
    notes = plot.plot_runs([write_state(tmp_path / "a")], tmp_path / "page.html")
    assert notes[-1] == f"run (a): its settings are not known, {tmp_path / 'a'} has no run.json."
    assert "Settings" not in tables(tmp_path / "page.html")


def test_picture_and_wrong_names(tmp_path):
    run = write_run(tmp_path / "a")
    plot.plot_runs([run], tmp_path / "new" / "a.png")
    assert Image.open(tmp_path / "new" / "a.png").format == "PNG"
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").touch()
    for name, message in (
        ("a.jpeg", "must end in .png, .svg, .pdf or .html"),
        ("folder.html", "is a folder: name the file to write"),
        ("file/a.png", r"file/a\.png cannot be written \(.*Name another file"),
    ):
        with pytest.raises(UserError, match=message):
            plot.plot_runs([tmp_path / "none"], tmp_path / name)  # said before the runs are read
    assert not list(tmp_path.glob("**/*.part"))


def test_plotting_imports_neither_torch_nor_pyplot():
    heavy = "torch", "matplotlib", "jinja2"
    code = f"import sys, trl_vpo.report.plot.page; print([n for n in {heavy} if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
