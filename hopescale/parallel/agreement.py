"""Decisions that all ranks must share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

from hopescale.errors import ConfigError, Problem, UserError

T = TypeVar("T")


def decide_on_first(decide: Callable[[], T]) -> T:
    """Let rank 0 decide and give every rank its answer, or its error.

    Raises:
        UserError: what `decide` raised on rank 0, on every rank.
    """
    answer: list[object] = [None]
    if dist.get_rank() == 0:
        try:
            answer[0] = decide()
        except UserError as error:
            answer[0] = error
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return cast(T, answer[0])


def check_agreement(values: dict[str, str]) -> None:
    """Refuse to train when ranks hold different things under the same name.

    Raises:
        ConfigError: on every rank, naming what differs and who holds what.
    """
    everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, values)
    problems = [
        Problem(
            name,
            f"[{', '.join(held)}]",
            "must be the same on every rank",
            "start every rank with the same code, overrides and files",
        )
        for name in values
        if len(set(held := [theirs[name] for theirs in everyone])) > 1
    ]
    if problems:
        raise ConfigError(problems)
