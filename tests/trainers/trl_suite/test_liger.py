"""`use_liger_kernel`: Liger's layers, and our own LM head."""

import sys
from types import ModuleType

import pytest
from peft import LoraConfig
from PIL import Image
from trl_standins import plain, typed
from trl_training import trainer_on


@pytest.fixture
def liger(monkeypatch):
    """A package in the place of liger-kernel, whose kernels need a GPU: the models and options it was called with."""
    calls, kernels = [], ModuleType("liger_kernel.transformers")
    kernels._apply_liger_kernel_to_instance = lambda model, **options: calls.append((type(model).__name__, options))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", kernels)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
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
    with pytest.raises(ImportError, match="pip install liger-kernel"):
        trainer_on(hub("Qwen2.5"), plain(), tmp_path, use_liger_kernel=True).train()
