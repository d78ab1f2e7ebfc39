"""Decisions and failures that all ranks share: branches around collectives depend only on what comes from here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from hopescale.errors import ConfigError, Problem, UserError

T = TypeVar("T")

Failure = tuple[int, tuple[Problem, ...]]
"""Exit code and problems: what of an error can be sent to another rank."""


def decide_on_first(decide: Callable[[], T]) -> T:
    """Let rank 0 decide and give every rank its answer, or its error.

    Raises:
        UserError: what `decide` raised on rank 0, on every rank; an OSError becomes one too.
    """
    answer: list[tuple[object, Failure | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            answer[0] = (decide(), None)
        except (UserError, OSError) as error:
            answer[0] = (None, _sendable(error))
    dist.broadcast_object_list(answer, src=0)
    decision, failure = answer[0]
    if failure is not None:
        raise _received(failure)
    return cast(T, decision)


class Together(AbstractContextManager[None]):
    """A block in which a rank may fail for reasons of its own: a bad shard, a full disk, a taken port.

    At its end the ranks tell each other, by one small all-reduce; if any failed, all raise what the first of them
    raised. The block itself must hold no collective.

    Raises:
        UserError: on every rank; an OSError becomes one too.
    """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Exchange failures; anything but a UserError or OSError passes through and ends the launch."""
        if error is not None and not isinstance(error, UserError | OSError):
            return
        failed = torch.tensor(float(error is not None))
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if failed:
            raise share_failures(error)


def share_failures(error: UserError | OSError | None) -> UserError:
    """What every rank is to raise, all of them knowing already that at least one of them failed.

    Args:
        error: of this rank, if it is one of them.

    Returns:
        The error of the first rank that has one, caused by this rank's own.
    """
    failures: list[Failure | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, None if error is None else _sendable(error))
    shared = _received(next(f for f in failures if f is not None))
    shared.__cause__ = error
    return shared


def check_agreement(values: dict[str, str]) -> None:
    """Refuse to train when ranks hold different things under the same name.

    Raises:
        ConfigError: on every rank, naming what differs and who holds what.
    """
    everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, values)
    held = {name: [theirs[name] for theirs in everyone] for name in values}
    rule, fix = "must be the same on every rank", "start every rank with the same code, overrides and files"
    problems = [
        Problem(name, f"[{', '.join(by_rank)}]", rule, fix) for name, by_rank in held.items() if len(set(by_rank)) > 1
    ]
    if problems:
        raise ConfigError(problems)


def _sendable(error: UserError | OSError) -> Failure:
    if isinstance(error, UserError):
        return error.exit_code, error.problems
    rule = f"{error.strerror or error} ({type(error).__name__})"
    return UserError.exit_code, (
        Problem("file", error.filename, rule, "make room or give this user access, and retry"),
    )


def _received(failure: Failure) -> UserError:
    code, problems = failure
    error = UserError(cast(Sequence[Problem], problems))
    error.exit_code = code
    return error
