"""Activation checkpointing: trade a second forward of a block for its activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(blocks: Sequence[nn.Module], recompute: str) -> None:
    """Wrap each block's forward in place, before sharding, so that a gathered block is what runs again.

    Blocks draw no random numbers and keep nothing between calls, so a second run gives the same bits, and there is
    no generator state to save.
    """
    if recompute == "none":
        return
    for block in blocks:
        block.forward = partial(_recomputed, block.forward)  # type: ignore[method-assign]


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
