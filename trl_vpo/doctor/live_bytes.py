"""The bytes of the tensors that are alive, counted in any torch code."""

import weakref
from collections.abc import Iterable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that are alive, exactly and the same on every device.

    A storage counts once, however many views it has, from the operation that makes it until it is freed. What an
    operation allocates and frees internally is not counted, nor are the allocator's rounding and its cache.

    Attributes:
        now, peak: bytes alive, and their maximum so far.
        gradients: bytes of finished gradients, counted by whoever owns them; `gradients_at_peak`: at the peak.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = self.gradients = self.gradients_at_peak = 0
        self._storages: dict[int, weakref.ref] = {}
        for tensor in tensors:
            self.hold(tensor)

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor that existed before."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._storages:
            return
        self._storages[key] = weakref.ref(storage, lambda _: self._free(key, size))
        self.now += size
        if self.now > self.peak:
            self.restart()

    def holds(self, tensor: Tensor) -> bool:
        return id(tensor.untyped_storage()) in self._storages

    def restart(self) -> None:
        """Start a new peak from the present."""
        self.peak, self.gradients_at_peak = self.now, self.gradients

    def _free(self, key: int, size: int) -> None:
        del self._storages[key]
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.hold(leaf)
        return out
