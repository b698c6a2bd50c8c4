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
        self._modules = list(_frozen(model))
        modules = list(model.modules())
        if any(isinstance(module, BaseTunerLayer) for module in modules):
            # No adapter saves running statistics, although the layer's weights or biases may train.
            saved = {m for whole in modules if isinstance(whole, ModulesToSaveWrapper) for m in whole.modules()}
            running = [module for module in modules if getattr(module, "running_mean", None) is not None]
            self._modules += [module for module in running if module not in saved]

    def keep_in_eval(self) -> None:
        """Put them into evaluation mode; before each pass, as `train()` of the whole model may have been called."""
        for module in self._modules:
            # These recompute their activations, add NEFTune's noise, or pass gradients through 8 bits.
            recomputes = getattr(module, "gradient_checkpointing", False) or hasattr(module, "neftune_noise_alpha")
            if not recomputes and not type(module).__module__.startswith("bitsandbytes"):
                module.training = False


def _frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Yield all modules of the parts that have weights or statistics, none of which train."""
    parameters = list(module.parameters())
    if any(p.requires_grad for p in parameters):
        for child in module.children():
            yield from _frozen(child)
    elif parameters or any(True for _ in module.buffers()):
        yield from module.modules()
