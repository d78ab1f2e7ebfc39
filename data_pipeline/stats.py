"""Cumulative numbers of the reader and the sharder; whoever publishes them gives them names and units."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReaderStats:
    """What one reader has done since it was opened.

    Attributes:
        clips_read: Clips handed out, padding clips included.
        bytes_read: Payload bytes read from shards.
        read_seconds: Time spent reading, checking and aligning, over all threads.
        checksum_seconds: The part of it that went into checksums.
        wait_seconds: Time the consumer spent waiting for a batch.
        copy_seconds: Time the host spent starting copies to the device and decoding there.
        ready_batches: Batches that were ready when the newest one was asked for.
        ring_overflows: Times a batch needed new memory because the consumer kept all there was.
        retries: Clips read again after something was wrong with them.
        checksum_errors: Clips whose bytes did not match their checksum, retries included.
        bad_clips_checksum: Clips given up for their checksum.
        bad_clips_short: Clips given up because their shard ended too early.
        bad_clips_unreadable: Clips given up because the system could not read them.
        epoch: Epoch of the next step, from 0.
        position: Clips that all ranks together were handed.
        cache_hits: Shards found among the copies on the node.
        cache_misses: Shards that had to be fetched.
        cache_fetched_bytes: Bytes fetched.
        cache_evictions: Copies removed to make room.
        cache_bytes: Bytes of the copies there are.
    """

    clips_read: int = 0
    bytes_read: int = 0
    read_seconds: float = 0.0
    checksum_seconds: float = 0.0
    wait_seconds: float = 0.0
    copy_seconds: float = 0.0
    ready_batches: int = 0
    ring_overflows: int = 0
    retries: int = 0
    checksum_errors: int = 0
    bad_clips_checksum: int = 0
    bad_clips_short: int = 0
    bad_clips_unreadable: int = 0
    epoch: int = 0
    position: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    cache_fetched_bytes: int = 0
    cache_evictions: int = 0
    cache_bytes: int = 0


@dataclass(frozen=True)
class SharderStats:
    """What one run of the sharder has done so far.

    Attributes:
        clips: Clips in the shards it has finished.
        bytes: Bytes of these shards.
        shards: Shards it has finished.
        skipped: Clips in shards that an earlier run had finished.
        bad: Clips left out because they cannot be used.
        seconds: Time since the first clip was read.
    """

    clips: int = 0
    bytes: int = 0
    shards: int = 0
    skipped: int = 0
    bad: int = 0
    seconds: float = 0.0
