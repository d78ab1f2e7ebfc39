"""Folders of checkpoints: those that exist, and those that are being written.

Each incarnation writes into a folder of its own, so that only the newest can commit.

A rank that was cut off from its job may live on for minutes and still reach the shared file system, while Slurm has
started the run anew elsewhere. Asking whether one is the newest and committing then leaves a moment in between. So an
incarnation that begins removes the folders of those before it, and what these write afterwards has no path: their
commit is a rename out of a folder that is gone.
"""

from __future__ import annotations

import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from hopescale.errors import Problem, Superseded

STEP_FOLDER = re.compile(r"step-(\d{9,})")
NAME = re.compile(r"writing-(\d{6,})")


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step-{step:09d}"


def committed(root: Path) -> list[Path]:
    """Folders of committed checkpoints, newest first; what an interrupted save left is not among them."""
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if STEP_FOLDER.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def newest_incarnation(root: Path) -> int:
    """The highest number that has begun to write below a folder of checkpoints; -1 where none has."""
    return max((number for number, _ in _begun(root)), default=-1)


class Staging:
    """Of one incarnation; what earlier ones were writing or deleting is removed.

    Args:
        root: RUN/checkpoints.
        incarnation: of this process; all smaller numbers can commit no more.

    Raises:
        Superseded: a larger number has begun.
    """

    def __init__(self, root: Path, incarnation: int) -> None:
        self.path = root / f"writing-{incarnation:06d}"
        if newest_incarnation(root) > incarnation:
            raise self._superseded()
        self.path.mkdir(parents=True, exist_ok=True)
        for number, earlier in _begun(root):
            if number < incarnation:
                # Renamed first, so that nothing can be renamed out of it while its content is being removed.
                # A rank of an earlier one that lives on may be removing its own.
                with suppress(FileNotFoundError):
                    earlier.rename(root / f"over-{number:06d}-{secrets.token_hex(4)}")
        for left in (*root.glob("over-*"), *root.glob("step-*.trash")):
            with suppress(FileNotFoundError):
                shutil.rmtree(left)

    def fresh_folder(self, name: str) -> Path:
        """An empty folder to write a checkpoint into.

        Raises:
            Superseded: a later incarnation has begun.
        """
        part = self.path / f"{name}.{secrets.token_hex(4)}"
        try:
            part.mkdir()
        except FileNotFoundError:
            raise self._superseded() from None
        return part

    def commit(self, part: Path, target: Path) -> None:
        """Give a written checkpoint its name.

        Raises:
            Superseded: a later incarnation has begun.
        """
        try:
            part.rename(target)
        except FileNotFoundError:
            raise self._superseded() from None

    def clear(self) -> None:
        """Remove what saves that failed have left."""
        for part in self.path.iterdir() if self.path.is_dir() else ():
            shutil.rmtree(part)

    def close(self) -> None:
        """Remove the folder; nothing can be saved any more."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _superseded(self) -> Superseded:
        rule = "a later incarnation of this run has begun, so nothing can be saved here any more"
        return Superseded(Problem("checkpoint", self.path, rule, "end this process; the later one goes on"))


def _begun(root: Path) -> list[tuple[int, Path]]:
    found = ((NAME.fullmatch(path.name), path) for path in (root.iterdir() if root.is_dir() else ()))
    return [(int(match[1]), path) for match, path in found if match is not None]
