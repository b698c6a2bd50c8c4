"""What a run logs is what it is: every metric reaches the reporters, the figure and the page, and one line a step."""

import contextlib
import importlib.util
import io
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import PrinterCallback, ProgressCallback

from trl_vpo.report.plot.page import plot_runs
from trl_vpo.report.plot.runs import read_run
from trl_vpo.testbed import rows
from trl_vpo.training.progress import TrainingProgress
from trl_vpo.training.run import run_training

ROOT = Path(__file__).parents[2]
REPORTERS = [name for name in ("tensorboard", "wandb", "trackio") if importlib.util.find_spec(name)]
METRICS = {
    "loss", "loss/preference", "loss/kl", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
    "rewards/margins", "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "displacement/chosen",
    "displacement/rejected", "kl/chosen", "kl/rejected", "entropy", "mean_token_accuracy", "num_tokens",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(trainer, folder, what it printed) of two steps of RRPO on four clips, with every reporter that is installed."""
    folder = tmp_path_factory.mktemp("logging")
    (folder / "data").mkdir()
    for split, count in (("train", 4), ("test", 2)):
        _, written = rows.write_preferences("clip", count, 5, folder / split)
        rows.write_jsonl(written, folder / "data" / f"{split}.jsonl")
    recipe = yaml.safe_load((ROOT / "recipes" / "quickstart" / "rrpo.yaml").read_text()) | {
        "model_name_or_path": str(ROOT / "trl_vpo" / "testbed" / "base"),
        "dataset_name": str(folder / "data"),
        "output_dir": str(folder / "out"),
        "max_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": REPORTERS or "none",
        "project": "trl-vpo-test",
        "run_name": "two-steps",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_DIR", str(folder))
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
        trainer = run_training("rrpo", ["--config", str(folder / "recipe.yaml")])
        if "wandb" in REPORTERS:
            importlib.import_module("wandb").finish()  # transformers leaves that to the end of the process
    return trainer, folder, printed.getvalue()


def expected(trainer):
    """{reported name: {step: value}} of everything that was logged."""
    found = {}
    for entry in trainer.state.log_history:
        for key, value in entry.items():
            name = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
            if key != "step":
                found.setdefault(name, {})[entry["step"]] = value
    return found


def check(reported, trainer, *, without=()):
    """Every value that was logged was reported with its step."""
    wanted = {name: points for name, points in expected(trainer).items() if name not in without}
    assert set(wanted) <= set(reported)
    for name, points in wanted.items():
        assert reported[name].keys() == points.keys(), name
        np.testing.assert_allclose(list(reported[name].values()), list(points.values()), rtol=1e-6, err_msg=name)


def test_every_metric_is_logged_in_training_and_evaluation(run):
    trainer, _, _ = run
    logged = expected(trainer)
    assert {f"train/{name}" for name in METRICS} | {"train/grad_norm", "train/learning_rate"} <= set(logged)
    assert {f"eval/{name}" for name in METRICS} <= set(logged)
    assert list(logged["train/loss"]) == [1, 2] and list(logged["eval/kl/chosen"]) == [2]
    assert logged["train/num_tokens"][2] > logged["train/num_tokens"][1] > 0


def test_tensorboard_gets_every_metric(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, folder, _ = run
    events = EventAccumulator(str(folder / "events")).Reload()
    reported = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    check(reported, trainer)


def test_wandb_gets_every_metric_offline(run):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    trainer, folder, _ = run
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    reported, summary = {}, {}
    for data in _wandb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        for name in values.keys() - {"train/global_step"} if "train/global_step" in values else ():
            reported.setdefault(name, {})[values["train/global_step"]] = values[name]
        summary |= {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.summary.update}
    whole = {"train/train_runtime", "train/train_samples_per_second", "train/train_steps_per_second"}
    whole |= {"train/train_loss", "train/total_flos"}  # transformers puts these into the run's summary
    check(reported, trainer, without=whole)
    assert {name.removeprefix("train/") for name in whole} <= {name.removeprefix("train/") for name in summary}


def _wandb_records(data):
    """The records of a .wandb file: LevelDB's log format behind a header of seven bytes."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits behind: the block is filled up
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_trackio_gets_every_metric(run):
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    trainer, _, _ = run
    reported = {}
    for entry in SQLiteStorage.get_logs("trl-vpo-test", "two-steps"):
        for name in entry.keys() - {"step", "timestamp", "train/global_step"}:
            reported.setdefault(name, {})[entry["train/global_step"]] = entry[name]
    whole = ("runtime", "samples_per_second", "steps_per_second", "loss")  # transformers leaves these out
    check(reported, trainer, without={"train/total_flos", *(f"train/train_{name}" for name in whole)})


def test_it_prints_one_short_line_for_each_logging_step(run):
    trainer, _, printed = run
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(TrainingProgress) == 1 and not {ProgressCallback, PrinterCallback} & set(kinds)
    steps = [line for line in printed.splitlines() if line.startswith("step ")]
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert [line.split("  ")[0] for line in steps] == ["step 1/2", "step 2/2", "step 2/2"]
    assert f"  loss {last['loss']:.4f}  margin {last['rewards/margins']:+.3f}  " in steps[1]
    assert re.search(r"  [\d,]+ tokens/s  peak \d+\.\d\d GiB$", steps[1])
    assert steps[2].startswith("step 2/2  evaluation:  loss ")
    assert "{'" not in printed and printed.count("trained to step 2 in ") == 1


def test_its_folder_can_be_plotted(run, tmp_path):
    trainer, folder, _ = run
    found = read_run(folder / "out")
    assert found.method == "RRPO" and found.record["recipe"]["max_steps"] == 2
    assert [e["loss"] for e in found.history if "loss" in e] == [
        e["loss"] for e in trainer.state.log_history if "loss" in e
    ]
    notes = plot_runs([folder / "out"], tmp_path / "page.html")
    assert not [note for note in notes if "not logged" in note]  # RRPO has every panel
