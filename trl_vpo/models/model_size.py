"""What a recipe would train and how many weights there are, from the model's config alone: no weights are loaded."""

from dataclasses import dataclass
from typing import Any

import transformers
from accelerate import init_empty_weights
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from trl_vpo.models.adapters import PROJECTOR, VISION, resolve_targets


@dataclass
class Adapted:
    """The modules that a LoRA config adapts."""

    modules: list[str]
    vision: list[str]  # those of them in the vision tower or the projector


@dataclass
class Sizes:
    """Numbers of parameters.

    Attributes:
        total, vision, trained: of the model and its adapter.
        quantized: of `total`, stored in 4 or 8 bits; `largest_quantized`: in the largest of their layers.
        head: of the LM head.
        layer: of the largest layer that is sharded as a unit.
        trains_tower: whether something before the projector is trained.
    """

    total: int
    vision: int
    trained: int
    quantized: int
    largest_quantized: int = 0
    head: int = 0
    layer: int = 0
    trains_tower: bool = False


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device, of the class that TRL would load."""
    architecture = getattr(transformers, (config.architectures or [""])[0], None) or AutoModelForCausalLM
    build = architecture.from_config if hasattr(architecture, "from_config") else architecture._from_config
    with init_empty_weights(include_buffers=True):
        return build(config)


def adapt(model: PreTrainedModel, peft_config: Any) -> tuple[nn.Module, Adapted]:
    """Put empty LoRA weights into an empty model.

    Raises:
        ValueError: the targets match no module; PEFT's message, or that of `resolve_targets`.
    """
    resolve_targets(peft_config, model)
    adapted = get_peft_model(model, peft_config, low_cpu_mem_usage=True)
    names = [n.removeprefix("base_model.model.") for n, m in adapted.named_modules() if hasattr(m, "lora_A")]
    return adapted, Adapted(names, [name for name in names if VISION.search(name)])


def sizes(model: nn.Module, *, quantized: bool, skip: list[str]) -> Sizes:
    """Count the parameters of an empty model, adapted or not.

    Args:
        model: on the meta device. Without an adapter all of its parameters are trained.
        quantized: whether linear layers are stored in 4 or 8 bits.
        skip: patterns of modules that are not.
    """
    named = [(name.removeprefix("base_model.model."), p) for name, p in model.named_parameters()]
    in_bits = [0]
    for name, module in model.named_modules() if quantized else ():
        name = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        if type(module) is nn.Linear and ".lora_" not in name and should_convert_module(name, skip):
            in_bits.append(module.weight.numel())
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    units = [module for module in base.modules() if type(module).__name__ in (base._no_split_modules or [])]
    head = base.get_output_embeddings()
    tower = (p for name, p in named if VISION.search(name) and not PROJECTOR.search(name))
    return Sizes(
        total=sum(p.numel() for _, p in named),
        vision=sum(p.numel() for name, p in named if VISION.search(name)),
        trained=sum(p.numel() for _, p in named if p.requires_grad),
        quantized=sum(in_bits),
        largest_quantized=max(in_bits),
        head=0 if head is None else head.weight.numel(),
        layer=max((sum(p.numel() for p in unit.parameters()) for unit in units), default=0),
        trains_tower=any(p.requires_grad for p in tower),
    )
