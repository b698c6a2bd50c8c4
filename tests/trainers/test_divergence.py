"""`eval_divergence`: displacement and KL of every method, against the model without its adapter."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from slow_kit import slow_logits
from trainer_kit import METHODS, TEXT_METHODS, fresh, image_rows, shake, text_rows, trainer_of

from trl_vpo.errors import RecipeError

NAMES = [f"eval_{what}/{side}" for what in ("displacement", "kl") for side in ("chosen", "rejected")]


def by_hand(trainer):
    """The same from whole logits, branch by branch."""
    sums = dict.fromkeys(NAMES, 0.0)
    trees = [trainer.data_collator.encode(example) for example in trainer.eval_dataset]
    for tree in trees:
        for side, branch in zip(("chosen", "rejected"), tree.branches):
            trunk, ids = tree.trunks[branch.trunk], torch.tensor(branch.ids)
            with torch.no_grad():
                policy = slow_logits(trainer.model, trunk, branch).log_softmax(-1)
                with trainer.model.disable_adapter():
                    base = slow_logits(trainer.model, trunk, branch).log_softmax(-1)
            moved = (policy - base).gather(-1, ids[:, None]).sum()
            sums[f"eval_displacement/{side}"] += moved.item() / len(trees)
            sums[f"eval_kl/{side}"] += (base.exp() * (base - policy)).sum().item() / len(trees)
    return sums


@pytest.mark.parametrize("method", METHODS)
def test_every_method_logs_the_same_divergence(method, images, tmp_path):
    box = {"critical_box": [4, 8, 30, 40]} if method == "lpoi" else {}
    name, rows = ("text", text_rows(3)) if method in TEXT_METHODS else ("Qwen2-VL", image_rows(images, 3, **box))
    data = Dataset.from_list(rows)
    more = {"eval_divergence": True, "per_device_eval_batch_size": 2}
    trainer = trainer_of(method, tmp_path, rows, name=name, eval_dataset=data, **more)
    shake(trainer.model, scale=0.1)
    metrics, want = trainer.evaluate(), by_hand(trainer)
    assert want["eval_kl/chosen"] > 0.01
    for key in NAMES:
        assert metrics[key] == pytest.approx(want[key], rel=2e-4, abs=2e-5), key
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert steps and all(("kl/chosen" in entry) == trainer.needs_kl for entry in steps)  # trains as without it


def test_divergence_is_measured_against_a_given_adapter(tmp_path):
    """What training begins with is the reference, also where the method has none."""
    first = trainer_of("leanpo", tmp_path / "first", learning_rate=1e-2)
    first.train()
    first.save_model(tmp_path / "adapter")
    model = PeftModel.from_pretrained(fresh()[0], tmp_path / "adapter", is_trainable=True)
    data = Dataset.from_list(text_rows(2))
    trainer = trainer_of("leanpo", tmp_path, model=model, peft=None, eval_dataset=data, eval_divergence=True)
    assert trainer.evaluate()["eval_kl/chosen"] == pytest.approx(0.0, abs=1e-6)
    shake(trainer.model)
    assert trainer.evaluate()["eval_kl/chosen"] > 1e-3


def test_divergence_needs_a_reference(tmp_path):
    with pytest.raises(RecipeError, match="eval_divergence: no reference is held in this full fine-tuning"):
        trainer_of("leanpo", tmp_path, peft=None, eval_divergence=True)
