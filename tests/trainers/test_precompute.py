"""`precompute_ref_log_probs`: the same numbers as with a pass on the fly."""

import copy
import gc
import math
import shutil

import pytest
import torch
import transformers as T
from datasets import Dataset
from helpers import row, write_clip
from peft import get_peft_model
from precompute_kit import AHEAD, ahead, lines, on_the_fly
from step_kit import assert_same_gradients, gradients, history, losses_of
from torch.utils.data import default_collate
from trainer_kit import PAIRS, collated, config, fresh, image_rows, lora, shake, text_rows

from trl_vpo.forward.scoring import ReferenceSums
from trl_vpo.trainers.reference import loss_reference

LOG2 = pytest.approx(math.log(2), abs=1e-6)


def assert_same_history(got, want):
    assert len(history(got)) == len(history(want)) > 0
    for a, b in zip(history(got), history(want)):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def rows_of(kind, images, folder):
    if kind == "text":
        return text_rows(6)
    clips = [write_clip(folder / f"{i}.mp4", seed=i) for i in range(2)]
    videos = [row("video", [clips[i % 2]], *PAIRS[i], id=f"v{i}") for i in range(3)]
    if kind == "video":
        return videos
    if kind == "mixed":
        return [{"images": None, "videos": None} | r for r in (*videos, *image_rows(images, 2), *text_rows(2))]
    if kind == "lists":  # of different lengths: two and three images given, and five drawn from a box
        given = [image_rows(images, 1)[0] | {"image_list": items} for items in ([images[0]] * 2, images)]
        return [{"critical_box": None, **r} for r in given] + image_rows(images, 2, critical_box=[4, 4, 40, 30])
    return image_rows(images, 4)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("dpo", "text"),
        ("dpo", "image"),
        ("dpo", "video"),
        ("dpo", "mixed"),
        ("lpoi", "lists"),
        ("mdpo", "image"),
        ("symmpo", "image"),
    ],
)
def test_a_run_is_that_with_a_pass_on_the_fly(method, kind, images, tmp_path):
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
    assert isinstance(loss_reference(trainer, collated(trainer)), ReferenceSums)


@pytest.mark.parametrize("method", ["dpo", "leanpo"])
def test_a_reference_pass_outside_of_a_step_keeps_nothing(method, images, tmp_path):
    """Frozen vision features are kept from reference to policy pass of one step, and for no other batch."""
    make = ahead if method == "dpo" else on_the_fly
    trainer = make(method, tmp_path, image_rows(images, 4), name="Qwen2-VL")
    first, second = (trainer.data_collator([trainer.train_dataset[i] for i in at]) for at in ([0, 1], [2, 3]))
    want = trainer.compute_loss(trainer.model, second, return_outputs=True)[1].logps
    trainer.reference_scores(first)
    assert torch.equal(trainer.compute_loss(trainer.model, second, return_outputs=True)[1].logps, want)


def test_full_fine_tuning_holds_one_model(tmp_path):
    model, tokenizer = fresh()
    gc.collect()
    gc.freeze()
    got = ahead("dpo", tmp_path, model=model, processor=tokenizer, peft=None, max_steps=3, learning_rate=1e-3)
    gc.collect()
    assert got.ref_model is None and got.model is model
    assert not any(type(o) is T.Qwen2ForCausalLM for o in gc.get_objects())  # none but the one from before
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


def test_full_fine_tuning_evaluates_new_rows_before_training(tmp_path):
    other = Dataset.from_list(text_rows(2, start=3))
    trainer = ahead("dpo", tmp_path, text_rows(2), peft=None, eval_dataset=Dataset.from_list(text_rows(4)))
    assert trainer.evaluate(other)["eval_loss"] == LOG2
    trainer.train()
    with pytest.raises(ValueError, match="after training has started"):
        trainer.evaluate(other)
    with pytest.raises(ValueError, match="has no reference model at this point"):
        trainer.reference_scores(collated(trainer))
    assert trainer.evaluate()["eval_loss"] != LOG2


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
        values = trainer.evaluate() | trainer.evaluate(later, metric_key_prefix="later")
        metrics.append({k: v for k, v in values.items() if not k.endswith(("runtime", "per_second"))})
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4, abs=1e-5)
    assert {"eval_a_loss", "eval_b_loss", "later_loss"} <= set(metrics[0])
    assert len(lines(tmp_path / "cache")) == 4 + 3 + 2  # "a" is part of the training set


class Drawn:
    """A transform that draws: each access asks another question."""

    drawn = 0

    def __call__(self, rows):
        self.drawn += 1
        return rows | {"prompt": [[{"role": "user", "content": f"Question {self.drawn}?"}] for _ in rows["prompt"]]}


def test_what_cannot_be_precomputed(tmp_path):
    stream = Dataset.from_list(text_rows()).to_iterable_dataset()
    with pytest.raises(ValueError, match="train rows are an IterableDataset"):
        ahead("dpo", tmp_path, stream)
    with pytest.raises(ValueError, match="eval rows are an IterableDataset"):
        ahead("dpo", tmp_path, eval_dataset=stream)
    with pytest.raises(ValueError, match="own collator"):
        ahead("dpo", tmp_path, data_collator=default_collate)
    with pytest.raises(ValueError, match="sync_ref_model"):
        config("dpo", tmp_path, sync_ref_model=True, **AHEAD)
    with pytest.raises(ValueError, match="the transform of the train rows gives other rows each time"):
        ahead("dpo", tmp_path, Dataset.from_list(text_rows(2)).with_transform(Drawn()))
    trainer = ahead("dpo", tmp_path)
    with pytest.raises(ValueError, match="carry no precomputed"):
        trainer.predict(Dataset.from_list(text_rows(2)))


CANNOT = dict.fromkeys(["leanpo", "simpo"], "no reference model") | {"ddpo": "log-probs of each token"}
CANNOT |= dict.fromkeys(["rrpo", "tdpo", "dpa"], "whole next-token distributions")


@pytest.mark.parametrize(("method", "reason"), CANNOT.items())
def test_methods_that_cannot(method, reason, tmp_path):
    for options in (AHEAD, {"precompute_ref_batch_size": 2}, {"precompute_cache_dir": "x"}):
        with pytest.raises(ValueError, match=reason):
            config(method, tmp_path, **options)


def test_a_reference_without_finite_log_probs(tmp_path):
    broken = fresh()[0]
    broken.lm_head.weight.data[:] = math.nan
    with pytest.raises(ValueError, match=r"not finite for: row 0 \(id 't0'\)"):
        ahead("dpo", tmp_path, ref_model=broken)
    assert not lines(tmp_path / "cache")
