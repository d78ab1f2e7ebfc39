"""Where a run is in its data: about 200 bytes, the same on every rank, enough to go on with any number of ranks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from data_pipeline.errors import DataError, Problem

STATE_FORMAT = 1


@dataclass(frozen=True)
class ReaderState:
    """What a resumed run must agree about with the run before.

    Attributes:
        format: Version of this state.
        data: Fingerprint of the data set.
        view: Digest of the samples that are read.
        alignment: How recorded actions become one per transition.
        order: Digest of the order: mode, mixture, tail; where it depends on them, the shards' clips, the step's size.
        seed: Of the run.
        position: Clips handed to all ranks together; batches read ahead do not count.
    """

    format: int
    data: str
    view: str
    alignment: str
    order: str
    seed: int
    position: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> ReaderState:
        """Return the state in plain values.

        Raises:
            DataError: Fields are missing, unknown or of the wrong type.
        """
        kinds = {field.name: int if field.type == "int" else str for field in fields(cls)}
        if set(saved) != set(kinds) or any(type(saved[name]) is not kind for name, kind in kinds.items()):
            rule = f"must hold {', '.join(kinds)}"
            raise DataError(Problem("reader state", saved, rule, "resume from a checkpoint of this release"))
        return cls(**saved)

    def check_continues(self, saved: ReaderState) -> None:
        """Refuse to go on from a place in other data.

        Raises:
            DataError: All differences.
        """
        meaning = {
            "format": "state of another release",
            "data": "another data set",
            "view": "other clips of it: data.view, data.select, data.window, data.frames or data.skip_list",
            "alignment": "actions aligned in another way: data.action_alignment",
            "order": "another order: data.order, data.order_shards, data.mixture, data.mixture_block or data.tail; "
            "with data.order=windowed clips in other shards, without data.tail=continuous another train.global_batch",
            "seed": "another train.seed",
        }
        problems = [
            Problem(
                f"data: {name}",
                getattr(self, name),
                f"this run counts its position in {what}: {getattr(saved, name)}",
                "resume with what it was trained with, or start a new run",
            )
            for name, what in meaning.items()
            if getattr(self, name) != getattr(saved, name)
        ]
        if problems:
            raise DataError(problems)
