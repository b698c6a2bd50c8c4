"""Frozen modules stay in evaluation mode while the rest trains.

`Trainer` puts the whole model into training mode before each step. In frozen parts that would switch dropout on, and
let BatchNorm move its running statistics: those of a base model lie in no adapter, so the model that is loaded later
would not be the one that was trained.
"""

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn


class FrozenModules:
    """What is frozen in a model at this time. FSDP replaces parameters later on, but no modules."""

    def __init__(self, model: nn.Module):
        self._modules = [*_frozen(model), *_unsaved_statistics(model)]

    def stay(self) -> None:
        """Call it before each pass: a `train()` of the whole model may have come in between."""
        for module in self._modules:
            if not _needs_training_mode(module):
                module.training = False


def _frozen(module: nn.Module) -> Iterator[nn.Module]:
    """All modules of the parts that hold weights or statistics, and train none of them."""
    parameters = list(module.parameters())
    if any(p.requires_grad for p in parameters):
        for child in module.children():
            yield from _frozen(child)
    elif parameters or any(True for _ in module.buffers()):
        yield from module.modules()


def _unsaved_statistics(model: nn.Module) -> list[nn.Module]:
    """Layers with running statistics that lie in no adapter, although their weights or biases may."""
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return []
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    saved = {id(module) for wrapper in wrappers for module in wrapper.modules()}
    running = [module for module in model.modules() if getattr(module, "running_mean", None) is not None]
    return [module for module in running if id(module) not in saved]


def _needs_training_mode(module: nn.Module) -> bool:
    """Layers that recompute their activations, embeddings with NEFTune's noise, and 8-bit weights that pass gradients
    on: without training mode they would leave that out."""
    recomputes = getattr(module, "gradient_checkpointing", False)
    return recomputes or hasattr(module, "neftune_noise_alpha") or type(module).__module__.startswith("bitsandbytes")
