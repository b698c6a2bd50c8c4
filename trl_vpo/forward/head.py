"""The LM head: its weights, and what a model does with its output (multiply it, cap it, or nothing).

Config fields do not tell. Cohere's text model multiplies by its `logit_scale`; Aya Vision has the same text config and
does not. So the model's own `forward` is run, with known numbers in the place of what its backbone and head compute.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from unittest.mock import patch

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from trl_vpo.errors import ModelError
from trl_vpo.forward.parts import output_head

PROBES = (1.0, -1.0, 2.0**-20, -3.0, 20.0, 1e6)  # logits; the last one is far beyond every cap


@dataclass
class Head:
    """An LM head: `softcap(scale * (hidden @ weight.T + bias))`."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return (N, V) float32 logits: what the kernels never hold in full."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float() * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def lm_head(model: PreTrainedModel) -> Head:
    """Return the LM head of `model`; what its `forward` does with the logits is probed at the first call."""
    if not hasattr(model, "_trl_vpo_logits"):
        model._trl_vpo_logits = logit_transform(model)
    head = output_head(model)
    bias = getattr(head, "bias", None)  # PEFT's layer for single tokens has none
    weight, bias = (p.full_tensor() if isinstance(p, DTensor) else p for p in (head.weight, bias))
    return Head(weight, bias, *model._trl_vpo_logits)


def check_model_class(kind: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """Raise ModelError for classes of models that do not write responses behind prompts."""
    if thinker := getattr(config, "thinker_config", None):
        writer = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(thinker.model_type)
        raise ModelError(
            f"a whole {config.model_type} is not supported: one of its parts writes, and others speak. Save the "
            f"former with the processor, and train that: {writer}.from_pretrained(NAME).save_pretrained(FOLDER)."
        )
    if hasattr(config, "canvas_length"):
        raise ModelError(
            f"{kind.__name__} is not supported: it writes blocks of tokens by diffusion, and its log-probs are not "
            "those of a next token."
        )
    if config.is_encoder_decoder:
        raise ModelError(
            f"{kind.__name__} is not supported: it has an encoder for prompts and a decoder for responses, and these "
            "trainers score responses behind their prompts."
        )
    if not kind.can_generate():
        raise ModelError(f"{kind.__name__} is not supported: it generates no text.")


def check_head(model: nn.Module) -> None:
    """Raise ValueError for an adapter on the LM head, or quantized weights: scores would silently ignore them.

    A fully trained copy (`modules_to_save`) and single trained tokens (`trainable_token_indices`) are supported.
    """
    if any(isinstance(m, ParamWrapper) and m.get_param().dtype.itemsize == 1 for m in model.modules()):
        raise ValueError(
            "LoRA on parameters (target_parameters, which the presets of some models have) cannot adapt quantized "
            "weights. Name modules in target_modules alone, or load the model unquantized."
        )
    head = output_head(model)
    if isinstance(head, BaseTunerLayer):
        raise ValueError(
            "an adapter on the LM head is not supported: log-probs are computed from the head's weight, and the "
            "adapter is not in it. Leave lm_head out of target_modules; modules_to_save=['lm_head'] trains the head "
            "itself. An adapter that was trained so can be merged into its base first (`trl-vpo merge`)."
        )
    if head is not None and not head.weight.is_floating_point():
        raise ValueError(
            f"the LM head is quantized ({type(head).__name__}), and log-probs are computed from its plain weight: "
            "name lm_head in llm_int8_skip_modules of the quantization config."
        )


class _AllFields:
    """Gives an output every optional field."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)


class _Hidden(_AllFields, BaseModelOutputWithPast):
    """What a backbone returns."""


class _Logits(_AllFields, CausalLMOutputWithPast):
    """What a language model returns."""


@torch.no_grad()
def logit_transform(model: PreTrainedModel) -> tuple[float, float | None]:
    """Return (scale, cap) of a model whose logits are `cap * tanh(scale * head(hidden) / cap)`; cap None: not capped.

    Raises ModelError for a `forward` that does something else.
    """
    backbone, head, config = model.base_model, output_head(model), model.config.get_text_config()
    name = type(model).__name__
    if backbone is model:
        if model.get_decoder() is not model:
            return _inner_transform(model)
        backbone = getattr(model, "model", model)  # of a text model without a prefix of its own
    if backbone is model or head is None:
        raise ModelError(f"{name} has no backbone apart from its LM head; its log-probs cannot be computed here.")
    probes = torch.tensor(PROBES, dtype=torch.float64)
    hidden = (torch.arange(len(PROBES) * config.hidden_size) % 3 + 1.0).reshape(1, len(PROBES), -1)  # (1, N, H)
    logits = probes.reshape(1, -1, 1).expand(1, len(PROBES), config.vocab_size)
    given: list[Tensor] = []
    problem = f"{name} computes its logits from its hidden states in a way that is not supported: "
    with (
        _as_model_error(problem),
        patch.object(backbone, "forward", lambda *args, **kwargs: _Hidden(last_hidden_state=hidden)),
        patch.object(head, "forward", lambda states: given.append(states) or logits.clone()),
    ):
        out = type(model).forward(model, input_ids=torch.zeros(1, len(PROBES), dtype=torch.long)).logits
    if not given:
        raise ModelError(problem + "it does not call its output embeddings.")
    before = (given[-1].double() / hidden).unique()
    if before.numel() != 1 or (before.item() != 1 and getattr(head, "bias", None) is not None):
        raise ModelError(problem + "its head does not take the backbone's output.")
    if not torch.equal(out, out[..., :1].expand_as(out)):
        raise ModelError(problem + "some tokens of the vocabulary are treated differently from the others.")
    result = out[0, :, 0].double()  # (N,)
    scale, end = result[2].item() / PROBES[2], result[-1].item()
    cap = None if end > 1e4 * scale else end
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale  # (x / cap) * cap is rounded
    want = probes * scale if cap is None else cap * torch.tanh(probes * scale / cap)
    if not torch.allclose(result, want, rtol=16 * torch.finfo(out.dtype).eps, atol=0):
        raise ModelError(problem + f"logits {probes.tolist()} became {result.tolist()}.")
    return scale * before.item(), cap


def _inner_transform(model: PreTrainedModel) -> tuple[float, float | None]:
    """Return the transform of a model that hands on the logits of a whole language model inside, as Llama 4 does."""
    inner, config = model.get_decoder(), model.config.get_text_config()
    logits = torch.arange(2.0 * config.vocab_size).reshape(1, 2, -1)
    states = torch.zeros(1, 2, config.hidden_size)
    with (
        _as_model_error(f"{type(model).__name__} is not supported: "),
        patch.object(inner, "forward", lambda *args, **kwargs: _Logits(logits=logits)),
        patch.object(model.get_input_embeddings(), "forward", lambda ids: states),
    ):
        out = type(model).forward(model, input_ids=torch.zeros(1, 2, dtype=torch.long)).logits
    if not torch.equal(out, logits):
        raise ModelError(f"{type(model).__name__} changes the logits of its language model, which is not supported.")
    return logit_transform(inner)


@contextlib.contextmanager
def _as_model_error(problem: str) -> Iterator[None]:
    """Name the model whose `forward` does not take ids alone, such as BLIP's."""
    try:
        yield
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{problem}{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def head_inputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Give what a model's calls hand to its LM head, (R, L, H) each; the head itself is not computed."""
    head, states = output_head(model), []
    # Around its hooks: weights that FSDP and ZeRO-3 shard are not gathered.
    head._call_impl = lambda hidden: states.append(hidden) or hidden[..., :1]
    try:
        yield states
    finally:
        del head._call_impl
