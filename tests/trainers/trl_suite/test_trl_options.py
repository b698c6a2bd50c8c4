"""The losses and knobs of `trl.DPOConfig` that TRL's DPO tests try: what works, and what is refused with a reason."""

import re
import sys
from types import ModuleType

import pytest
from peft import LoraConfig, PromptTuningConfig
from PIL import Image
from trl_standins import plain, typed
from trl_training import trainer_on, trains_all

OTHER_LOSSES = ["hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"]
OTHER_LOSSES += ["apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]


def test_the_sigmoid_loss(hub, tmp_path):
    trains_all(hub("Qwen2.5"), plain(), tmp_path, loss_type="sigmoid", f_divergence_type="reverse_kl")


@pytest.mark.parametrize("loss", OTHER_LOSSES)
def test_other_losses(loss, hub, tmp_path):
    with pytest.raises(ValueError, match=r"loss_type.*each trainer has one loss"):
        trainer_on(hub("Qwen2.5"), plain(), tmp_path, loss_type=loss, label_smoothing=1e-3 * (loss == "exo_pair"))


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, "loss_type.*one loss"),
        ({"use_weighting": True}, "use_weighting.*not implemented"),
        ({"ld_alpha": 0.5}, "ld_alpha.*not implemented"),
        ({"f_divergence_type": "forward_kl"}, "f_divergence_type.*reverse KL"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type.*reverse KL"),
        ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5}, "f_divergence_type.*reverse KL"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_variants_of_the_loss(knobs, reason, hub, tmp_path):
    with pytest.raises(ValueError, match=reason):
        trainer_on(hub("Qwen2.5"), plain(), tmp_path, **knobs)


# --- Liger --------------------------------------------------------------------------------------------------------


@pytest.fixture
def liger(monkeypatch):
    """A package in the place of liger-kernel, whose kernels need a GPU: the models and options it was called with."""
    calls, kernels = [], ModuleType("liger_kernel.transformers")
    kernels._apply_liger_kernel_to_instance = lambda model, **options: calls.append((type(model).__name__, options))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", kernels)
    for place in ("trl_vpo.trainers.config", "transformers.integrations.liger"):
        monkeypatch.setattr(f"{place}.is_liger_kernel_available", lambda: True)
    return calls


@pytest.mark.parametrize("peft_config", [None, LoraConfig()], ids=["full", "adapter"])
def test_ligers_layers(peft_config, liger, hub, tmp_path):
    """The head has a chunked kernel of our own, and Liger's loss would replace the forward that it needs."""
    trainer_on(hub("Qwen2.5"), plain(), tmp_path, use_liger_kernel=True, peft_config=peft_config).train()
    assert liger == [("Qwen2ForCausalLM", {"fused_linear_cross_entropy": False})]


def test_ligers_layers_of_a_vision_model(liger, images, hub, tmp_path):
    rows = typed([[Image.open(images[0])]] * 4)
    trainer_on(hub("Qwen2.5-VL"), rows, tmp_path, use_liger_kernel=True).train()
    assert liger == [("Qwen2_5_VLForConditionalGeneration", {"fused_linear_cross_entropy": False})]


def test_ligers_loss(liger, hub, tmp_path):
    with pytest.raises(ValueError, match=r"fused_linear_cross_entropy.*not supported"):
        more = {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}}
        trainer_on(hub("Qwen2.5"), plain(), tmp_path, **more)


def test_liger_is_not_there(hub, tmp_path):
    with pytest.raises(ValueError, match="pip install liger-kernel"):
        trainer_on(hub("Qwen2.5"), plain(), tmp_path, use_liger_kernel=True)


@pytest.mark.parametrize(
    ("peft_config", "reason"),
    [
        (LoraConfig(target_modules=["q_proj", "lm_head"]), "lm_head"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "virtual tokens"),
    ],
    ids=["head", "prompt"],
)
def test_adapters_that_liger_cannot_have(peft_config, reason, hub, tmp_path, liger):
    with pytest.raises(ValueError, match=re.escape(reason)):
        trainer_on(hub("Qwen2.5"), plain(), tmp_path, use_liger_kernel=True, peft_config=peft_config)
