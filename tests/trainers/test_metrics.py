"""The log: exact averages, whatever the micro-batches, the lengths and the evaluation's last batch."""

import pytest
import torch
from datasets import Dataset
from slow_kit import slow_logits
from step_kit import history, tokens_read
from trainer_kit import METHODS, TEXT_METHODS, collated, image_rows, shake, text_rows, trainer_of

TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}

WEIGHTS = (1.0, 0.5, None, 2.0, 0.0, 3.0, None, 1.5)  # of the rows


def entries(trainer, key="entropy"):
    return [entry for entry in trainer.state.log_history if key in entry]


def rows_for(method, images):
    if method in TEXT_METHODS:
        return "text", [r | {"weight": WEIGHTS[i]} for i, r in enumerate(text_rows(8))]
    rows = image_rows(images, 8)
    for i, r in enumerate(rows):
        r |= {"image_list": images[: 2 + i % 2 * (method == "lpoi")], "images": None, "critical_box": None}
        r |= {"weight": WEIGHTS[i]}
    return "Qwen2-VL", rows


@pytest.mark.parametrize("method", METHODS)
def test_seven_rows_are_one_step_however_they_are_cut(method, images, tmp_path):
    """Loss, gradient norm and every metric of two steps: one batch of seven, micro-batches of 2, 2, 2 and 1."""
    name, rows = rows_for(method, images)
    runs = []
    for size, steps in ((7, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = trainer_of(method, tmp_path, rows[:7], name=name, seed=1, **sizes)
        shake(trainer.model)
        trainer.train()
        runs.append(entries(trainer))
    assert len(runs[0]) == len(runs[1]) == 2
    for step, (want, got) in enumerate(zip(*runs)):
        assert set(got) == set(want) >= {"loss", "grad_norm", "num_tokens", "rewards/chosen"}
        close = [{"rel": 1e-5, "abs": 1e-5}, {"rel": 2e-3, "abs": 2e-4}][step]  # Adam's first step blows rounding up
        for key in want:
            assert got[key] == pytest.approx(want[key], **close), key


def test_leanpos_nll_is_a_mean_over_the_tokens_of_a_step(tmp_path):
    """By hand, with responses of 3 to 19 tokens in micro-batches of one. The mean of the micro-batches' means is
    another number, by more than the comparison could miss."""
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trainer = trainer_of("leanpo", tmp_path, text_rows(4), max_steps=1, nll_weight=3.0, **sizes)
    teach(trainer)
    batch = collated(trainer)
    with torch.no_grad():
        scores = trainer.concatenated_forward(trainer.model, batch)
    sums, tokens = scores.sums[scores.chosen], scores.mask[scores.chosen].sum(-1)
    trainer.train()
    (logged,), summary = entries(trainer), trainer.state.log_history[-1]
    want = -(sums.sum() / tokens.sum()).item()
    assert abs(want + (sums / tokens).mean().item()) > 3e-3
    assert logged["loss/nll"] == pytest.approx(want, rel=1e-5)
    assert logged["loss"] == pytest.approx(logged["loss/preference"] + 3.0 * want, rel=1e-5)
    assert summary["train_loss"] == pytest.approx(logged["loss"], rel=1e-5)  # what the gradients came from


@pytest.mark.parametrize("method", TEXT_METHODS)
def test_token_means_are_over_all_tokens_of_an_interval(method, tmp_path):
    """Entropy, mean logits, accuracy and NLL by hand over two optimiser steps of ragged micro-batches."""
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "logging_steps": 2}
    trainer = trainer_of(method, tmp_path, peft=None, learning_rate=0.0, **sizes)
    teach(trainer)
    trainer.train()
    sums = {side: {"entropy": [], "mean": [], "top1": [], "nll": []} for side in ("chosen", "rejected")}
    for tree in (trainer.data_collator.encode(example) for example in trainer.train_dataset):
        for side, branch in zip(sums, tree.branches):
            with torch.no_grad():
                logits = slow_logits(trainer.model, tree.trunks[0], branch)
            logps, ids = logits.log_softmax(-1), torch.tensor(branch.ids)
            sums[side]["entropy"] += (-(logps.exp() * logps).sum(-1)).tolist()
            sums[side]["mean"] += logits.mean(-1).tolist()
            sums[side]["top1"] += (logits.argmax(-1) == ids).float().tolist()
            sums[side]["nll"] += (-logps.gather(-1, ids[:, None])[:, 0]).tolist()
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    want = {
        "entropy": mean(sums["chosen"]["entropy"] + sums["rejected"]["entropy"]),
        "logits/chosen": mean(sums["chosen"]["mean"]),
        "logits/rejected": mean(sums["rejected"]["mean"]),
        "mean_token_accuracy": mean(sums["chosen"]["top1"]),
    }
    if method in ("leanpo", "simpo"):
        want["loss/nll"] = mean(sums["chosen"]["nll"])
    assert 0 < want["mean_token_accuracy"] < 1
    (logged,) = entries(trainer)
    for key, value in want.items():
        assert logged[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def teach(trainer):
    """A few plain steps on the chosen responses, so that some tokens are the most likely ones."""
    batch = collated(trainer)
    params = [p for p in trainer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=0.01)
    for _ in range(15):
        scores = trainer.concatenated_forward(trainer.model, batch)
        (-scores.sums[scores.chosen].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_is_exact_over_an_incomplete_last_batch(method, images, tmp_path):
    """Five rows in batches of two are five rows in one batch."""
    name, rows = rows_for(method, images)
    got, want = {}, {}
    for size, into in ((2, got), (5, want)):
        data = Dataset.from_list(rows[:5])
        sizes = {"per_device_eval_batch_size": size}
        trainer = trainer_of(method, tmp_path, rows, name=name, eval_dataset=data, **sizes)
        shake(trainer.model)
        into |= trainer.evaluate()
    compared = {k for k in want if not k.endswith(("time", "per_second"))}
    assert compared >= {"eval_loss", "eval_rewards/accuracies", "eval_entropy", "eval_logps/chosen"}
    for key in compared:
        assert got[key] == pytest.approx(want[key], rel=1e-4, abs=2e-5), key


EPOCHS = {"max_steps": -1, "num_train_epochs": 3, "logging_strategy": "epoch"}
RUNS = {  # options, steps between evaluations, steps that are logged
    "epochs": (EPOCHS, 4, [4, 8, 12]),
    "training": ({"max_steps": 4, "logging_steps": 3}, 4, [3, 4]),
    "every step": ({"max_steps": 4, "logging_steps": 2}, 1, [2, 4]),
}


@pytest.mark.parametrize("kind", RUNS)
def test_evaluation_takes_nothing_from_the_log(kind, tmp_path):
    """Between two logs, and before one at the end of an epoch or of training: the log is that of a run without it."""
    options, every, steps = RUNS[kind]
    evaluation = {"eval_strategy": "steps", "eval_steps": every, "eval_dataset": Dataset.from_list(text_rows(2))}
    runs = []
    for more in ({}, evaluation):
        trainer = trainer_of("dpo", tmp_path, text_rows(8), **options, **more)
        trainer.train()
        runs.append([e for e in history(trainer) if "eval_loss" not in e])
    assert [e["step"] for e in entries(trainer, "eval_loss")] == [*range(every, max(steps) + 1, every)]
    if kind != "training":  # whose summary has the metrics of the last step
        assert set(trainer.state.log_history[-1]) == TIMES | {"epoch", "step"}
    want, got = runs
    assert got == [{k: pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in e.items()} for e in want]
    assert [e["step"] for e in got if "rewards/margins" in e] == steps
    tokens = {e["step"]: e["num_tokens"] for e in got if "num_tokens" in e}
    assert all(tokens[step] == tokens_read(trainer) * step / 4 for step in steps if step % 4 == 0)


def test_compute_metrics_gets_summed_log_probs_and_token_counts(tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        (chosen, rejected), (chosen_tokens, rejected_tokens) = prediction.predictions, prediction.label_ids
        return {"avg_margin": float((chosen / chosen_tokens - rejected / rejected_tokens).mean())}

    data = Dataset.from_list(text_rows(5))
    trainer = trainer_of("leanpo", tmp_path, eval_dataset=data, compute_metrics=compute_metrics)
    metrics = trainer.evaluate()
    batch = trainer._prepare_inputs(trainer.data_collator(list(data)))
    with torch.no_grad():
        scores = trainer.concatenated_forward(trainer.model, batch)
    (prediction,) = seen
    for got, side in zip(prediction.predictions, (scores.chosen, scores.rejected)):
        torch.testing.assert_close(torch.tensor(got), scores.sums[side], rtol=1e-5, atol=1e-5)
    for got, side in zip(prediction.label_ids, (scores.chosen, scores.rejected)):
        assert got.tolist() == scores.mask[side].sum(-1).tolist()
    average = scores.sums[scores.chosen] / scores.mask[scores.chosen].sum(-1)
    assert metrics["eval_logps/chosen_average"] == pytest.approx(average.mean().item(), rel=1e-5)
    assert metrics["eval_avg_margin"] == pytest.approx(metrics["eval_rewards/margins"] / trainer.beta, rel=1e-4)


def test_predict_reports_the_metrics_and_leaves_none_behind(tmp_path):
    data = Dataset.from_list(text_rows(3))
    trainer = trainer_of("dpo", tmp_path, eval_dataset=data)
    shake(trainer.model)
    want = trainer.evaluate()
    predicted = trainer.predict(trainer.train_dataset)
    assert len(predicted.predictions[0]) == 8
    assert predicted.metrics["test_rewards/margins"] != pytest.approx(want["eval_rewards/margins"])
    trainer.model.eval()
    trainer.compute_loss(trainer.model, collated(trainer))  # someone looks at a batch in between
    got = trainer.evaluate()
    assert {k: v for k, v in got.items() if "logps" in k} == {k: v for k, v in want.items() if "logps" in k}
