"""Collators, callbacks, optimizers, reports and best models: what `trl.DPOTrainer` takes, these trainers take."""

import pytest
import torch
from datasets import Dataset
from step_kit import losses_of, names_of
from trainer_kit import collated, fresh, text_rows, trainable, trainer_of
from transformers import TrainerCallback

from trl_vpo import PreferenceCollator


class Half(PreferenceCollator):
    """A collator of one's own: every batch loses its second half."""

    def __call__(self, examples):
        return super().__call__(examples[: len(examples) // 2])


def test_a_collator_of_ones_own(tmp_path):
    trainer = trainer_of("rrpo", tmp_path, data_collator=Half(fresh()[1], phrases=True), per_device_train_batch_size=4)
    assert isinstance(trainer.data_collator, Half)
    assert [len(names) for names in names_of(trainer)] == [2, 2]


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
    assert trainer.evaluate()["eval_n"] == 3
    assert [last for *_, last in seen] == [False, True] and all(losses for losses, *_ in seen)


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
