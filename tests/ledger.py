"""What a step keeps in memory, by what it is for, and what it hands to collectives."""

from __future__ import annotations

import sys
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, UntypedStorage
from torch.distributed import Work
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hopescale.model.memory_stack import MemoryStack
from hopescale.optim.flat_piece import FlatPiece

LETTING_GO = 0.002
"""Seconds after a collective."""
OF_ENGINES = ("/torch/distributed/", "/deepspeed/", "/hopescale/optim/", "/hopescale/parallel/")
"""Sources whose tensors are buffers: gathered parameters, what collectives pack, and what the optimizer works in."""

OF_THE_MODEL = ("/hopescale/model/", "/torch/autograd/")
"""Sources whose tensors are activations, unless they are known as something else."""


class Ledger(TorchDispatchMode):
    """Keeps the books of all storages that are made, resized and freed while it is on.

    A storage belongs to one category from its beginning to its end, also if that is known only later, as of a gradient,
    which is an activation's like any other until it is some parameter's.
    """

    def __init__(self, trained: Iterable[torch.Size] = (), **held: Iterable[Tensor]) -> None:
        """Open with what is there already, by category.

        Args:
            trained: Shapes of whole parameters. What backward makes of such a shape is a gradient that waits for those
                of other passes, for nothing else has one.
            held: Tensors by category.
        """
        super().__init__()
        self._trained = {_without_ones(shape) for shape in trained}
        self.collectives: dict[str, list[int]] = defaultdict(list)
        """Bytes of the input of each collective, by name."""
        self._category: dict[int, str] = {}
        self._entries: list[tuple[int, int]] = []
        self._size: dict[int, int] = {}
        self._ids: dict[int, int] = {}
        self._watching: dict[int, weakref.ref[UntypedStorage]] = {}
        self._numbers = iter(range(sys.maxsize))
        for category, tensors in held.items():
            for tensor in tensors:
                self.file(tensor, category)

    def file(self, tensor: Tensor, category: str, *, only: str | None = None) -> None:
        """Say what a tensor is for, from its beginning; or only if it was taken for something `only` so far."""
        for leaf in plain(tensor):
            number = self._note(leaf.untyped_storage(), category)
            if only is None or self._category[number] == only:
                self._category[number] = category

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor is in the books."""
        return all(id(leaf.untyped_storage()) in self._ids for leaf in plain(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            self._record(func, args)
        made = (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        # The storage of a sharded tensor itself has the size of the whole, and no memory.
        for leaf in (piece for tensor in made for piece in plain(tensor)):
            if not leaf.is_meta:
                number = self._note(leaf.untyped_storage())
                if self._category[number] == "activations" and _without_ones(leaf.shape) in self._trained:
                    self._category[number] = "gradients" if in_backward() else "activations"
        return result

    def alive(self) -> int:
        """Bytes that something still holds."""
        return sum(self._size.values())

    def peaks(self, *categories: str) -> dict[str, int]:
        """Most bytes at a time, of each category and of all together; or of some alone."""
        now, most = Counter[str](), Counter[str]()
        for number, change in self._entries:
            if categories and self._category[number] not in categories:
                continue
            for name in (self._category[number], "total"):
                now[name] += change
                most[name] = max(most[name], now[name])
        return dict(most)

    @contextmanager
    def watching(self) -> Iterator[Ledger]:
        """On, with fast weights and resized storages in its books, and out of them in time what collectives sent."""
        resize, write, wait = UntypedStorage.resize_, MemoryStack.write, Work.wait

        def resizing(storage: UntypedStorage, size: int) -> Any:
            done = resize(storage, size)
            self._change(self._note(storage), storage.nbytes())
            return done

        def writing(*args: Any, **kwargs: Any) -> Any:
            fast, figures = write(*args, **kwargs)
            for tensor in (fast.w1, fast.w2, fast.momentum1, fast.momentum2):
                if tensor is not None:
                    self.file(tensor, "fast_state")
            return fast, figures

        def waiting(work: Work, *args: Any, **kwargs: Any) -> bool:
            done = wait(work, *args, **kwargs)
            # gloo's thread lets go of what it has sent only when it gets the interpreter's lock, sooner or later.
            time.sleep(LETTING_GO)
            return done

        with ExitStack() as stack:
            stack.enter_context(patch.object(UntypedStorage, "resize_", resizing))
            stack.enter_context(patch.object(MemoryStack, "write", writing))
            stack.enter_context(patch.object(Work, "wait", waiting))
            yield stack.enter_context(self)

    def _note(self, storage: UntypedStorage, category: str | None = None) -> int:
        number = self._ids.get(id(storage))
        if number is not None:
            return number
        number = next(self._numbers)
        self._category[number] = category or made_for()
        self._ids[id(storage)] = number
        self._watching[number] = weakref.ref(storage, self._freed(id(storage), number))
        self._change(number, storage.nbytes())
        return number

    def _freed(self, identity: int, number: int) -> Callable[[Any], None]:
        def freed(_: Any) -> None:
            self._ids.pop(identity, None)
            self._change(number, 0)

        return freed

    def _change(self, number: int, size: int) -> None:
        self._entries.append((number, size - self._size.get(number, 0)))
        self._size[number] = size

    def _record(self, func: Any, args: Any) -> None:
        name = func._overloadpacket.__name__
        given = args[1] if name in TWO_TENSORS else args[0]
        self.collectives[name].append(sum(leaf.nbytes for leaf in tree_leaves(given) if isinstance(leaf, Tensor)))


TWO_TENSORS = ("_allgather_base_", "_reduce_scatter_base_", "alltoall_base_", "allgather_into_tensor_coalesced_")
"""Collectives whose input is their second argument."""


def plain(tensor: Tensor) -> list[Tensor]:
    """What this rank holds of a tensor."""
    if isinstance(tensor, DTensor):
        return [tensor._local_tensor]
    return [tensor.piece if isinstance(tensor, FlatPiece) else tensor]


def made_for() -> str:
    """What the code that runs makes tensors for, by its innermost source that says so."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if any(source in path for source in OF_ENGINES):
            return "buffers"
        if any(source in path for source in OF_THE_MODEL):
            return "activations"
        frame = frame.f_back
    return "activations"


def in_backward() -> bool:
    """Whether the code that runs is a backward's own, and no forward that it runs again."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name in ("_engine_run_backward", "_recomputed"):
            return frame.f_code.co_name == "_engine_run_backward"
        frame = frame.f_back
    return False


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
