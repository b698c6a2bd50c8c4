"""Held-out measures while training: the numbers of `trl-vpo evaluate` on the adapter that was just saved."""

import pytest
import torch
from datasets import Dataset
from held_out_kit import LANGUAGE, plain, processor, said, slow_sum, write_held_out
from peft import LoraConfig

import trl_vpo
from trl_vpo.data import trunk_media
from trl_vpo.errors import EvaluateError
from trl_vpo.evaluate.callback import EvaluationCallback
from trl_vpo.evaluate.run import run_evaluation
from trl_vpo.testbed import language, tiny_vlm
from trl_vpo.testbed.rows import write_jsonl

QUIET = {
    "use_cpu": True, "bf16": False, "report_to": [], "num_frames": 8, "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "disable_tqdm": True,
    "save_strategy": "no", "gradient_checkpointing": False,
}  # fmt: skip


def dataset(rows) -> Dataset:
    columns = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_list([{name: row.get(name) for name in columns} for row in rows])


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return write_held_out(tmp_path_factory.mktemp("held_out"))


@pytest.fixture(scope="module")
def preferences(held_out):
    return [row for row in held_out.rows.values() if "chosen" in row]


def trainer_of(method, out, rows, *, lora=True, model=None, **more):
    config, trainer = getattr(trl_vpo, f"{method}Config"), getattr(trl_vpo, f"{method}Trainer")
    return trainer(
        model or str(tiny_vlm.BASE),
        args=config(str(out), **{**QUIET, **more}),
        train_dataset=dataset(rows),
        eval_dataset=dataset(rows[:2]),
        processing_class=processor(),
        peft_config=LoraConfig(r=4, target_modules=LANGUAGE) if lora else None,
    )


@pytest.fixture(scope="module")
def trained(held_out, preferences, tmp_path_factory):
    """A trainer after two steps with an evaluation at each, and its callback."""
    out = tmp_path_factory.mktemp("trained") / "dpo"
    trainer = trainer_of(
        "VisualDPO", out, preferences, max_steps=2, eval_strategy="steps", eval_steps=1,
        metric_for_best_model="eval_heldout/preference/accuracy_average",
    )  # fmt: skip
    callback = EvaluationCallback(trainer, str(held_out.path))
    trainer.add_callback(callback)
    trainer.train()
    trainer.save_model()
    return trainer, callback


def logged(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "eval_heldout/preference/accuracy" in entry]


def test_every_evaluation_has_the_measures(trained):
    trainer, _ = trained
    entries = logged(trainer)
    assert [entry["step"] for entry in entries] == [1, 2]
    assert entries[0]["eval_heldout/displacement/chosen"] != entries[1]["eval_heldout/displacement/chosen"]
    assert entries[1]["eval_heldout/kl/chosen"] > 1e-4
    # `metric_for_best_model` found it among the metrics of the evaluation
    assert trainer.state.best_metric == max(entry["eval_heldout/preference/accuracy_average"] for entry in entries)
    assert trainer.model.active_adapter == "default" and not trainer.model._adapters_disabled


def test_they_are_those_of_the_saved_adapter(trained, held_out, tmp_path):
    trainer, callback = trained
    data = write_jsonl((row for row in held_out.rows.values() if "chosen" in row), tmp_path / "rows.jsonl")
    options = {"num_frames": 8, "device": "cpu", "output_dir": tmp_path / "run", "resamples": 10, "num_images": 2}
    argv = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    folder = trainer.args.output_dir
    results = run_evaluation(["--model", str(tiny_vlm.BASE), "--data", str(data), "--adapters", folder, *argv])
    stored = results["contestants"]["dpo"]["measures"]
    expected = {name: measure["value"] for name, measure in stored.items() if not name.startswith("visibility")}
    assert callback.measure() == pytest.approx(expected, abs=1e-4)
    assert {"sensitivity/shuffled", "reward/margin", "kl/chosen_per_token", "logps/rejected"} <= expected.keys()


def test_one_step_is_measured_once(trained, monkeypatch):
    trainer, callback = trained
    calls = []
    monkeypatch.setattr(callback, "measure", lambda: calls.append(1) or {"kl/chosen": 1.0})
    callback._done = None
    metrics = [{"eval_a_loss": 0.5}, {"eval_b_loss": 0.5}]
    for one in metrics:  # two eval sets
        callback.on_evaluate(trainer.args, trainer.state, trainer.control, metrics=one)
    assert calls == [1] and all(one["eval_heldout/kl/chosen"] == 1.0 for one in metrics)


def test_after_the_training_the_best_model_is_measured(preferences, held_out, tmp_path):
    """It was loaded in the place of the last one, at the same step; and a further training begins with new weights."""
    best = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "greater_is_better": False}
    trainer = trainer_of(
        "VisualDPO", tmp_path, preferences, max_steps=2, eval_strategy="steps", eval_steps=1, **best,
        metric_for_best_model="eval_heldout/kl/chosen",
    )  # fmt: skip
    callback = EvaluationCallback(trainer, str(held_out.path), sensitivity=(), limit=3)
    trainer.add_callback(callback)
    trainer.train()
    first, last = (entry["eval_heldout/kl/chosen"] for entry in logged(trainer))
    assert trainer.state.best_global_step == 1 and first < last
    after = trainer.evaluate()
    assert after["eval_heldout/kl/chosen"] == pytest.approx(first, rel=1e-3)
    assert callback._done[0] == 2
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert callback._done is None


def test_a_training_without_evaluations_is_warned_of(preferences, caplog, tmp_path):
    trainer = trainer_of("LeanPO", tmp_path, preferences, max_steps=1, eval_strategy="no")
    for every, warned in ((5, False), ("eval", True)):
        callback = EvaluationCallback(trainer, dataset(preferences[:1]), every=every, sensitivity=())
        with caplog.at_level("WARNING"):
            callback.on_train_begin(trainer.args, trainer.state, trainer.control)
        assert ("Give every=N" in caplog.text) == warned


def test_the_log_of_a_measured_step_is_kept(preferences, tmp_path):
    trainer = trainer_of("LeanPO", tmp_path, preferences, max_steps=2, eval_strategy="no", logging_steps=1)
    trainer.add_callback(EvaluationCallback(trainer, dataset(preferences[:1]), every=1, sensitivity=()))
    trainer.train()
    losses = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == [entry["step"] for entry in logged(trainer)] == [1, 2]


def test_full_fine_tuning_without_a_reference_has_no_movement(preferences, held_out, tmp_path):
    torch.manual_seed(0)
    trainer = trainer_of("LeanPO", tmp_path, preferences, lora=False, model=plain(), max_steps=2)
    data = dataset(preferences[:3])
    callback = EvaluationCallback(trainer, data, every=2, sensitivity=("blank",))
    trainer.add_callback(callback)
    at_first = callback.measure()
    asked = [(processor(), held_out.samples[row["id"]], language.PROMPTS["clip"], said(row, "chosen")) for row in data]
    slow = sum(slow_sum(trainer.model.eval(), *one) for one in asked) / 3
    assert at_first["logps/chosen"] == pytest.approx(slow, abs=1e-4)
    assert not any(name.startswith(("kl", "displacement", "reward")) for name in at_first)
    assert [name for name in at_first if "sensitivity" in name] == ["sensitivity/blank", "sensitivity/blank_share"]
    trainer.model.train()
    callback.measure()
    assert trainer.model.training
    trainer.train()
    (entry,) = logged(trainer)
    assert entry["step"] == 2 and entry["eval_heldout/logps/chosen"] != pytest.approx(slow)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: {"videos": ["broken.mp4"]}, r"1 of 2 held-out rows.*\n  - row 1 \(id 'clip-0001'.*broken\.mp4"),
        (lambda row: {"videos": ["missing.mp4"]}, r"row 1 .*missing\.mp4.*not"),
        (lambda row: {"rejected": row["chosen"]}, "chosen and rejected are identical"),
    ],
    ids=["broken", "missing", "identical"],
)
def test_rows_that_cannot_be_used(change, message, trained, preferences, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(EvaluateError, match=message):
        EvaluationCallback(trained[0], dataset([preferences[0], preferences[1] | change(preferences[1])]))


def test_of_a_list_only_the_first_item_is_read(trained, preferences, monkeypatch):
    """Of a row that has nothing else; the others would be decoded at every evaluation."""
    own, read, load = preferences[0], [], trunk_media.load_video
    listed = [preferences[place]["videos"][0] for place in (0, 1, 2)]
    row = {**{name: own[name] for name in ("id", "prompt", "chosen", "rejected")}, "video_list": listed}
    callback = EvaluationCallback(trained[0], dataset([row]), sensitivity=())
    monkeypatch.setattr(trunk_media, "load_video", lambda v, *args, **how: read.append(v) or load(v, *args, **how))
    measures = callback.measure()
    assert read == listed[:1]
    single = EvaluationCallback(
        trained[0], dataset([{**row, "video_list": None, "videos": listed[:1]}]), sensitivity=()
    )
    assert measures == pytest.approx(single.measure())


def test_settings_and_rows_of_other_tasks(trained, preferences, caplog, held_out):
    for settings, message in (({"every": 0}, "every is 0"), ({"sensitivity": ("noisy",)}, "'noisy' is not one of")):
        with pytest.raises(ValueError, match=message):
            EvaluationCallback(trained[0], dataset(preferences), **settings)
    with caplog.at_level("WARNING"):
        callback = EvaluationCallback(trained[0], str(held_out.path), limit=2)
    assert "12 held-out rows have a task that only `trl-vpo evaluate` measures" in caplog.text
    assert [row.id for row in callback._rows] == ["clip-0000", "clip-0001"]
