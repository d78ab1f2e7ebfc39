"""hopescale.train, which writes down the clips every rank was handed and may kill itself in the middle.

    torchrun … data_program.py RECORD KILL SETTINGS...

RECORD is a folder; each rank writes `[position, key]` lists of its steps to a file of its own there. KILL is `never` or
`RANK:STEP:WHERE`: that rank sends itself SIGKILL at the run's STEP-th batch (`data`), at the optimizer step after it
(`step`), or while the checkpoint after it is written (`save`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from data_pipeline.batch import StepBatches
from data_pipeline.reader.batches import GlobalBatches
from hopescale import train, trainer
from hopescale.checkpoint.manager import CheckpointManager
from hopescale.parallel.process_group import end_process, read_launch


class Recorded(GlobalBatches):
    """Steps of a run, written down as they are handed out."""

    record: Path
    kill: tuple[int, str] | None
    handed_out = 0

    def __next__(self) -> StepBatches:
        self.die_at("data")
        step = super().__next__()
        handed = [
            (int(position), key)
            for batch in step.micro
            for position, key, weight in zip(batch.positions, batch.keys, batch.weights, strict=True)
            if weight
        ]
        with self.record.open("a") as file:
            file.write(json.dumps([step.position, handed]) + "\n")
        Recorded.handed_out += 1
        return step

    @classmethod
    def die_at(cls, where: str) -> None:
        if cls.kill == (cls.handed_out, where):
            os.kill(os.getpid(), signal.SIGKILL)


def main(record: str, kill: str, settings: list[str]) -> int:
    rank = read_launch().rank
    Recorded.record = Path(record) / f"rank{rank}.jsonl"
    victim, _, place = kill.partition(":")
    step, _, where = place.partition(":")
    Recorded.kill = (int(step), where) if kill != "never" and int(victim) == rank else None

    train_step, save = trainer.train_step, CheckpointManager.save

    def dying_step(*arguments: Any, **named: Any) -> Any:
        Recorded.die_at("step")
        return train_step(*arguments, **named)

    def dying_save(*arguments: Any, **named: Any) -> Any:
        Recorded.die_at("save")
        return save(*arguments, **named)

    trainer.train_step, CheckpointManager.save = dying_step, dying_save
    train.GlobalBatches = Recorded
    return train.main(settings)


if __name__ == "__main__":
    end_process(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
