"""`precompute_ref_log_probs`: the same numbers as with a pass on the fly, and what is computed again when."""

import copy
import gc
import json
import math
import shutil

import pytest
import torch
import transformers as T
from datasets import Dataset
from helpers import row, write_clip, write_image
from peft import get_peft_model
from torch.utils.data import default_collate
from trainer_kit import (
    PAIRS,
    assert_same_gradients,
    collated,
    config,
    fresh,
    gradients,
    image_rows,
    lora,
    losses_of,
    shake,
    text_rows,
    trainer_of,
)

from trl_vpo.forward.scoring import ReferenceSums

LOG2 = pytest.approx(math.log(2), abs=1e-6)
AHEAD = {"precompute_ref_log_probs": True}


def ahead(method, folder, rows=None, cache="cache", **more):
    """A trainer that precomputes, into a folder that outlives it."""
    torch.manual_seed(0)  # a new adapter is random
    where = {"precompute_cache_dir": str(folder / cache)}
    return trainer_of(method, folder / "run", rows, **{**AHEAD, **where, **more})


def on_the_fly(method, folder, rows=None, **more):
    torch.manual_seed(0)
    return trainer_of(method, folder / "plain", rows, **more)


def lines(folder):
    """The entries of a cache: one for each row that was computed."""
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def history(trainer):
    clock = ("runtime", "per_second")
    return [{k: v for k, v in entry.items() if not k.endswith(clock)} for entry in trainer.state.log_history]


def assert_same_history(got, want):
    assert len(history(got)) == len(history(want)) > 0
    for a, b in zip(history(got), history(want)):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


@pytest.fixture
def own_images(tmp_path):
    """Four pictures that a test may overwrite."""
    return [write_image(tmp_path / f"{i}.png", (56, 56), i) for i in range(4)]


# --- equality -------------------------------------------------------------------------------------------------------


def rows_of(kind, images, folder):
    if kind == "text":
        return text_rows(6)
    clips = [write_clip(folder / f"{i}.mp4", seed=i) for i in range(2)]
    videos = [row("video", [clips[i % 2]], *PAIRS[i], id=f"v{i}") for i in range(3)]
    if kind == "video":
        return videos
    if kind == "mixed":
        return [{"images": None, "videos": None} | r for r in (*videos, *image_rows(images, 2), *text_rows(2))]
    if kind == "lists":
        return image_rows(images, 4, critical_box=[4, 4, 40, 30])
    return image_rows(images, 4)


@pytest.mark.parametrize(
    ("method", "kind"), [("dpo", "text"), ("dpo", "image"), ("dpo", "video"), ("dpo", "mixed"), ("lpoi", "lists")]
)
def test_losses_gradients_and_metrics_are_those_of_the_pass_on_the_fly(method, kind, images, tmp_path):
    rows = rows_of(kind, images, tmp_path)
    more = {"name": "text" if kind == "text" else "Qwen2-VL", "num_frames": 4, "max_steps": 3}
    got = ahead(method, tmp_path, rows, precompute_ref_batch_size=3, **more)
    want = on_the_fly(method, tmp_path, rows, **more)
    sums = want.reference_scores(collated(want)).sums
    torch.testing.assert_close(collated(got)["ref_sums"], sums, rtol=1e-5, atol=1e-5)
    for trainer in (got, want):
        shake(trainer.model)
    losses = [t.compute_loss(t.model, collated(t)) for t in (got, want)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert losses[1].item() != LOG2
    assert_same_gradients(gradients(got, losses[0]), gradients(want, losses[1]))
    for trainer in (got, want):
        trainer._averages("train"), trainer._averages("eval")
        trainer.train()
    assert_same_history(got, want)
    assert "displacement/chosen" in history(got)[0]


def test_lists_of_different_lengths(images, tmp_path):
    lists = [[images[0]] * 2, [images[0], images[1], images[0]]]
    rows = [row("image", [items[0]], *PAIRS[i], image_list=items) for i, items in enumerate(lists)]
    got = ahead("lpoi", tmp_path, rows, name="Qwen2-VL")
    want = on_the_fly("lpoi", tmp_path, rows, name="Qwen2-VL")
    assert [len(entry["logps"]) for entry in lines(tmp_path / "cache")] == [3, 4]
    torch.testing.assert_close(collated(got)["ref_sums"], want.reference_scores(collated(want)).sums)


@pytest.mark.parametrize("kind", ["adapter", "ref_model", "ref_model that is an adapter"])
def test_every_kind_of_reference(kind, tmp_path):
    """Steps move the policy, not what it is compared with."""

    def build(make):
        model, tokenizer = fresh()
        torch.manual_seed(1)
        if kind == "adapter":
            model = get_peft_model(model, lora(text=True))
            shake(model, 3, scale=0.1)
            return make("dpo", tmp_path, model=model, processor=tokenizer, peft=None, max_steps=3)
        other = fresh()[0]
        other = get_peft_model(other, lora(text=True)) if "adapter" in kind else other
        shake(other, 4, scale=0.05)
        return make("dpo", tmp_path, ref_model=other, max_steps=3)

    got, want = build(ahead), build(on_the_fly)
    torch.testing.assert_close(collated(got)["ref_sums"], want.reference_scores(collated(want)).sums)
    got.train(), want.train()
    assert_same_history(got, want)
    assert (losses_of(got)[0] == LOG2) == (kind == "adapter")
    build(ahead)
    assert len(lines(tmp_path / "cache")) == 8  # the second trainer found them all


def test_the_reference_never_runs_while_training(images, tmp_path):
    passes, data = [], Dataset.from_list(image_rows(images, 2))
    more = {"eval_dataset": data, "eval_strategy": "steps", "eval_steps": 2, "layout": "separate", "name": "Qwen2-VL"}
    trainer = ahead("dpo", tmp_path, image_rows(images, 4), **more)
    trainer.model.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
    trainer.reference_scores = None
    trainer.train()
    assert len(passes) == 3  # two steps and one batch of evaluation
    assert isinstance(trainer._reference(collated(trainer)), ReferenceSums)


@pytest.mark.parametrize("method", ["dpo", "leanpo"])
def test_a_reference_pass_outside_of_a_step_leaves_nothing_behind(method, images, tmp_path):
    """Frozen vision features are kept from reference to policy pass of one step, and for no other batch."""
    make = ahead if method == "dpo" else on_the_fly
    trainer = make(method, tmp_path, image_rows(images, 4), name="Qwen2-VL")
    first, second = (trainer.data_collator([trainer.train_dataset[i] for i in at]) for at in ([0, 1], [2, 3]))
    want = trainer.compute_loss(trainer.model, second, return_outputs=True)[1].logps
    trainer.reference_scores(first)
    assert torch.equal(trainer.compute_loss(trainer.model, second, return_outputs=True)[1].logps, want)


# --- what is computed again -----------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def test_an_interrupted_run_continues_where_it_stopped(tmp_path):
    model, tokenizer = fresh()
    passes = []

    def kill(*_):
        passes.append(1)
        if len(passes) == 3:
            raise Killed

    model.get_input_embeddings().register_forward_hook(kill)
    with pytest.raises(Killed):
        ahead("dpo", tmp_path, model=model, processor=tokenizer, layout="separate")
    done = lines(tmp_path / "cache")
    assert len(done) == 4  # two batches of two
    trainer = ahead("dpo", tmp_path)
    assert len(lines(tmp_path / "cache")) == 8 and len({e["row"] for e in lines(tmp_path / "cache")}) == 8
    whole = ahead("dpo", tmp_path, cache="other")
    torch.testing.assert_close(collated(trainer)["ref_sums"], collated(whole)["ref_sums"])


@pytest.mark.parametrize("tail", [b"", b'{"row": "12', b"\x00\xff\x00", b'{"row": "1"}\n[]'])
def test_a_line_that_is_not_complete(tail, tmp_path, caplog):
    first = ahead("dpo", tmp_path)
    (shard,) = (tmp_path / "cache").glob("*.jsonl")
    kept = shard.read_bytes()
    last = kept.splitlines()[-1]
    shard.write_bytes(kept[: -len(last) // 2] + tail)
    second = ahead("dpo", tmp_path)
    new = max((tmp_path / "cache").glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    assert new != shard and [e["row"] for e in map(json.loads, new.read_text().splitlines())] == [
        json.loads(last)["row"]
    ]
    assert "line 8 is not complete" in caplog.text
    torch.testing.assert_close(collated(second)["ref_sums"], collated(first)["ref_sums"])


def edit(number, **more):
    return lambda rows: [row_ | more if i == number else row_ for i, row_ in enumerate(rows)]


SPEECH = [{"role": "assistant", "content": [{"type": "text", "text": "something else."}]}]
ROWS = {  # what happens to the rows -> how many are computed again
    "nothing": (lambda rows: rows, 0),
    "another order": (lambda rows: rows[::-1], 0),
    "one less": (lambda rows: rows[1:], 0),
    "an id": (edit(1, id="new", source="somewhere"), 0),
    "a column that DPO does not read": (edit(1, critical_box=[1, 2, 3, 4]), 0),
    "a response": (edit(1, rejected=SPEECH), 1),
    "one more": (lambda rows: [*rows, *text_rows(1)], 1),
    "a row twice": (lambda rows: [*rows, rows[0] | {"id": "twin"}], 0),
}


@pytest.mark.parametrize("change", ROWS)
def test_a_changed_row(change, own_images, tmp_path):
    rows = image_rows(own_images)
    ahead("dpo", tmp_path, rows, name="Qwen2-VL")
    edited, again = ROWS[change]
    trainer = ahead("dpo", tmp_path, edited(rows), name="Qwen2-VL")
    assert len(lines(tmp_path / "cache")) == 4 + again
    batch = collated(trainer)
    torch.testing.assert_close(batch["ref_sums"], trainer.reference_scores(batch).sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["path", "frames", "bytes"])
def test_a_changed_media_file(form, own_images, tmp_path):
    def rows():
        if form == "frames":
            return [row("video", [{"video": [own_images[i], own_images[i]]}], *PAIRS[i]) for i in range(4)]
        if form == "bytes":
            return [row("image", [{"bytes": open(p, "rb").read()}], *PAIRS[i]) for i, p in enumerate(own_images)]
        return image_rows(own_images)

    before = ahead("dpo", tmp_path, rows(), name="Qwen2-VL")
    write_image(tmp_path / "2.png", (112, 56), 5)
    after = ahead("dpo", tmp_path, rows(), name="Qwen2-VL")
    assert len(lines(tmp_path / "cache")) == 5
    same = [torch.equal(*(collated(t)["ref_sums"].view(4, 2)[i] for t in (before, after))) for i in range(4)]
    assert same == [True, True, False, True]


def other_weights(more):
    more["model"].lm_head.weight.data[0, 0] += 1e-3


def other_template(more):
    more["processor"].chat_template += "\n"


def other_pixels(more):
    more["processor"].image_processor.image_mean = [0.5, 0.5, 0.5]


CONTEXT = {  # what changes, between two runs of four rows -> how many are computed again
    "weights": (other_weights, {}, 4),
    "chat template": (other_template, {}, 4),
    "image processor": (other_pixels, {}, 4),
    "max_pixels": (None, {"max_pixels": 28 * 28}, 4),
    "num_frames": (None, {"num_frames": 3}, 4),
    "precision": (None, {"bf16": True}, 4),
    "batch size": (None, {"precompute_ref_batch_size": 3, "per_device_train_batch_size": 1}, 0),
    "max_length": (None, {"max_length": 4000}, 0),
    "learning rate, beta": (None, {"learning_rate": 1e-6, "beta": 0.3}, 0),
    "adapter": (None, {"peft": None, "peft_config": lora(r=2, modules_to_save=["lm_head"])}, 0),
    "no adapter": (None, {"peft": None}, 0),
}


@pytest.mark.parametrize("change", CONTEXT)
def test_changed_settings(change, own_images, tmp_path):
    ahead("dpo", tmp_path, image_rows(own_images), name="Qwen2-VL")
    apply, more, again = CONTEXT[change]
    model, processor = fresh("Qwen2-VL")
    more = {"model": model, "processor": processor, "name": "Qwen2-VL", **more}
    if apply:
        apply(more)
    trainer = ahead("dpo", tmp_path, image_rows(own_images), **more)
    assert len(lines(tmp_path / "cache")) == 4 + again
    if "bf16" not in more:
        batch = collated(trainer)
        torch.testing.assert_close(batch["ref_sums"], trainer.reference_scores(batch).sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("knob", "value"), [("num_images", 3), ("visual_prompt", False)])
def test_changed_lists(knob, value, own_images, tmp_path):
    rows = image_rows(own_images, critical_box=[4, 4, 40, 30])
    for more in ({}, {}, {knob: value}):
        ahead("lpoi", tmp_path, rows, name="Qwen2-VL", **more)
    assert len(lines(tmp_path / "cache")) == 8
    ahead("lpoi", tmp_path, edit(0, critical_box=[4, 4, 41, 30])(rows), name="Qwen2-VL")
    assert len(lines(tmp_path / "cache")) == 9


def test_a_trained_adapter_as_reference(tmp_path):
    """Its weights and its scale are the reference's."""
    for seed, alpha in [(3, 8), (3, 8), (4, 8), (3, 16)]:
        model, tokenizer = fresh()
        torch.manual_seed(0)
        model = get_peft_model(model, lora(text=True, lora_alpha=alpha))
        shake(model, seed, scale=0.1)
        trainer = ahead("dpo", tmp_path, model=model, processor=tokenizer, peft=None)
        batch = collated(trainer)
        torch.testing.assert_close(batch["ref_sums"], trainer.reference_scores(batch).sums)
    assert len(lines(tmp_path / "cache")) == 3 * 8


# --- full fine-tuning -----------------------------------------------------------------------------------------------


def test_full_fine_tuning_holds_one_model(tmp_path):
    model, tokenizer = fresh()
    gc.collect()
    gc.freeze()
    try:
        got = ahead("dpo", tmp_path, model=model, processor=tokenizer, peft=None, max_steps=3, learning_rate=1e-3)
        gc.collect()
        assert got.ref_model is None and got.model is model
        assert not any(type(o) is T.Qwen2ForCausalLM for o in gc.get_objects())  # none but the one from before
    finally:
        gc.unfreeze()
    want = on_the_fly("dpo", tmp_path, peft=None, max_steps=3, learning_rate=1e-3)
    got.train(), want.train()
    assert losses_of(got)[0] == LOG2 and losses_of(got)[2] != LOG2
    assert_same_history(got, want)


def test_full_fine_tuning_of_a_model_by_its_path(tmp_path):
    for part in fresh():
        part.save_pretrained(tmp_path / "model")
    got = ahead("dpo", tmp_path, model=str(tmp_path / "model"), processor=fresh()[1], peft=None, learning_rate=1e-3)
    assert got.ref_model is None
    got.train()
    assert losses_of(got)[0] == LOG2
    torch.testing.assert_close(collated(got)["ref_sums"], collated(ahead("dpo", tmp_path, cache="other"))["ref_sums"])


@pytest.mark.parametrize("kept", [True, False], ids=["cache", "no cache"])
def test_resuming_compares_with_the_initial_model(kept, tmp_path):
    more = {"peft": None, "learning_rate": 1e-3, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = ahead("dpo", tmp_path, **more)
    straight.train()
    if not kept:
        shutil.rmtree(tmp_path / "cache")
    resumed = ahead("dpo", tmp_path, **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses_of(resumed) == pytest.approx(losses_of(straight), rel=1e-5)
    assert losses_of(straight)[3] != LOG2
    assert len(lines(tmp_path / "cache")) == 8


def test_full_fine_tuning_evaluates_other_rows_only_before_training(tmp_path):
    other = Dataset.from_list(text_rows(2, start=3))
    trainer = ahead("dpo", tmp_path, text_rows(2), peft=None, eval_dataset=Dataset.from_list(text_rows(4)))
    assert trainer.evaluate(other)["eval_loss"] == LOG2
    trainer.train()
    with pytest.raises(ValueError, match="after training has started"):
        trainer.evaluate(other)
    with pytest.raises(ValueError, match="holds no reference model"):
        trainer.reference_scores(collated(trainer))
    assert trainer.evaluate()["eval_loss"] != LOG2


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_sums_stay_with_the_trainer_that_made_them(tmp_path):
    """Its own rows keep theirs; those of an earlier trainer get the sums of the later one's reference."""
    first = ahead("dpo", tmp_path, eval_dataset=Dataset.from_list(text_rows(3)))
    shake(first.model)
    own = first.eval_dataset
    assert first._prepare_eval(own, first.processing_class, first.args) is own
    assert first._precompute_ref_logps(own, "eval", 2) is own
    part = first.evaluate(own.select([0, 1, 2]))
    assert first.evaluate(own)["eval_loss"] == first.evaluate()["eval_loss"] == part["eval_loss"] != LOG2
    reference = copy.deepcopy(fresh()[0])
    reference.lm_head.weight.data *= 2
    later = ahead("dpo", tmp_path, own.select([2, 0]), ref_model=reference)
    assert later.train_dataset["_row_index"] == [0, 1]
    sums = later.reference_scores(collated(later)).sums.view(2, 2)
    torch.testing.assert_close(torch.tensor(later.train_dataset["_ref_sums"][:]), sums, rtol=1e-5, atol=1e-5)
    assert ((torch.tensor(own.select([2, 0])["_ref_sums"][:]) - sums).abs() > 0.05).all()


def test_evaluation(images, tmp_path):
    """Sets that were given, several of them, and rows that come later."""
    sets = {"a": Dataset.from_list(image_rows(images, 2)), "b": Dataset.from_list(text_rows(3))}
    later = Dataset.from_list(text_rows(2, start=4))
    metrics = []
    for make in (ahead, on_the_fly):
        trainer = make("dpo", tmp_path, image_rows(images), name="Qwen2-VL", eval_dataset=sets)
        trainer.train()
        found = trainer.evaluate() | trainer.evaluate(later, metric_key_prefix="later")
        metrics.append({k: v for k, v in found.items() if not k.endswith(("runtime", "per_second"))})
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4, abs=1e-5)
    assert {"eval_a_loss", "eval_b_loss", "later_loss"} <= set(metrics[0])
    assert len(lines(tmp_path / "cache")) == 4 + 3 + 2  # "a" is part of the training set


def test_rows_that_another_trainer_prepared(tmp_path):
    first = ahead("dpo", tmp_path)
    model, tokenizer = fresh()
    model.lm_head.weight.data[0] += 0.1
    second = ahead("dpo", tmp_path, first.train_dataset, model=model, processor=tokenizer)
    batch = collated(second)
    assert not torch.allclose(batch["ref_sums"], collated(first)["ref_sums"])
    torch.testing.assert_close(batch["ref_sums"], second.reference_scores(batch).sums)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_streams(tmp_path):
    stream = Dataset.from_list(text_rows()).to_iterable_dataset()
    with pytest.raises(ValueError, match="train rows are an IterableDataset"):
        ahead("dpo", tmp_path, stream)
    with pytest.raises(ValueError, match="eval rows are an IterableDataset"):
        ahead("dpo", tmp_path, eval_dataset=stream)


def test_a_collator_of_unknown_settings(tmp_path):
    with pytest.raises(ValueError, match="own collator"):
        ahead("dpo", tmp_path, data_collator=default_collate)


def test_a_reference_that_moves(tmp_path):
    with pytest.raises(ValueError, match="sync_ref_model"):
        config("dpo", tmp_path, sync_ref_model=True, **AHEAD)


@pytest.mark.parametrize("method", ["leanpo", "rrpo"])
def test_methods_that_cannot(method, tmp_path):
    reason = {"leanpo": "no reference model", "rrpo": "whole next-token distributions"}[method]
    for knobs in (AHEAD, {"precompute_ref_batch_size": 2}, {"precompute_cache_dir": "x"}):
        with pytest.raises(ValueError, match=reason):
            config(method, tmp_path, **knobs)


def test_a_reference_without_finite_log_probs(tmp_path):
    broken = copy.deepcopy(fresh()[0])
    broken.lm_head.weight.data[:] = math.nan
    with pytest.raises(ValueError, match=r"not finite for: row 0 \(id 't0'\)"):
        ahead("dpo", tmp_path, ref_model=broken)
    assert not lines(tmp_path / "cache")


def test_rows_without_reference_log_probs(tmp_path):
    trainer = ahead("dpo", tmp_path)
    with pytest.raises(ValueError, match="carry no precomputed"):
        trainer.predict(Dataset.from_list(text_rows(2)))
