"""The datasets that `trl.DPOTrainer` takes, in whatever form: files, streams, formats, decoded columns."""

import pytest
import torch
from datasets import Dataset, IterableDataset, Sequence, Value, Video, concatenate_datasets, load_dataset
from helpers import message, row
from step_kit import losses_of, names_of
from trainer_kit import PAIRS, collated, image_rows, shake, text_rows, trainer_of

from trl_vpo.data.rows import response_text
from trl_vpo.errors import RowError


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


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


@pytest.mark.parametrize(("sets", "named"), [(text_rows(2), "eval"), ({"near": text_rows(2)}, "near")])
def test_rows_that_are_no_dataset(sets, named, tmp_path):
    with pytest.raises(TypeError, match=f"the {named} dataset must be a `Dataset` or `IterableDataset`, got `list`"):
        trainer_of("dpo", tmp_path, eval_dataset=sets)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_with_max_steps(workers, images, tmp_path):
    """Also as evaluation set; rows get their numbers in the order in which they come. It needs `max_steps`."""
    with pytest.raises(ValueError, match="max_steps"):
        trainer_of("dpo", tmp_path, stream(text_rows()), max_steps=-1)
    rows = image_rows(images)
    more = {"eval_dataset": stream(rows[:3]), "eval_strategy": "steps", "eval_steps": 3}
    more |= {"max_steps": 3, "dataloader_num_workers": workers}
    trainer = trainer_of("rrpo", tmp_path, stream(rows), name="LLaVA-1.5", **more)
    names = names_of(trainer)
    assert names[0] == ["row 0 (id 'i0')", "row 1 (id 'i1')"] and trainer.state.global_step == 3
    assert len(losses_of(trainer, "eval_loss")) == 1


def test_empty_image_columns_of_a_text_model(tmp_path):
    """An image that comes later in a stream is refused, not dropped."""
    rows = [{**example, "images": []} for example in text_rows(3)]
    for data in (Dataset.from_list(rows), stream(rows)):
        assert trainer_of("dpo", tmp_path, data).train().global_step
    seen = rows[0] | {"images": ["a.png"], "prompt": message("user", "<image>", "What?")}
    with pytest.raises(
        RowError, match=r"row 3 .*has images, but \w+ is a tokenizer of a text model.*\(docs/models\.md has a table\)"
    ):
        trainer_of("dpo", tmp_path, stream([*rows, seen])).train()


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


def test_rows_of_an_earlier_trainer_are_checked_anew(tmp_path):
    """Whatever is derived from them, and by what this trainer is set to; its own are not looked at twice."""
    first = trainer_of("dpo", tmp_path, text_rows(3))
    rows = first.train_dataset
    mapped = rows.map(lambda example: {"chosen": example["chosen"]})
    for data in (rows, rows.select([0, 1]), concatenate_datasets([rows, rows]), mapped):
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
    for example in rows:
        example["prompt"] = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
        example |= {"chosen_phrases": [[0, 3]], "rejected_phrases": [[2, 6]], "score": 1.0}
    plain = Dataset.from_list(rows)
    shown = [column for column in plain.column_names if column != "score"]
    want = collated(trainer_of("rrpo", tmp_path, plain))
    for columns in (None, shown):
        data = plain.with_format(kind, columns=columns)
        got = trainer_of("rrpo", tmp_path, data, eval_dataset=plain.to_iterable_dataset().with_format(kind))
        assert ("score" in got.train_dataset[0]) == (columns is None)
        for batch in (collated(got), got._prepare_inputs(next(iter(got.get_eval_dataloader())))):
            assert want["phrase_mask"].any() and batch.keys() - {"proof_rows"} == want.keys()  # streams bring them
            for name, value in want.items():
                assert torch.equal(batch[name], value) if torch.is_tensor(value) else batch[name] == value, name
    assert data.format["type"] == kind


def test_shuffled_rows_of_large_strings(tmp_path):
    """Arrow types and empty columns as parquet files have them. Names count positions in the dataset as it came."""
    rows = [{**r, "videos": None, "images": None} for r in text_rows()]
    data = Dataset.from_list(rows).cast_column("id", Value("large_string")).shuffle(seed=3).select([6, 1, 4, 0])
    trainer = trainer_of("rrpo", tmp_path, data)
    assert trainer.train_dataset["id"] == data["id"] and trainer.train_dataset["_row_index"] == [0, 1, 2, 3]
    batch = collated(trainer)
    for i, example in enumerate(data):
        assert batch["names"][i] == f"row {i} (id {example['id']!r})"
        text = trainer.processing_class.decode(batch["branch_ids"][2 * i][batch["branch_mask"][2 * i]])
        assert text.startswith(response_text(example["chosen"]))
    trainer.train()
    assert trainer.state.global_step == 2
