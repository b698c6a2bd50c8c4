"""Count a recipe's weights from the model's config; nothing is loaded."""

from dataclasses import dataclass
from typing import Any

import transformers
from accelerate import init_empty_weights
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from trl_vpo.forward.head import check_model_class
from trl_vpo.forward.parts import output_head, part_of
from trl_vpo.models.adapters import check_adapted, check_parameters, resolve_targets


@dataclass
class Sizes:
    """Numbers of parameters."""

    total: int  # with the adapter's
    vision: int
    trained: int
    quantized: int  # of `total`, stored in 4 or 8 bits ...
    largest_quantized: int = 0  # ... and in the largest of their layers
    head: int = 0  # the LM head
    layer: int = 0  # of the largest layer that is sharded as a unit


def own_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class of transformers that a config's model was saved as. It writes no responses: ModelError."""
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is not None or hasattr(config, "thinker_config"):
        check_model_class(kind, config)
    return kind


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a config's model on the meta device, of the class that TRL would load."""
    architecture = own_class(config) or AutoModelForCausalLM
    build = architecture.from_config if hasattr(architecture, "from_config") else architecture._from_config
    with init_empty_weights(include_buffers=True):
        return build(config)


def adapt(model: PreTrainedModel, peft_config: Any) -> tuple[nn.Module, list[str]]:
    """Put empty LoRA weights into an empty model; return it and the names of the modules that are adapted.

    Targets that match no module raise ValueError.
    """
    check_parameters(peft_config)
    resolve_targets(peft_config, model)
    adapted = get_peft_model(model, peft_config, low_cpu_mem_usage=True)
    check_adapted(adapted)
    return adapted, [n.removeprefix("base_model.model.") for n, m in adapted.named_modules() if hasattr(m, "lora_A")]


def model_sizes(model: nn.Module, *, quantized: bool, skip: list[str]) -> Sizes:
    """Count the parameters of an empty model, with or without an adapter.

    `quantized`: linear layers are stored in 4 or 8 bits, but for modules that match a pattern of `skip`.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    linear = {n: m for n, m in base.named_modules() if type(m) is nn.Linear and ".lora_" not in n} if quantized else {}
    converted = [n for n in linear if should_convert_module(n.removesuffix(".base_layer"), skip)]
    in_bits = [linear[name].weight.numel() for name in converted]
    units = [module for module in base.modules() if type(module).__name__ in (base._no_split_modules or [])]
    head = output_head(base)
    return Sizes(
        total=sum(p.numel() for p in base.parameters()),
        vision=sum(p.numel() for name, p in base.named_parameters() if part_of(name) != "language"),
        trained=sum(p.numel() for p in base.parameters() if p.requires_grad),
        quantized=sum(in_bits),
        largest_quantized=max(in_bits, default=0),
        head=0 if head is None else head.weight.numel(),
        layer=max((sum(p.numel() for p in unit.parameters()) for unit in units), default=0),
    )
