"""Errors whose cause is outside the program: each names field, value, rule and fix, and carries an exit code."""

from __future__ import annotations

from data_pipeline.errors import DataError, MissingExtra, Problem, UserError, missing_extra

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Disagreement",
    "Diverged",
    "MissingExtra",
    "Problem",
    "Superseded",
    "UserError",
    "describe",
    "missing_extra",
]

EXIT_DONE = 0
EXIT_NO_CHECKPOINT = 71
EXIT_DIVERGED = 72
EXIT_CORRUPTED = 73
EXIT_SUPERSEDED = 74
EXIT_PREEMPTED = 75


class ConfigError(UserError):
    """The configuration breaks a rule."""


class Diverged(UserError):
    """Training cannot go on: step after step has gradients that are not finite."""

    exit_code = EXIT_DIVERGED


class Disagreement(UserError):
    """Ranks that must hold the same numbers do not."""

    exit_code = EXIT_CORRUPTED


class Superseded(UserError):
    """A later incarnation has taken the run over, so this one must not write any more."""

    exit_code = EXIT_SUPERSEDED


class CheckpointError(UserError):
    """A checkpoint cannot be read or trusted."""

    exit_code = EXIT_NO_CHECKPOINT


def describe(error: UserError) -> str:
    """What a user sees: one paragraph a problem, no traceback."""
    return "\n".join(f"error: {problem}" for problem in error.problems)
