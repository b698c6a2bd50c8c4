"""What `trl.DPOTrainer` takes, these trainers take: datasets, collators, callbacks, reports, best models."""

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, Sequence, Value, Video, concatenate_datasets, load_dataset
from datasets import Image as ImageFeature
from helpers import row
from PIL import Image
from trainer_kit import (
    METHODS,
    PAIRS,
    collated,
    config,
    fresh,
    image_rows,
    lora,
    losses_of,
    shake,
    text_rows,
    trainable,
    trainer_of,
)
from transformers import TrainerCallback

from trl_vpo import PreferenceCollator
from trl_vpo.data.rows import response_text
from trl_vpo.errors import RowError


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def names_of(trainer):
    """Trains, and gives the rows of each step."""
    names, loss = [], trainer.compute_loss
    trainer.compute_loss = lambda m, inputs, **kw: names.append(inputs["names"]) or loss(m, inputs, **kw)
    trainer.train()
    return names


# --- datasets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [dict, DatasetDict])
def test_several_evaluation_sets(kind, tmp_path):
    sets = kind({"short": Dataset.from_list(text_rows(2)), "long": Dataset.from_list(text_rows(3, start=2))})
    more = {"eval_dataset": sets, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_of("rrpo", tmp_path, metric_for_best_model="eval_short_loss", **more)
    trainer.train()
    for name in sets:
        assert len(losses_of(trainer, f"eval_{name}_loss")) == 2
        assert len(losses_of(trainer, f"eval_{name}_rewards/margins")) == 2
    last = trainer.evaluate()
    alone = trainer.evaluate(sets["long"])
    assert last["eval_long_loss"] == pytest.approx(alone["eval_loss"])
    assert last["eval_short_loss"] != pytest.approx(alone["eval_loss"])
    assert trainer.evaluate(eval_dataset="long")["eval_loss"] == pytest.approx(alone["eval_loss"])


def test_evaluate_takes_raw_datasets(images, tmp_path):
    """One, a dictionary and a stream, none of which the trainer has seen; also for a trainer without any."""
    rows = image_rows(images)
    trainer = trainer_of("dpo", tmp_path, rows, name="LLaVA-1.5")
    shake(trainer.model)
    data = Dataset.from_list(rows[:3])
    one = trainer.evaluate(data)
    named = trainer.evaluate({"a": data, "b": data.select([0])}, metric_key_prefix="test")
    assert named["test_a_loss"] == pytest.approx(one["eval_loss"]) and "test_b_rewards/margins" in named
    streamed = trainer.evaluate(stream(rows[:3]))
    assert streamed["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)
    assert trainer.evaluate(trainer.train_dataset.select(range(3)))["eval_loss"] == pytest.approx(one["eval_loss"])
    with pytest.raises(ValueError, match="1 of 2 eval rows cannot be trained on"):  # checked before anything runs
        trainer.evaluate(Dataset.from_list([rows[0], {**rows[1], "rejected": rows[1]["chosen"]}]))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_with_max_steps(workers, images, tmp_path):
    """Also as evaluation set; rows get their numbers in the order in which they come."""
    rows = image_rows(images)
    more = {"eval_dataset": stream(rows[:3]), "eval_strategy": "steps", "eval_steps": 3}
    trainer = trainer_of(
        "rrpo", tmp_path, stream(rows), name="LLaVA-1.5", max_steps=3, dataloader_num_workers=workers, **more
    )
    names = names_of(trainer)
    assert names[0] == ["row 0 (id 'i0')", "row 1 (id 'i1')"] and trainer.state.global_step == 3
    assert len(losses_of(trainer, "eval_loss")) == 1


def test_a_stream_without_max_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_steps"):
        trainer_of("dpo", tmp_path, stream(text_rows()), max_steps=-1)


def test_a_dataset_from_a_file(images, tmp_path):
    """jsonl through `load_dataset`, streamed or not, with columns that nobody asked for."""
    rows = [{**r, "score": i, "notes": {"by": "me"}} for i, r in enumerate(image_rows(images))]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    losses = []
    for streaming in (False, True):
        data = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", streaming=streaming)
        sampling = {"train_sampling_strategy": "sequential"}
        trainer = trainer_of("leanpo", tmp_path, data, name="LLaVA-1.5", **sampling)
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("keep", [True, False])
def test_columns_that_nobody_asked_for(keep, tmp_path):
    rows = [{**r, "score": 1.5, "history": [{"a": 1}]} for r in text_rows()]
    plain = trainer_of("dpo", tmp_path)
    trainer = trainer_of("dpo", tmp_path, rows, remove_unused_columns=keep)
    assert names_of(trainer) == names_of(plain) and losses_of(trainer) == losses_of(plain)


def test_decoded_images(images, tmp_path):
    """A `datasets.Image` column: PIL images instead of paths, with the same result."""
    rows = image_rows(images)
    by_path = trainer_of("dpo", tmp_path, rows, name="LLaVA-1.5")
    data = Dataset.from_list(rows).cast_column("images", Sequence(ImageFeature()))
    assert isinstance(data[0]["images"][0], Image.Image)
    decoded = trainer_of("dpo", tmp_path, data, name="LLaVA-1.5")
    for trainer in (by_path, decoded):
        shake(trainer.model)
        trainer.train()
    assert losses_of(by_path) == losses_of(decoded)


def test_predict_takes_what_evaluate_takes(media, tmp_path):
    """A `datasets.Video` column, which nobody else decodes; and rows are checked before anything runs."""
    rows = [row("video", [media["video"][i % 2]], *PAIRS[i], id=f"v{i}") for i in range(3)]
    data = Dataset.from_list(rows).cast_column("videos", Sequence(Video()))
    trainer = trainer_of("dpo", tmp_path, rows, name="Qwen2-VL", num_frames=4)
    shake(trainer.model)
    want, predicted = trainer.evaluate(data), trainer.predict(data)
    skip = ("runtime", "per_second", "time", "epoch")
    want = {k.removeprefix("eval_"): v for k, v in want.items() if not k.endswith(skip)}
    got = {k.removeprefix("test_"): v for k, v in predicted.metrics.items() if not k.endswith(skip)}
    assert abs(want["rewards/margins"]) > 1e-2
    assert {k: got[k] for k in want} == want
    with torch.no_grad():
        scores = trainer.concatenated_forward(trainer.model, collated(trainer))
    for got, side in zip(predicted.predictions, (scores.chosen, scores.rejected)):
        torch.testing.assert_close(torch.tensor(got), scores.sums[side], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="1 of 2 eval rows cannot be trained on"):
        trainer.predict(Dataset.from_list([rows[0], {**rows[1], "rejected": rows[1]["chosen"]}]))


def test_shuffled_selected_and_concatenated_rows(tmp_path):
    """Names count positions in the dataset as it was given; contents follow the shuffle."""
    data = Dataset.from_list(text_rows()).shuffle(seed=3).select([6, 1, 4, 0])
    trainer = trainer_of("dpo", tmp_path, data)
    assert trainer.train_dataset["id"] == data["id"] and trainer.train_dataset["_row_index"] == [0, 1, 2, 3]
    batch = collated(trainer)
    decode = trainer.processing_class.decode
    for i, example in enumerate(data):
        assert batch["names"][i] == f"row {i} (id {example['id']!r})"
        text = decode(batch["branch_ids"][2 * i][batch["branch_mask"][2 * i]])
        assert text.startswith(response_text(example["chosen"]))
    trainer.train()


def test_rows_of_an_earlier_trainer_are_checked_anew(tmp_path):
    """Whatever is derived from them, and by what this trainer is set to; its own are not looked at twice."""
    first = trainer_of("dpo", tmp_path, text_rows(3))
    rows = first.train_dataset
    derived = [
        rows,
        rows.select([0, 1]),
        concatenate_datasets([rows, rows]),
        rows.map(lambda example: {"chosen": example["chosen"]}),
    ]
    for data in derived:
        with pytest.raises(RowError, match="more than max_length=5"):
            trainer_of("dpo", tmp_path, data, max_length=5)
    with pytest.raises(RowError, match=r"row 0 \(id 't0'\): "):
        trainer_of("rrpo", tmp_path, rows.select([0]).map(lambda example: {"rejected": example["chosen"]}))
    broken = rows.select([2, 0]).map(lambda example, i: {"chosen": example["chosen"] * (1 - i)}, with_indices=True)
    with pytest.raises(RowError, match=r"1 of 2 eval rows .*\n.*row 1 \(id 't0'\): the chosen response is empty"):
        first.evaluate(broken)
    again = trainer_of("dpo", tmp_path, concatenate_datasets([rows, rows]), eval_dataset=rows)
    assert again.train_dataset["_row_index"] == [*range(6)]
    prepare = again._prepare_dataset
    assert prepare(again.eval_dataset, again.processing_class, again.args, "eval") is again.eval_dataset


@pytest.mark.parametrize("kind", ["arrow", "pandas", "numpy", "torch"])
def test_rows_train_in_whatever_format_they_come(kind, tmp_path):
    """Phrases as well, contents as messages, and streams; columns that a format hides stay hidden."""
    rows = text_rows(2)
    for made in rows:
        made["prompt"] = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
        made |= {"chosen_phrases": [[0, 3]], "rejected_phrases": [[2, 6]], "score": 1.0}
    plain = Dataset.from_list(rows)
    shown = [column for column in plain.column_names if column != "score"]
    want = collated(trainer_of("rrpo", tmp_path, plain))
    for columns in (None, shown):
        data = plain.with_format(kind, columns=columns)
        got = trainer_of("rrpo", tmp_path, data, eval_dataset=plain.to_iterable_dataset().with_format(kind))
        assert ("score" in got.train_dataset[0]) == (columns is None)
        for batch in (collated(got), got._prepare_inputs(next(iter(got.get_eval_dataloader())))):
            assert want["phrase_mask"].any() and batch.keys() == want.keys()
            for name, value in want.items():
                assert torch.equal(batch[name], value) if torch.is_tensor(value) else batch[name] == value, name
    assert data.format["type"] == kind


def test_a_dataset_of_large_strings_and_missing_columns(tmp_path):
    """Arrow types as parquet files have them."""
    data = Dataset.from_list([{**r, "videos": None, "images": None} for r in text_rows()])
    data = data.cast_column("id", Value("large_string"))
    trainer = trainer_of("rrpo", tmp_path, data)
    trainer.train()
    assert trainer.state.global_step == 2


# --- collator, callbacks, optimizers, reports -----------------------------------------------------------------------


class Half(PreferenceCollator):
    """A collator of one's own: every batch loses its second half."""

    def __call__(self, examples):
        return super().__call__(examples[: len(examples) // 2])


def test_a_collator_of_ones_own(tmp_path):
    trainer = trainer_of("rrpo", tmp_path, data_collator=Half(fresh()[1], phrases=True), per_device_train_batch_size=4)
    assert isinstance(trainer.data_collator, Half)
    assert [len(names) for names in names_of(trainer)] == [2, 2]


def test_callbacks_see_the_metrics(tmp_path):
    logs = []

    class Keep(TrainerCallback):
        def on_log(self, args, state, control, logs=None, into=logs, **_):
            into.append(logs)

    trainer_of("dpo", tmp_path, callbacks=[Keep()]).train()
    assert [set(entry) >= {"loss", "rewards/margins", "displacement/chosen"} for entry in logs] == [True, True, False]


def test_an_optimizer_of_ones_own(tmp_path):
    model, tokenizer = fresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    more = {"model": model, "processor": tokenizer, "peft": None, "optimizers": (optimizer, schedule)}
    trainer = trainer_of("leanpo", tmp_path, **more)
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == 0.1
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))


def test_tensorboard(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = trainer_of("rrpo", tmp_path / "out", report_to="tensorboard")
    trainer.train()
    folder = next(tmp_path.rglob("events.out.tfevents*")).parent
    events = EventAccumulator(str(folder))
    events.Reload()
    values = [event.value for event in events.Scalars("train/kl/chosen")]
    assert values == pytest.approx(losses_of(trainer, "kl/chosen"), rel=1e-4)


BEST = [("eval_rewards/margins", True), ("eval_loss", False), ("logps/chosen", False)]


@pytest.mark.parametrize(("metric", "greater"), BEST)
def test_the_best_model_is_loaded_at_the_end(metric, greater, tmp_path):
    more = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    more |= {"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": greater}
    trainer = trainer_of("dpo", tmp_path, eval_dataset=Dataset.from_list(text_rows(3, start=4)), **more)
    weights = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            weights[state.global_step] = {k: p.clone() for k, p in trainable(model).items()}

    trainer.add_callback(Keep())
    trainer.train()
    values = losses_of(trainer, metric if metric.startswith("eval_") else f"eval_{metric}")
    assert len(values) == 4
    best = (max if greater else min)(range(4), key=values.__getitem__) + 1
    assert trainer.state.best_global_step == best
    assert all(torch.equal(p, weights[best][k]) for k, p in trainable(trainer.model).items())


def test_epochs_and_an_incomplete_last_batch(tmp_path):
    trainer = trainer_of("rrpo", tmp_path, text_rows(5), max_steps=-1, num_train_epochs=2)
    assert [len(names) for names in names_of(trainer)] == [2, 2, 1] * 2


def test_evaluation_accumulates_and_reports_what_is_asked(tmp_path):
    seen = []

    def compute_metrics(prediction, compute_result=True):
        seen.append((prediction.losses is not None, len(prediction.predictions[0]), compute_result))
        return {"n": sum(n for _, n, _ in seen)}

    more = {"eval_dataset": Dataset.from_list(text_rows(3)), "compute_metrics": compute_metrics}
    trainer = trainer_of("dpo", tmp_path, batch_eval_metrics=True, include_for_metrics=["loss"], **more)
    assert (
        trainer.evaluate()["eval_n"] == 3 and [last for *_, last in seen] == [False, True] and all(s[0] for s in seen)
    )


# --- around the training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_trained_model_generates(method, images, tmp_path):
    rows = image_rows(images, critical_box=[4, 4, 30, 30])
    trainer = trainer_of(method, tmp_path, rows, name="Qwen2-VL")
    trainer.train()
    processor = trainer.processing_class
    text = processor.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True)
    inputs = processor(text=[text], images=[[Image.open(images[0])]], return_tensors="pt")
    out = trainer.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3


def test_a_pad_token_of_ones_own(tmp_path):
    model, tokenizer = fresh()
    trainer = trainer_of("dpo", tmp_path, model=model, processor=tokenizer, pad_token="<|im_start|>")
    pad = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer.pad_token_id == pad == trainer.model.config.pad_token_id
    batch = collated(trainer)
    assert set(batch["branch_ids"][~batch["branch_mask"]].tolist()) == {pad}


def test_a_tokenizer_without_a_pad_token(tmp_path):
    model, tokenizer = fresh()
    tokenizer.pad_token = None
    trainer = trainer_of("leanpo", tmp_path, model=model, processor=tokenizer)
    trainer.train()
    assert tokenizer.pad_token == tokenizer.eos_token


def test_lora_starts_from_the_seed(tmp_path):
    weights = []
    for seed in (5, 5, 6):
        torch.rand(seed)  # whatever ran before
        trainer = trainer_of("dpo", tmp_path, seed=seed)
        weights.append(torch.cat([p.flatten() for p in trainable(trainer.model).values()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_positional_order_is_trls(tmp_path):
    """model, ref_model, args, data_collator, train_dataset: a call without names means the same."""
    model, tokenizer = fresh()
    data = Dataset.from_list(text_rows())
    args = config("dpo", tmp_path)
    trainer = METHODS["dpo"][1](model, None, args, None, data, data, tokenizer, peft_config=lora(text=True))
    trainer.train()
    assert trainer.eval_dataset is not None and trainer.state.global_step == 2
