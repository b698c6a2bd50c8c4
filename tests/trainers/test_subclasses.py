"""A subclass that changes the loss trains and logs as the very same subclass of `trl.DPOTrainer` does."""

import dataclasses
from functools import partial

import pytest
import torch
import trl
from datasets import Dataset
from step_kit import losses_of
from trainer_kit import METHODS, QUIET, collated, fresh, lora, shake, text_rows, trainable, trainer_of

from trl_vpo.errors import NonFiniteLossError
from trl_vpo.training import resume
from trl_vpo.training.run_identity import describe_run


def penalty(trainer):
    return 3.0 * sum(p.square().sum() for p in trainable(trainer.model).values())


def changes(change):
    """A subclass of a trainer whose loss is `change(trainer, loss, num_items)`; `loss` computes the base's."""

    def kind(base):
        class Mine(base):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                loss = partial(super().compute_loss, model, inputs)
                return change(self, loss, num_items_in_batch)

        return Mine

    return kind


@changes
def adds(trainer, loss, _):
    mode, more = "train" if trainer.model.training else "eval", penalty(trainer)
    trainer._metrics[mode]["mine"].append(more.item() + len(trainer._metrics[mode]["mine"]))
    return loss() + 10 + more


@changes
def adds_by_count(trainer, loss, num_items):
    more = penalty(trainer)
    return loss(num_items_in_batch=num_items) + (more if num_items is None else more / num_items.sum())


swallows = changes(lambda trainer, loss, _: loss())
twice = changes(lambda trainer, loss, _: loss() + loss())
replaces = changes(lambda trainer, *_: penalty(trainer))


def doubles_the_step(base):
    class Mine(base):
        def training_step(self, *args, **kwargs):
            return super().training_step(*args, **kwargs) * 2

    return Mine


def logs_otherwise(base):
    class Mine(base):
        def log(self, logs, *args, **kwargs):
            super().log({k: v + 100 if k in ("loss", "eval_loss") else v for k, v in logs.items()}, *args, **kwargs)

    return Mine


KINDS = [swallows, adds, adds_by_count, twice, replaces, doubles_the_step, logs_otherwise]


def theirs_of(folder, kind, rows, **more):
    model, tokenizer = fresh()
    init = {"train_dataset": Dataset.from_list(rows), "eval_dataset": more.pop("eval_dataset", None)}
    args = trl.DPOConfig(str(folder), **{**QUIET, "max_length": None, **more})
    return kind(trl.DPOTrainer)(model, args=args, processing_class=tokenizer, peft_config=lora(text=True), **init)


def ours_of(folder, kind, rows, method="dpo", **more):
    return trainer_of(method, folder, rows, kind=kind(METHODS[method][1]), **more)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_loss_trains_and_logs_as_in_trl(kind, tmp_path):
    """An epoch of steps of four micro-batches and of two: the weights and all that both log."""
    more = {"optim": "sgd", "max_grad_norm": 0.0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    more |= {"train_sampling_strategy": "sequential", "eval_strategy": "steps", "eval_steps": 1}
    more |= {"eval_dataset": Dataset.from_list(text_rows(3))}
    trainers = ours_of(tmp_path, kind, text_rows(6), **more), theirs_of(tmp_path, kind, text_rows(6), **more)
    moved = []
    for trainer in trainers:
        shake(trainer.model)
        before = {k: p.detach().clone() for k, p in trainable(trainer.model).items()}
        trainer.train()
        moved.append(torch.cat([(p - before[k]).flatten() for k, p in trainable(trainer.model).items()]))
    got, want = moved
    assert want.norm() > 1e-3 and (got - want).norm() < 1e-4 * want.norm()
    ours, theirs = ([e for e in t.state.log_history if "train_runtime" not in e] for t in trainers)
    assert len(ours) == len(theirs) == 4
    for entry, other in zip(ours, theirs):
        shared = {k for k in other if k in ("loss", "eval_loss", "mine", "eval_mine", "grad_norm")}
        assert shared and {k: entry[k] for k in shared} == {k: pytest.approx(other[k], rel=1e-4) for k in shared}
    summaries = [t.state.log_history[-1]["train_loss"] for t in trainers]
    assert summaries[0] == pytest.approx(summaries[1], rel=1e-4)


def prefers_twice(base, terms=True):
    class Mine(base):
        def preference_loss(self, scores, reference, batch):
            out = super().preference_loss(scores, reference, batch)
            return dataclasses.replace(out, losses=2 * out.losses + 5, terms=out.terms if terms else {})

    return Mine


WINDOWS, STEPS = {"logging_steps": 2}, {"logging_steps": 1, "per_device_eval_batch_size": 5}
CHANGES = {  # method, subclass, what it makes of a loss, given the penalty; options
    "LeanPO adds": ("leanpo", adds, lambda loss, more: loss + 10 + more, WINDOWS),
    "RRPO adds": ("rrpo", adds, lambda loss, more: loss + 10 + more, WINDOWS),
    "prefers": ("leanpo", prefers_twice, lambda loss, _: 2 * loss + 5, STEPS),
    "prefers, no terms": ("leanpo", partial(prefers_twice, terms=False), lambda loss, _: 2 * loss + 5, STEPS),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_subclass_makes_of_a_loss_is_logged(change, tmp_path):
    """Exactly: with ragged micro-batches, in training and in an evaluation."""
    method, kind, expected, options = CHANGES[change]
    more = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "learning_rate": 0.0, **options}
    more |= {"eval_strategy": "steps", "eval_steps": 2}
    runs = []
    for each in (swallows, kind):
        trainer = ours_of(tmp_path, each, text_rows(7), method, eval_dataset=Dataset.from_list(text_rows(5)), **more)
        shake(trainer.model)
        added = penalty(trainer).item()
        trainer.train()
        runs.append(trainer.state.log_history)
    plain, changed = runs
    keys = [*["loss"] * (2 // options["logging_steps"]), "eval_loss", "train_loss"]
    assert len(plain) == len(changed) == len(keys)
    for a, b, key in zip(plain, changed, keys):
        assert b[key] == pytest.approx(expected(a[key], added), rel=1e-5)
        assert not [name for name in b if "pairwise" in name]
    weight, part = {"leanpo": (0.5, "loss/nll"), "rrpo": (0.01, "loss/kl")}[method]
    assert plain[0]["loss"] == pytest.approx(plain[0]["loss/preference"] + weight * plain[0][part], rel=1e-5)


@pytest.mark.parametrize("outputs", ["scores", "a dict", "replaced"])
def test_compute_metrics_goes_with_a_changed_loss(outputs, tmp_path):
    """Then the scores are asked for, too: those of ours, whatever the subclass returns beside its loss."""

    class Mine(METHODS["dpo"][1]):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            if outputs == "replaced":
                loss, scores = penalty(self) * 0 + 0.693147, None
            else:
                loss, scores = super().compute_loss(model, inputs, return_outputs=True)
            if outputs == "a dict":
                scores = {"mine": 1}
            return (loss + 10, scores) if return_outputs else loss + 10

    seen = lambda prediction: {"rows": len(prediction.predictions[0])}  # noqa: E731
    more = {"eval_dataset": Dataset.from_list(text_rows(3)), "compute_metrics": seen}
    trainer = trainer_of("dpo", tmp_path, text_rows(3), kind=Mine, **more)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(10.6931, abs=1e-4) and metrics["eval_rows"] == 3


def test_what_was_not_logged_yet_is_kept_in_a_checkpoint(tmp_path):
    """Logs every fourth step, a checkpoint after the third: losses and own metrics are those of an unbroken run."""

    def start(folder, steps):
        more = {"max_steps": 4, "logging_steps": 4, "save_strategy": "steps", "save_steps": 3}
        trainer = ours_of(tmp_path / folder, adds, text_rows(8), **more)
        shake(trainer.model)
        trainer.args.max_steps = steps
        return trainer

    logged = []
    for folder, runs in (("straight", [4]), ("broken", [3, 4])):
        for steps in runs:
            trainer = start(folder, steps)
            checkpoint = tmp_path / folder / "checkpoint-3" if len(runs) > 1 and steps == 4 else None
            resume.train(trainer, checkpoint, describe_run(trainer, "dpo", {"model_name_or_path": str(tmp_path)}))
        logged.append([{k: e[k] for k in ("step", "loss", "mine") if k in e} for e in trainer.state.log_history])
    assert logged[1][-2:] == logged[0] and set(logged[0][0]) == {"step", "loss", "mine"}
    assert losses_of(trainer)[-1] > 10


def test_the_references_log_probs_of_a_batch(tmp_path):
    """As `trl.DPOTrainer.compute_ref_log_probs` gives them: sums, of the model without its adapter."""
    trainer = trainer_of("dpo", tmp_path)
    shake(trainer.model)
    batch = collated(trainer, 3)
    with trainer.model.disable_adapter(), torch.no_grad():
        scores = trainer.concatenated_forward(trainer.model, batch)
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
    torch.testing.assert_close(chosen, scores.sums[batch["chosen"]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rejected, scores.sums[batch["rejected"]], rtol=1e-5, atol=1e-5)


def test_a_loss_of_a_subclass_that_is_not_finite_stops_the_run(tmp_path):
    """Before the optimizer's step, and with the rows of this batch."""

    class Ruined(METHODS["dpo"][1]):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss = super().compute_loss(model, inputs, return_outputs=False)
            return loss * float("nan") if self.state.global_step == 1 else loss

    options = {"max_steps": 4, "train_sampling_strategy": "sequential"}
    trainer = trainer_of("dpo", tmp_path, text_rows(), kind=Ruined, **options)
    with pytest.raises(NonFiniteLossError, match=r"at step 1 for: row 2 \(id 't2'\); row 3 \(id 't3'\)"):
        trainer.train()
    assert all(p.isfinite().all() for p in trainable(trainer.model).values())
