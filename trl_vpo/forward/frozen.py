"""Frozen modules stay in evaluation mode while the rest trains.

`Trainer` puts the whole model into training mode before each step. In frozen parts that would switch dropout on and
move BatchNorm's running statistics, which no adapter saves: the model loaded later would not be the one that trained.
"""

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn


class FrozenModules:
    """The modules of a model that are frozen now. (FSDP replaces parameters later, but no modules.)"""

    def __init__(self, model: nn.Module):
        self._modules = [*_frozen(model), *_unsaved_statistics(model)]

    def keep_in_eval(self) -> None:
        """Put them into evaluation mode; before each pass, as `train()` of the whole model may have been called."""
        for module in self._modules:
            if not _needs_training_mode(module):
                module.training = False


def _frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Yield all modules of the parts that have weights or statistics, none of which train."""
    parameters = list(module.parameters())
    if any(p.requires_grad for p in parameters):
        for child in module.children():
            yield from _frozen(child)
    elif parameters or any(True for _ in module.buffers()):
        yield from module.modules()


def _unsaved_statistics(model: nn.Module) -> list[nn.Module]:
    """Return layers whose running statistics no adapter saves, although their weights or biases may train."""
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return []
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    saved = {id(module) for wrapper in wrappers for module in wrapper.modules()}
    running = [module for module in model.modules() if getattr(module, "running_mean", None) is not None]
    return [module for module in running if id(module) not in saved]


def _needs_training_mode(module: nn.Module) -> bool:
    """Tell whether a layer recomputes its activations, adds NEFTune's noise, or passes gradients through 8 bits."""
    recomputes = getattr(module, "gradient_checkpointing", False)
    return recomputes or hasattr(module, "neftune_noise_alpha") or type(module).__module__.startswith("bitsandbytes")
