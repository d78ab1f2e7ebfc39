"""Clips for torch's DataLoader, for whoever wants its samplers; the ring of `GlobalBatches` is faster and resumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from data_pipeline.batch import Clip, ClipBatch, collate
from data_pipeline.reader.clips import ClipReader
from data_pipeline.schema import DataConfig, Split


class ClipDataset(Dataset[Clip]):
    """Map-style data set over one split; opens its shards anew in every worker process.

    `DataLoader(dataset, batch_size=8, collate_fn=dataset.collate)` gives `ClipBatch`es in the stored type.
    """

    def __init__(self, config: DataConfig, *, split: Split, seed: int = 0) -> None:
        """Open a data set.

        Args:
            config: The data settings.
            split: train or heldout.
            seed: Of the training order, which only the reader's fingerprint shows here.

        Raises:
            DataError: The data set is damaged or does not fit the settings.
        """
        self._arguments = (config, split, seed)
        self.reader = ClipReader(config, split=split, seed=seed)

    def __len__(self) -> int:
        """Return the number of clips."""
        return self.reader.num_clips

    def __getitem__(self, row: int) -> Clip:
        """Return one clip, a view of the mapped shard.

        Raises:
            IndexError: There is no such row.
            DataError: A clip's bytes are not those that were written.
        """
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} clips")
        return self.reader.clip(row % len(self))

    def __getitems__(self, rows: Sequence[int]) -> list[Clip]:
        """Return the clips of one batch."""
        return [self[row] for row in rows]

    def collate(self, clips: Sequence[Clip]) -> ClipBatch:
        """Return clips as one batch, padded to the frames of the data set; for `collate_fn`."""
        return collate(clips, self.reader.frames, np.full(len(clips), -1))

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process opens the data set from."""
        return {"arguments": self._arguments}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the data set in this process."""
        config, split, seed = state["arguments"]
        self.__init__(config, split=split, seed=seed)
