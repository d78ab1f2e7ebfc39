"""Activation checkpointing: trade a second forward of a block, or of its memory's chunks, for their activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from hopescale.model.compat import AcHopeMemory
from hopescale.model.titan import TitanMemory


def recompute_blocks(blocks: Sequence[nn.Module], recompute: str) -> None:
    """Wrap each block's forward, or the step of its memory, in place.

    Before sharding, so that a gathered block is what runs again. Blocks draw no random numbers and keep nothing between
    calls, so a second run gives the same bits, and there is no generator state to save.

    Args:
        blocks: of a predictor.
        recompute: `parallel.recompute`. block keeps the input of a block; chunk keeps, chunk by chunk, the memories of
            every clip and the tokens that are read and written, long-term memories left out; none wraps nothing.
    """
    for block in blocks:
        if recompute == "block":
            block.forward = partial(_recomputed, block.forward)  # type: ignore[method-assign]
        for memory in block.children() if recompute == "chunk" else ():
            if isinstance(memory, TitanMemory | AcHopeMemory):
                memory.step = partial(_recomputed, memory.step)  # type: ignore[method-assign]


def _recomputed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
