"""The reference that lies within the policy: its base, with the adapter off, or the frozen copy of a given adapter."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from trl.trainer.utils import use_adapter


@torch.no_grad()
def copy_adapter(policy: nn.Module) -> None:
    """Make the adapter "ref" of a `PeftModel` equal to its adapter "default", in weights and buffers.

    `DPOTrainer` copies what has ".default." in its name. That leaves out what ends in ".default": LoRA on embeddings,
    single trained tokens, IA3, LoHa, LoKr, VeRA. Their reference would be a new adapter.
    """
    tensors = dict(policy.named_parameters()) | dict(policy.named_buffers())
    for name, tensor in tensors.items():
        parts = name.split(".")
        if "default" in parts:
            twin = tensors.get(".".join("ref" if part == "default" else part for part in parts))
            if twin is not None and twin is not tensor:
                twin.copy_(tensor)


@contextlib.contextmanager
def trained_as_before(model: nn.Module) -> Iterator[None]:
    """Afterwards the same parameters are trainable.

    PEFT makes every weight of an adapter trainable when it switches back to it (0.20 also when another one is added),
    those too that were frozen.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in trained:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


@contextlib.contextmanager
def switched(policy: nn.Module) -> Iterator[None]:
    """While the reference within `policy`, a `PeftModel`, is computed. Afterwards all is as it was before."""
    adapter = "ref" if "ref" in policy.peft_config else None
    with trained_as_before(policy), use_adapter(policy, adapter_name=adapter), evaluating(policy):
        yield


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode: without dropout and embedding noise, which belong to the policy's training."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
