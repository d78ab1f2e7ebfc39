"""Clips to verified shards, an index and a manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_pipeline.shard.run import shard

__all__ = ["shard"]


def __getattr__(name: str) -> object:
    # Imported when asked for: the sharder needs the index of data sets, which needs what this package knows of tars.
    if name == "shard":
        from data_pipeline.shard.run import shard

        return shard
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
