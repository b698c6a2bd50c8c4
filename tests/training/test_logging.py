"""A run logs what it is: every metric reaches the reporters, the figure and the page, and one line a step."""

import contextlib
import importlib.util
import io
import re
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
REPORTERS = [name for name in ("tensorboard",) if importlib.util.find_spec(name)]
METRICS = {
    "loss", "loss/preference", "loss/kl", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
    "rewards/margins", "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "displacement/chosen",
    "displacement/rejected", "kl/chosen", "kl/rejected", "entropy", "mean_token_accuracy", "num_tokens",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(trainer, folder, what it printed) of two steps of RRPO on four clips, with TensorBoard if it is installed."""
    folder = tmp_path_factory.mktemp("logging")
    (folder / "data").mkdir()
    for split, count in (("train", 4), ("test", 2)):
        _, written = rows.write_preferences("clip", count, 5, folder / split)
        rows.write_jsonl(written, folder / "data" / f"{split}.jsonl")
    recipe = yaml.safe_load((ROOT / "recipes" / "quickstart" / "rrpo.yaml").read_text())
    recipe |= {"model_name_or_path": str(ROOT / "trl_vpo" / "testbed" / "base"), "dataset_name": f"{folder}/data"}
    recipe |= {"output_dir": f"{folder}/out", "max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2}
    recipe |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    recipe |= {"report_to": REPORTERS or "none"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
        trainer = run_training("rrpo", ["--config", str(folder / "recipe.yaml")])
    return trainer, folder, printed.getvalue()


def expected(trainer):
    """{reported name: {step: value}} of everything that was logged."""
    logged = {}
    for entry in trainer.state.log_history:
        for key, value in entry.items():
            name = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
            if key != "step":
                logged.setdefault(name, {})[entry["step"]] = value
    return logged


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
    logged = expected(trainer)
    assert set(logged) <= set(reported)
    for name, points in logged.items():
        assert reported[name].keys() == points.keys(), name
        np.testing.assert_allclose(list(reported[name].values()), list(points.values()), rtol=1e-6, err_msg=name)


def test_it_prints_one_short_line_for_each_logging_step(run):
    trainer, _, printed = run
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(TrainingProgress) == 1 and not {ProgressCallback, PrinterCallback} & set(kinds)
    steps = [line for line in printed.splitlines() if line.startswith("step ")]
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert [line.split("  ")[0] for line in steps] == ["step 1/2", "step 2/2", "step 2/2"]
    assert f"  loss {last['loss']:.4f}  margin {last['rewards/margins']:+.3f}  " in steps[1]
    assert re.search(r"  [\d,]+ tok/s  peak \d+\.\d GiB$", steps[1])
    assert steps[2].startswith("step 2/2  evaluation:  loss ")
    assert max(map(len, steps)) <= 80 and "{'" not in printed and printed.count("trained to step 2 in ") == 1


def test_the_start_is_one_block(run):
    _, folder, printed = run
    start = printed[printed.index("method") : printed.index("step 1/2")].splitlines()
    assert [line[:12].strip() for line in start] == [
        "method", "rows", "trained", "batch", "layout", "media", "results", "steps",
        "proven",
    ]  # fmt: skip
    texts = [line[12:] for line in start]
    assert texts[0].startswith("RRPO on ") and texts[1] == "4, 2 to evaluate on"
    assert re.fullmatch(r"[\d,]+ of [\d,]+ parameters \(\d+\.\d\d%\)", texts[2])
    assert texts[3] == "2 = 2 per device x 1 accumulated x 1 process" and texts[6] == str(folder / "out")
    assert texts[7] == "2 (1 epoch)" and texts[8].startswith("packed rows give")


def test_its_folder_can_be_plotted(run, tmp_path):
    trainer, folder, _ = run
    result = read_run(folder / "out")
    assert result.method == "RRPO" and result.record["recipe"]["max_steps"] == 2
    read, logged = ([e["loss"] for e in log if "loss" in e] for log in (result.history, trainer.state.log_history))
    assert read == logged
    notes = plot_runs([folder / "out"], tmp_path / "page.html")
    assert not [note for note in notes if "not logged" in note]  # RRPO has every panel
