"""Finds what would make the host wait for a device, without one: tensors on `meta` have no values to wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")


class NoWaiting(TorchDispatchMode):
    """Refuses transfers between host and `meta` that block; reading a value of `meta` fails by itself.

    Indexing by a list is such a transfer, of a tensor that comes from nowhere. So is `torch.tensor(..., device=...)`,
    which cannot be seen from here.
    """

    INDEXING = (
        torch.ops.aten.index.Tensor,
        torch.ops.aten.index_put.default,
        torch.ops.aten.index_put_.default,
        torch.ops.aten._index_put_impl_.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        if any(t.device == META for t in tensors):
            assert kwargs.get("non_blocking") or all(t.device == META or not t.ndim for t in tensors), func
        if func in self.INDEXING:
            assert all(index is None or id(index) in self.seen for index in args[1]), "indexing by a list"
        self.seen.update({id(leaf): leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)})
        return out


class CountReads(TorchDispatchMode):
    """Counts operations whose result the host has to know before it goes on."""

    READS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func in self.READS
        return func(*args, **(kwargs or {}))


def without_autocast_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """`meta` is no device that autocast knows, so that asking for its type is an error."""
    enabled: Callable[[str], bool] = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and enabled(kind))
