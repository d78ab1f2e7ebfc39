"""What tensors a piece of code makes, and which of them stay."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts the storages of all results of operations while it is on."""

    def __init__(self, *, watch_peak: bool = False) -> None:
        super().__init__()
        self.peak = 0
        """Most bytes alive after any operation, where watched (each operation then costs a look at all before)."""
        self._made: dict[StorageWeakRef, int] = {}
        self._watch_peak = watch_peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._made[StorageWeakRef(leaf.untyped_storage())] = leaf.untyped_storage().nbytes()
        if self._watch_peak:
            self.peak = max(self.peak, self.alive())
        return result

    def alive(self) -> int:
        """Bytes that something still holds."""
        return sum(size for storage, size in self._made.items() if not storage.expired())
