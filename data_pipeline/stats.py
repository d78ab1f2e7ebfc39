"""Cumulative numbers of the reader and the sharder; whoever publishes them gives them names and units."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReaderStats:
    """What one reader has done since it was opened.

    Attributes:
        clips_read: Clips handed out, padding clips included.
        bytes_read: Payload bytes read from shards.
        read_seconds: Time spent reading, checking and converting, on whichever thread.
        wait_seconds: Time the consumer spent waiting for a batch.
        checksum_errors: Fields whose bytes did not match their checksum.
    """

    clips_read: int = 0
    bytes_read: int = 0
    read_seconds: float = 0.0
    wait_seconds: float = 0.0
    checksum_errors: int = 0


@dataclass(frozen=True)
class SharderStats:
    """What one run of the sharder has done so far.

    Attributes:
        clips_written: Clips in finished shards.
        bytes_written: Bytes of finished shards.
        shards_written: Finished shards.
        write_seconds: Time since the first clip was read.
    """

    clips_written: int = 0
    bytes_written: int = 0
    shards_written: int = 0
    write_seconds: float = 0.0
