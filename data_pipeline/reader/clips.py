"""An opened data set: its clips at random, without a copy, for validation and notebooks."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import time
from collections import OrderedDict
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.alignment import ActionAlignment, rows_needed
from data_pipeline.batch import Clip, ClipBatch, collate
from data_pipeline.dataset.index import Index
from data_pipeline.dataset.manifest import MEAN_FRAME_FILE
from data_pipeline.dataset.use import check_use
from data_pipeline.dataset.view import check_parts, open_view
from data_pipeline.dtypes import STORED_TYPES
from data_pipeline.errors import DataError, Problem
from data_pipeline.reader.counters import Counters
from data_pipeline.reader.fill import BadClip, ClipFields
from data_pipeline.reader.shard_reads import MAX_OPEN
from data_pipeline.reader.storage import open_dataset
from data_pipeline.schema import DataConfig, Split
from data_pipeline.shard.convert import all_finite
from data_pipeline.stats import ReaderStats


class ClipReader:
    """Random access to the clips of one split, restricted to the view of the settings.

    Rows 0 .. num_clips - 1 follow the order of the shards; use `GlobalBatches` for the order of training.

    Attributes:
        config: The data settings.
        split: train or heldout.
        seed: Of the training order.
        folder: Local folder of the manifest and the index.
        manifest: What the data set says about itself.
        store: Where shards come from.
        view: The samples.
        alignment: How recorded actions become one per transition.
        num_clips: Samples in the view.
        frames: Stored frames of a batch, F.
        tokens: Patch tokens of a frame, N.
        encoder_dim: Channels of a token, E.
        action_dim: Numbers in an action, A.
        state_dim: Numbers in a state, S; 0 when there are none.
        extrinsics_dim: Numbers in a camera's extrinsics, X; 0 when there are none.
        uids: u64 `[num_clips]`, identities of the samples.
        lengths: i64 `[num_clips]`, valid frames, at most `frames`.
        counters: Running totals.
    """

    def __init__(self, config: DataConfig, *, split: Split, seed: int) -> None:
        """Open a data set.

        Args:
            config: The data settings; `path` names the data set.
            split: train or heldout.
            seed: Seed of the training order.

        Raises:
            DataError: The data set is damaged or does not fit the settings.
        """
        self.config = config
        self.split: Split = split
        self.seed = seed
        opened = open_dataset(config)
        self.folder, self.manifest, self.store = opened.folder, opened.manifest, opened.store
        check_use(self.manifest, config, split)
        self.view = open_view(Index(self.folder, self.manifest), self.manifest, config, split)
        self.alignment: ActionAlignment = config.action_alignment or self.manifest.action_alignment
        self._check_alignment()
        if split == "train":
            check_parts(self.view, config)
        self.num_clips = len(self.view)
        longest = config.window.frames if config.window else self.manifest.frames
        self.frames = min(config.frames or longest, longest)
        self.tokens = self.manifest.tokens
        self.encoder_dim = self.manifest.encoder_dim
        self.action_dim = self.manifest.action_dim
        self.state_dim = self.manifest.state_dim
        self.extrinsics_dim = self.manifest.extrinsics_dim
        self.uids: NDArray[np.uint64] = self.view.uids
        self.lengths: NDArray[np.int64] = self.view.lengths
        self.counters = Counters()
        self._maps: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()

    @cached_property
    def keys(self) -> list[str]:
        """Key of each clip; a window's first frame follows an @."""
        every = self.view.index.keys()
        keys = [every[clip] for clip in self.view.clips]
        if not self.view.windowed:
            return keys
        return [f"{key}@{start}" for key, start in zip(keys, self.view.starts.tolist(), strict=True)]

    @cached_property
    def partitions(self) -> list[str]:
        """Partition of each clip."""
        return [self.view.partition_names[code] for code in self.view.partition_codes]

    @cached_property
    def fields(self) -> ClipFields:
        """Where clips lie in the shards."""
        return ClipFields(self.manifest, self.view, check=self.config.reader.checksums)

    def clip(self, row: int) -> Clip:
        """Return one clip; features are a view of the mapped shard, private to this process and not copied.

        A shard that is cut short while it is mapped ends the process: for files that may change, use `GlobalBatches`.

        Raises:
            DataError: Bytes differ from their checksum, values are not finite, or the shard is not what the manifest
                says.
        """
        content = {name: self._checked(row, name) for name in self.manifest.dtypes}
        small = {
            name: torch.from_numpy(self.fields.small(row, name, content[name], self.alignment))
            for name in ("actions", "states", "extrinsics")
            if name in content
        }
        kind = STORED_TYPES[self.manifest.dtypes["features"]]
        features = torch.from_numpy(content["features"]).view(kind.torch).view(-1, self.tokens, self.encoder_dim)
        scale = content.get("features_scale")
        return Clip(
            self.view.key(row),
            self.view.partition(row),
            features,
            small["actions"],
            small.get("states"),
            small.get("extrinsics"),
            None if scale is None else torch.from_numpy(scale.view(np.float32)),
        )

    def read(self, rows: NDArray[np.int64], positions: NDArray[np.int64] | None = None) -> ClipBatch:
        """Read clips, verified against their checksums, in the stored type; `ClipBatch.to` decodes them.

        Args:
            rows: i64 `[B]`, rows of this reader.
            positions: i64 `[B]`, global sample positions; the rows themselves when absent.

        Raises:
            DataError: A clip's bytes are not those that were written.
        """
        started = time.monotonic()
        clips = [self.clip(int(row)) for row in rows]
        batch = collate(clips, self.frames, rows if positions is None else positions)
        self.counters.add(clips_read=len(clips), read_seconds=time.monotonic() - started)
        return batch

    def read_actions(self, rows: NDArray[np.int64]) -> Tensor:
        """Read the actions of clips alone: f32 `[B, T, A]` as in `read`, without the cost of their features.

        Args:
            rows: i64 `[B]`, rows of this reader.

        Raises:
            DataError: A clip's bytes are not those that were written.
        """
        started = time.monotonic()
        actions = torch.zeros(len(rows), self.frames - 1, self.action_dim)
        for number, row in enumerate(rows.tolist()):
            own = self.fields.small(row, "actions", self._checked(row, "actions"), self.alignment)
            actions[number, : len(own)] = torch.from_numpy(own)
        self.counters.add(read_seconds=time.monotonic() - started)
        return actions

    def mean_frame(self) -> Tensor:
        """Return f32 `[N, E]`: the mean of the layer-normalised training frames of the data set."""
        return torch.from_numpy(np.load(self.folder / MEAN_FRAME_FILE, allow_pickle=False))

    def fingerprint(self) -> str:
        """Return hex digits that two ranks share exactly when they read the same clips in the same order."""
        config = self.config.model_dump(mode="json", include={"order", "order_shards", "mixture", "mixture_block"})
        parts = [self.manifest.fingerprint, self.view.digest, self.frames, self.alignment, self.seed, config]
        parts += [self.config.tail, self.view.shards_digest if self.config.order == "windowed" else ""]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def stats(self) -> ReaderStats:
        """Return what has been done since the reader was opened."""
        cache = self.store.stats()
        self.counters.set(
            cache_hits=cache.hits,
            cache_misses=cache.misses,
            cache_fetched_bytes=cache.fetched_bytes,
            cache_evictions=cache.evictions,
            cache_bytes=cache.cached_bytes,
        )
        return self.counters.stats()

    def close(self) -> None:
        """Let go of the shards; clips that are still used stay valid. Staged shards cannot be read any more."""
        self._maps.clear()
        self.store.close()

    def _check_alignment(self) -> None:
        """Check that another alignment than the data set's suits the rows that were recorded.

        Raises:
            DataError: Names the first clip that has too few or too many.
        """
        if self.alignment == self.manifest.action_alignment:
            return
        clips = self.view.clips
        stored, rows = (self.view.index.column(name)[clips].astype(np.int64) for name in ("length", "rows"))
        for frames in np.unique(stored).tolist():
            least, most = rows_needed(self.alignment, frames)
            wrong = (stored == frames) & ((rows < least) | (most is not None and rows > (most or 0)))
            if wrong.any():
                row = int(np.flatnonzero(wrong)[0])
                wanted = f"{least}" if most == least else f"at least {least}"
                rule = f"clip {self.view.key(row)} has {frames} frames and {rows[row]} rows of actions, not {wanted}"
                fix = f"leave it out: the data set's own is {self.manifest.action_alignment}"
                raise DataError(Problem("data.action_alignment", self.alignment, rule, fix))

    def _checked(self, row: int, name: str) -> NDArray[np.uint8]:
        offset, nbytes = self.fields.span(row, name)
        content = self._map(self.fields.shard(row))[offset : offset + nbytes]
        self.counters.add(bytes_read=len(content))
        try:
            if len(content) < nbytes:
                raise BadClip(f"{self.fields.shard_name(row)} ends within field {name}", kind="short")
            self.fields.verify(row, name, content)
            kind = self.manifest.dtypes[name]
            if self.fields.check and not all_finite(content.view(STORED_TYPES[kind].numpy), kind):
                raise BadClip(
                    f"field {name} of {self.fields.shard_name(row)} holds values that are not finite", kind="checksum"
                )
        except BadClip as error:
            self.counters.add(**{f"bad_clips_{error.kind}": 1, "checksum_errors": int(error.kind == "checksum")})
            raise self.fields.error(row, self.store.where(self.fields.shard(row)), str(error)) from None
        return content

    def _map(self, shard: int) -> NDArray[np.uint8]:
        if shard not in self._maps:
            if not self._maps:
                self.store.expect(list(dict.fromkeys(self.view.shards.tolist())))
            descriptor = self.store.open(shard)
            try:
                # Copy on write: torch wants memory that may be written, and the file must not change.
                pages = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
            finally:
                os.close(descriptor)
            if len(self._maps) >= MAX_OPEN:
                self._maps.popitem(last=False)
            self._maps[shard] = np.frombuffer(pages, np.uint8)
        self._maps.move_to_end(shard)
        return self._maps[shard]
