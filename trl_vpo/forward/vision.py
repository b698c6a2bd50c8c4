"""Frozen vision features, computed once per step: the reference pass records them, the policy pass replays them.

Where vision tower and projector are frozen and carry no adapter, both passes of a step see the same features, in the
same order. Every family computes them in two methods of its backbone (`families.FEATURE_METHODS`; DeepStack features
included), so those are wrapped.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from trl_vpo.forward.families import FEATURE_METHODS


class VisionFeatures:
    """The vision features of one backbone (without head and PEFT), kept between the two passes of a step."""

    def __init__(self, backbone: nn.Module, language_model: nn.Module):
        text = set(language_model.modules())
        self._modules = [m for m in backbone.modules() if m not in text]  # no parameters: FSDP replaces those
        self._dropouts = [m for m in self._modules if isinstance(m, nn.Dropout) and m.p > 0]
        self._kept: list[tuple[str, Any]] = []
        self._mode = "off"

    @property
    def frozen(self) -> bool:
        """True where tower and projector give the same features in both passes: nothing trains, no dropout."""
        return not self.trained and not any(m.training for m in self._dropouts)

    @property
    def trained(self) -> bool:
        """True where something of tower or projector trains."""
        return any(p.requires_grad for module in self._modules for p in module.parameters(recurse=False))

    @contextlib.contextmanager
    def _during(self, mode: str) -> Iterator[None]:
        before, self._mode = self._mode, mode
        try:
            yield
        finally:
            self._mode = before

    def record(self) -> contextlib.AbstractContextManager:
        """Keep the features that are computed, if they are frozen; drop those of an earlier step."""
        self._kept = []
        return self._during("record" if self.frozen else "off")

    def replay(self) -> contextlib.AbstractContextManager:
        """Use the kept features, each once, in the order in which they were computed."""
        return self._during("replay" if self._kept else "off")

    def paused(self) -> contextlib.AbstractContextManager:
        """Neither keep nor use anything."""
        return self._during("off")

    def features(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return what `compute` returns, or what was kept of it."""
        if self._mode == "replay":
            kept, value = self._kept.pop(0)
            if kept != name:
                raise RuntimeError(f"the policy needs {name}, but the reference computed {kept} at this point.")
            return value
        # Frozen features need no backward pass. Autograd would run one all the same: gradient checkpointing makes the
        # embeddings of the vision tower require gradients, like those of the language model.
        without_grad = torch.no_grad() if self.frozen else contextlib.nullcontext()
        with self.paused(), without_grad:  # paused: one of the methods may call the other
            value = compute()
        if self._mode == "record":
            self._kept.append((name, value))
        return value


def _kept(method: Callable) -> Callable:
    """Route a method of a backbone through its `VisionFeatures`. Bound to the backbone, it survives a deep copy."""

    @functools.wraps(method)  # `generate` goes by the signature
    def features(self, *args, **kwargs):
        return self._trl_vpo_vision.features(method.__name__, lambda: method(self, *args, **kwargs))

    return features


def vision_features(backbone: nn.Module) -> VisionFeatures:
    """Let a vision-language backbone keep its features when asked to; a text model has none."""
    decoder = backbone.get_decoder() if hasattr(backbone, "get_decoder") else backbone
    names = [name for name in FEATURE_METHODS if decoder is not backbone and hasattr(backbone, name)]
    backbone._trl_vpo_vision = VisionFeatures(backbone, decoder if names else backbone)
    for name in names:
        setattr(backbone, name, types.MethodType(_kept(getattr(type(backbone), name)), backbone))
    return backbone._trl_vpo_vision
