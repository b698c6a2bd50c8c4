"""A given adapter, of whatever kind: its reference is an exact copy of it, and what the user froze stays frozen."""

import math

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, VeraConfig, get_peft_model
from step_kit import Gradients, losses_of, snapshot
from trainer_kit import collated, fresh, image_rows, lora, shake, text_rows, trainable, trainer_of

from trl_vpo.training.run import freeze_vision

LOG2 = pytest.approx(math.log(2), abs=1e-6)
FEED_FORWARD = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
FACTORS = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
KINDS = {
    "LoRA": lora(text=True),
    "LoRA on the embeddings": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "single tokens": lora(text=True, trainable_token_indices=[40, 60, 300]),
    "IA3": IA3Config(task_type="CAUSAL_LM", **FEED_FORWARD),
    "LoHa": LoHaConfig(task_type="CAUSAL_LM", **FACTORS),
    "LoKr": LoKrConfig(task_type="CAUSAL_LM", **FACTORS),
    "VeRA": VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
}


def given(config, scale=0.3):
    """A PeftModel whose adapter was trained before, and its tokenizer."""
    model, tokenizer = fresh()
    model = get_peft_model(model, config)
    shake(model, 3, scale)
    return {"model": model, "processor": tokenizer, "peft": None}


def sums(trainer):
    """Log-probs of all responses: the policy's, the reference's, and those of the base under the adapter."""
    with torch.no_grad():
        batch = collated(trainer)
        policy, reference = trainer.concatenated_forward(trainer.model, batch), trainer.reference_scores(batch)
        with trainer.model.disable_adapter():
            base = trainer.concatenated_forward(trainer.model, batch)
    return policy.sums, reference.sums, base.sums


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_of_a_given_adapter_is_that_adapter(kind, tmp_path):
    """Equal before the first step, to the bit; not the base; and training moves the policy only."""
    scale = 3.0 if kind == "VeRA" else 0.3  # its vectors only scale small matrices that are fixed
    trainer = trainer_of("dpo", tmp_path, max_steps=3, **given(KINDS[kind], scale))
    policy, reference, base = sums(trainer)
    assert (policy - reference).abs().max() == 0
    assert (base - reference).abs().max() > 0.05
    trainer.train()
    assert losses_of(trainer)[0] == LOG2 and losses_of(trainer)[2] != LOG2
    assert losses_of(trainer, "displacement/chosen")[0] == losses_of(trainer, "displacement/rejected")[0] == 0
    moved, after, _ = sums(trainer)
    assert torch.equal(after, reference) and (moved - policy).abs().max() > 1e-3


def assert_only_these_train(trainer, names, start, watch, evaluates):
    """Three steps, perhaps with an evaluation before them, and one behind them."""
    if evaluates:
        trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert set(trainable(trainer.model)) == names and [set(grads) for grads in watch.steps] == [names] * 3
    end = snapshot(trainer.model, "lora_")
    assert {name for name in start if not torch.equal(end[name], start[name])} == names


@pytest.mark.parametrize("before", ["nothing", "evaluate", "precompute"])
def test_one_half_of_an_adapter_that_is_frozen(before, tmp_path):
    """LoRA-FA: the matrices A stay as they are, whatever ran the reference before the first step."""
    init = given(lora(text=True))
    for name, weight in init["model"].named_parameters():
        weight.requires_grad_("lora_B" in name)
    start, names = snapshot(init["model"], "lora_"), set(trainable(init["model"]))
    more = {"eval_dataset": Dataset.from_list(text_rows(2)), "precompute_ref_log_probs": before == "precompute"}
    trainer = trainer_of("dpo", tmp_path, max_steps=3, callbacks=[watch := Gradients()], **init, **more)
    assert_only_these_train(trainer, names, start, watch, evaluates=before == "evaluate")


EVERYWHERE = r".*\.(q|k|v|o|gate|up|down|out)_proj|.*\.(qkv|fc1|fc2|proj)"


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_vision_tower_that_is_frozen(evaluated, images, tmp_path):
    """A new LoRA on tower and language model; the tower's part is frozen before training, and stays so."""
    more = {"peft": None, "peft_config": lora(target_modules=EVERYWHERE), "callbacks": [watch := Gradients()]}
    more["eval_dataset"] = Dataset.from_list(image_rows(images, 2))
    trainer = trainer_of("dpo", tmp_path, image_rows(images, 4), name="Qwen2-VL", max_steps=3, **more)
    everything = set(trainable(trainer.model))
    freeze_vision(trainer.model)
    shake(trainer.model)
    start, names = snapshot(trainer.model, "lora_"), set(trainable(trainer.model))
    assert names < everything and all("visual" in name for name in everything - names)
    assert_only_these_train(trainer, names, start, watch, evaluates=evaluated)
