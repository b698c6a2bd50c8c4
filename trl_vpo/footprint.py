"""What a recipe would train and what it would weigh, from the model's config alone: no weights are loaded.

The memory figures are arithmetic from the formulas below. They were not calibrated on GPUs.
"""

import re
from dataclasses import dataclass
from typing import Any

import transformers
from accelerate import init_empty_weights
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from trl_vpo.forward.scoring import VOCAB_CHUNK

VISION = re.compile(r"(^|\.)(visual|vision_tower|vision_model|multi_modal_projector|vision_resampler|connector)\.")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4_SCALES = {False: 4 / 64, True: 1 / 64 + 4 / 64 / 256}  # bytes per weight, without and with nested quantization
GIB = 2**30


@dataclass
class Adapted:
    """The modules that a LoRA config adapts."""

    modules: list[str]
    vision: list[str]  # those of them in the vision tower or the projector


@dataclass
class Sizes:
    """Numbers of parameters."""

    total: int
    vision: int
    trained: int
    quantized: int  # of `total`, stored in 4 or 8 bits


@dataclass
class Load:
    """One micro-batch.

    Attributes:
        sequences: how many sequences it has, every response behind its prompt.
        length: the longest of them, tokens.
        responses: response tokens in all of them.
    """

    sequences: int
    length: int
    responses: int


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device, of the class that TRL would load."""
    architecture = getattr(transformers, (config.architectures or [""])[0], None) or AutoModelForCausalLM
    build = architecture.from_config if hasattr(architecture, "from_config") else architecture._from_config
    with init_empty_weights(include_buffers=True):
        return build(config)


def adapt(model: PreTrainedModel, peft_config: Any) -> tuple[nn.Module, Adapted]:
    """Put empty LoRA weights into an empty model.

    Raises:
        ValueError: the targets match no module; PEFT's message.
    """
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
    in_bits = 0
    if quantized:
        for name, module in model.named_modules():
            name = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            if type(module) is nn.Linear and ".lora_" not in name and should_convert_module(name, skip):
                in_bits += module.weight.numel()
    return Sizes(
        total=sum(p.numel() for _, p in named),
        vision=sum(p.numel() for name, p in named if VISION.search(name)),
        trained=sum(p.numel() for _, p in named if p.requires_grad),
        quantized=in_bits,
    )


def memory(sizes: Sizes, load: Load, config: PreTrainedConfig, args: Any, model_args: Any, copies: int) -> dict:
    """Bytes on one GPU that holds the whole model, by part.

    - weights: parameters times their bytes (4 bit: half a byte and the scales), times `copies`;
    - gradients: trained parameters, as stored: float32 for LoRA (PEFT casts it up), bfloat16 for QLoRA;
    - optimizer: two states per trained parameter as stored; 1 byte each for 8-bit optimizers; Adafactor and SGD: 0;
    - activations: every sequence of a micro-batch padded to the longest. Per token and layer 9 * hidden + 4 *
      intermediate numbers (norms, q, k, v, attention output, residuals, a gated MLP); with gradient checkpointing
      1 * hidden per layer, and one whole layer at a time;
    - head: logits of response tokens against one chunk of the vocabulary, float32, three of them at a time.

    Not in it: the frozen vision tower's pass, the CUDA context, fragmentation (together some GiB), and what ZeRO or
    FSDP would save.

    Args:
        sizes: as `sizes` counts them.
        load: the micro-batch.
        config: the model's.
        args, model_args: the parsed recipe.
        copies: 2 if a second copy of the model is the reference.
    """
    dtype = model_args.dtype if model_args.dtype in BYTES else str(config.dtype or "float32").removeprefix("torch.")
    number = BYTES.get(dtype, 4)
    lora = model_args.use_peft
    trained = (2 if sizes.quantized else 4) if lora else number
    base = sizes.total - (sizes.trained if lora else 0)
    bits = (0.5 + NF4_SCALES[model_args.use_bnb_nested_quant]) if model_args.load_in_4bit else 1
    optimizer = str(getattr(args.optim, "value", args.optim))
    states = 0 if optimizer in ("adafactor", "sgd") else 2 * (1 if "8bit" in optimizer else trained)
    text = config.get_text_config()
    tokens, hidden, layers = load.sequences * load.length, text.hidden_size, text.num_hidden_layers
    layer = 9 * hidden + 4 * text.intermediate_size
    computed = 2 if args.bf16 or args.fp16 else number
    kept = layers * hidden + layer if args.gradient_checkpointing else layers * layer
    parts = {
        "weights": copies * ((base - sizes.quantized) * number + sizes.quantized * bits)
        + lora * sizes.trained * trained,
        "gradients": sizes.trained * trained,
        "optimizer": sizes.trained * states,
        "activations": tokens * kept * computed,
        "head": 3 * load.responses * min(VOCAB_CHUNK, text.vocab_size) * 4,
    }
    return {name: int(size) for name, size in parts.items()}
