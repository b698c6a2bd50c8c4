"""Frozen vision features, computed once per step: the reference pass records them, the policy pass replays them.

Every family computes them in two methods of its backbone (`families.FEATURE_METHODS`; DeepStack features included),
so those are wrapped. What is reused depends on what trains:

    nothing of tower and projector   the features: nothing of them runs twice
    the projector                    what the tower hands to it: only the projector runs twice
    something of the tower           nothing

`_divide` reads off the modules which parts are frozen. In the policy pass the method runs again, but a frozen part of
a tower only returns tensors of the right shape without contents (nan): the parts that train get their recorded inputs
instead. So it does not matter whether the projector stands beside its tower, as LLaVA's, or inside, as Qwen's mergers.

Frozen parts need no backward pass. Autograd would run one all the same, because gradient checkpointing makes the
embeddings of a tower require gradients, like those of the language model.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers.utils import ModelOutput

from trl_vpo.forward.families import FEATURE_METHODS, FLOAT32_PIXELS, family_of, take_list, take_video_list
from trl_vpo.forward.parts import part_of

logger = get_logger(__name__)
LISTS = (nn.ModuleList, nn.ModuleDict)  # of layers; never called themselves
BESIDE = ("last_hidden_state", "hidden_states", "attentions")  # what stands beside the features in a result


@dataclass
class Copies:
    """Sequences of a call that read the media of the same trunks."""

    trunks: list[int]  # for each sequence of the call, the trunk whose media it reads
    counts: dict[str, list[int]]  # features of each trunk, by the method that computes them

    def of(self, method: str, value: Any) -> Any:
        """Return a method's result with the features of each sequence in place of those of each trunk."""

        def repeat(features: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Tensor | list[Tensor]:
            parts = [features] if isinstance(features, Tensor) else features
            flat = torch.cat([x.flatten(0, -2) for x in parts])  # (features of all trunks, H)
            of_trunk = flat.split(self.counts[method])
            repeated = torch.cat([of_trunk[trunk] for trunk in self.trunks])
            repeated = repeated.view(*(1,) * (parts[0].dim() - 2), *repeated.shape)  # some models flatten it again
            return repeated if isinstance(features, Tensor) else [repeated]

        if not isinstance(value, ModelOutput):
            return repeat(value)
        deep = value.get("deepstack_features")
        more = {} if deep is None else {"deepstack_features": [repeat(layer) for layer in deep]}
        # Llama 4 projects its features later.
        name = "last_hidden_state" if value.get("pooler_output") is None else "pooler_output"
        return type(value)(**dict(value) | more | {name: repeat(value[name])})


@dataclass
class Kept:
    """How tower and projector are divided, and what the reference pass left, in the order of its calls."""

    whole: bool = False  # nothing trains
    frozen: list[nn.Module] = field(default_factory=list)  # the outermost modules of which nothing trains
    trained: list[nn.Module] = field(default_factory=list)  # the outermost modules of which something does
    projector: set[nn.Module] = field(default_factory=set)  # what is projector by its name
    features: list[tuple[str, Any]] = field(default_factory=list)  # results of methods by name, where nothing trains
    # Results of the frozen modules; of those outside the projector without contents.
    outputs: dict[nn.Module, list] = field(default_factory=dict)
    inputs: dict[nn.Module, list] = field(default_factory=dict)  # arguments of the trained modules


class VisionFeatures:
    """The vision features of one backbone (without head and PEFT), kept between the two passes of a step."""

    def __init__(self, backbone: nn.Module, language_model: nn.Module):
        text = set(language_model.modules())
        if hasattr(backbone, "get_image_tokens"):  # Emu3's: its features are embeddings of the vocabulary
            text -= {backbone.get_input_embeddings()}
        self._backbone = backbone
        self._modules = {m: None for m in backbone.modules() if m not in text}  # no parameters: FSDP replaces those
        self._projector = {m for name, m in backbone.named_modules() if part_of(name) == "projector"}
        # What rows without media do not pass. Phi-4-multimodal's tower lies in the decoder, and so does the
        # cross-attention of Mllama.
        inside = {m for name, m in backbone.named_modules() if part_of(name) in ("projector", "vision")}
        self._passed = [*self._modules, *inside, *(text if family_of(backbone).same_images else ())]
        self._kept = Kept()
        self._mode = "off"
        self._checked: set[str] = set()
        self._copies: Copies | None = None

    @property
    def trained(self) -> bool:
        """True where something trains that only rows with media pass."""
        return _trains(self._passed)

    @property
    def pixel_dtype(self) -> torch.dtype | None:
        """The 16-bit dtype to which the tower casts pixels before all else; None: none, or it does not."""
        weights = [p for m in self._modules for p in m.parameters(recurse=False) if p.is_floating_point()]
        base = [p for p in weights if not p.requires_grad] or weights  # adapters may be float32
        kinds = {p.dtype for p in base}
        tower = getattr(self._backbone.config, "vision_config", None)
        if len(kinds) != 1 or getattr(tower, "model_type", None) in FLOAT32_PIXELS:
            return None
        return next((kind for kind in kinds if kind in (torch.float16, torch.bfloat16)), None)

    @contextlib.contextmanager
    def _during(self, mode: str) -> Iterator[None]:
        before, self._mode = self._mode, mode
        try:
            yield
        finally:
            self._mode = before

    def record(self) -> contextlib.AbstractContextManager:
        """Keep what is computed by frozen parts; drop what an earlier step left."""
        self._kept = self._divide()
        return self._during("record")

    def replay(self) -> contextlib.AbstractContextManager:
        """Use what was kept, each once, in the order in which it was computed."""
        return self._during("replay" if self._kept.features or self._kept.inputs else "off")

    def paused(self) -> contextlib.AbstractContextManager:
        """Neither keep nor use anything."""
        return self._during("off")

    @contextlib.contextmanager
    def repeated(self, copies: Copies | None) -> Iterator[None]:
        """Compute each trunk's features once, and give them to each sequence of a call that reads them."""
        self._copies = copies
        try:
            yield
        finally:
            self._copies = None

    def features(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return what `compute` returns, or what was kept of it; for each sequence, where trunks have several."""
        mode = self._mode
        if mode == "inside":  # one of the methods calls the other
            return compute()
        with self._during("inside"):
            value = self._once(mode, name, compute)
        return value if self._copies is None else self._copies.of(name, value)

    def _once(self, mode: str, name: str, compute: Callable[[], Any]) -> Any:
        if mode == "off" and not torch.is_grad_enabled():
            return compute()
        kept = self._divide() if mode == "off" else self._kept
        if kept.whole:
            return _frozen_features(kept, mode, name, compute)
        with _boundary(kept, mode):
            value = compute()
        if mode != "replay" or name in self._checked:
            return value
        self._checked.add(name)
        return value if _has_contents(value) else self._give_up(compute)

    def _give_up(self, compute: Callable[[], Any]) -> Any:
        logger.warning(
            f"{type(self._backbone).__name__}: its frozen vision tower is computed in the reference pass and again in "
            "the policy pass, because something of its output goes past the modules that train."
        )
        self._kept, self._divide = Kept(), Kept
        return compute()

    def _divide(self) -> Kept:
        """Divide tower and projector into frozen and trained parts; nothing is one where dropout is active outside.

        A module that trains in part is trained as a whole: what its frozen layers make may be added to what the others
        make. But lists are opened, and what holds a whole list of frozen layers is a tower with a projector inside.
        """
        kept = Kept(whole=not self.trained, projector=self._projector)

        def visit(module: nn.Module) -> None:
            inner = self._inside(module)
            trains = _trains(inner)
            layers = [self._inside(m) for m in inner if isinstance(m, LISTS)]
            around = trains and any(_has_weights(ms) and not _trains(ms) for ms in layers)
            if around or isinstance(module, LISTS) or module is self._backbone:
                for child in module.children():
                    visit(child)
            elif _has_weights(inner):
                (kept.trained if trains else kept.frozen).append(module)

        visit(self._backbone)
        inside = {m for module in kept.trained for m in module.modules()}
        dropouts = [m for m in self._modules if isinstance(m, nn.Dropout) and m.p > 0 and m not in inside]
        return Kept() if any(m.training for m in dropouts) else kept

    def _inside(self, module: nn.Module) -> list[nn.Module]:
        return [m for m in module.modules() if m in self._modules]


def _has_weights(modules: list[nn.Module]) -> bool:
    return any(True for m in modules for _ in m.parameters(recurse=False))


def _trains(modules: list[nn.Module]) -> bool:
    return any(p.requires_grad for m in modules for p in m.parameters(recurse=False))


def _frozen_features(kept: Kept, mode: str, name: str, compute: Callable[[], Any]) -> Any:
    if mode == "replay":
        method, value = kept.features.pop(0)
        if method != name:
            raise RuntimeError(f"the policy needs {name}, but the reference computed {method} at this point.")
        return value
    with torch.no_grad():
        value = compute()
    if mode == "record":
        kept.features.append((name, _features_alone(value)))
    return value


def _features_alone(value: Any) -> Any:
    """Return a result without the hidden states of all layers and the like."""
    if not isinstance(value, ModelOutput) or value.get("pooler_output") is None:
        return value
    return type(value)(**{name: None if name in BESIDE else part for name, part in value.items()})


def _has_contents(value: Any) -> bool:
    return not any(x.isnan().any() for x in tree_leaves(_features_alone(value)) if isinstance(x, Tensor))


@contextlib.contextmanager
def _boundary(kept: Kept, mode: str) -> Iterator[None]:
    """Route all calls of frozen and trained parts."""
    handles = []
    for module in kept.frozen:
        # Around its hooks: a replayed call does not gather the weights of FSDP and ZeRO-3.
        module._call_impl = functools.partial(_call_frozen, kept, mode, module, module._call_impl)
    for module in kept.trained if mode != "off" else ():
        hook = functools.partial(_hand_over, kept, mode)
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        # Also where an evaluation needs no gradients: what requires them comes from something that trains.
        with torch.enable_grad() if mode == "replay" else contextlib.nullcontext():
            yield
    finally:
        for module in kept.frozen:
            del module._call_impl
        for handle in handles:
            handle.remove()


def _call_frozen(kept: Kept, mode: str, module: nn.Module, call: Callable, *args, **kwargs) -> Any:
    recorded = kept.outputs[module].pop(0) if mode == "replay" else None
    if any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves((args, kwargs))):
        return call(*args, **kwargs)  # what trains lies before it
    if mode == "replay":
        return recorded
    module.eval()  # nothing is to be recomputed
    with torch.no_grad():
        out = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, call(*args, **kwargs))
    if mode == "record":
        kept.outputs.setdefault(module, []).append(
            out if module in kept.projector else tree_map(_without_contents, out)
        )
    return out


def _without_contents(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return torch.full((), torch.nan, dtype=x.dtype, device=x.device).expand(x.shape)


def _hand_over(kept: Kept, mode: str, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if mode == "record":
        kept.inputs.setdefault(module, []).append((args, kwargs))
        return args, kwargs

    def replace(now: Any, then: Any) -> Any:
        return then if isinstance(now, Tensor) and not now.requires_grad else now

    return tree_map(replace, (args, kwargs), kept.inputs[module].pop(0))


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
        method = getattr(type(backbone), name)
        method = take_video_list(method) if name == "get_video_features" else take_list(method)
        setattr(backbone, name, types.MethodType(_kept(method), backbone))
    return backbone._trl_vpo_vision
