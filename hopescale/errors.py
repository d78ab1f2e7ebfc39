"""Errors whose cause is outside the program: each names field, value, rule and fix, and carries an exit code."""

from __future__ import annotations

from data_pipeline.errors import DataError, MissingExtra, Problem, UserError, missing_extra

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Diverged",
    "MissingExtra",
    "Problem",
    "UserError",
    "describe",
    "missing_extra",
]

EXIT_DONE = 0
EXIT_NO_CHECKPOINT = 71
EXIT_DIVERGED = 72
EXIT_PREEMPTED = 75


class ConfigError(UserError):
    """The configuration breaks a rule."""


class Diverged(UserError):
    """Training cannot go on: step after step has gradients that are not finite."""

    exit_code = EXIT_DIVERGED


class CheckpointError(UserError):
    """A checkpoint cannot be read or trusted."""

    exit_code = EXIT_NO_CHECKPOINT


def describe(error: UserError) -> str:
    """What a user sees: one paragraph a problem, no traceback."""
    return "\n".join(f"error: {problem}" for problem in error.problems)
