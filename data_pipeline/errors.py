"""What a user sees when a setting or a file is wrong: the field, its value, the rule and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, in the four parts a reader needs to repair it.

    Attributes:
        field: Dotted name of the setting, or of the entry in a file.
        value: What was found there.
        rule: What must hold, as a sentence without a final full stop.
        fix: What to do about it.
    """

    field: str
    value: object
    rule: str
    fix: str

    def __str__(self) -> str:
        """Return `field=value: rule. Fix: fix` on one line."""
        text = f"{self.field}={self.value}: {self.rule}. Fix: {self.fix}"
        return " ".join(text.split())


class UserError(Exception):
    """A mistake outside the program: shown without a traceback, all problems at once, never worth a requeue."""

    exit_code: int = 2

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        """Take one problem or several."""
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        """Return one line for each problem."""
        return "\n".join(str(problem) for problem in self.problems)


class DataError(UserError):
    """A data set, clip file or data setting that cannot be used as it is."""


class MissingExtra(UserError):
    """A Python package of an optional extra is not installed."""


def missing_extra(package: str, extra: str, needed_for: str) -> MissingExtra:
    """Return the error for an absent optional package.

    Args:
        package: Import name of the package, e.g. `pymunk`.
        extra: Name of the extra of hopescale that installs it.
        needed_for: What the user was about to do, e.g. `simulating clips`.
    """
    return MissingExtra(
        Problem(
            package, "not installed", f"the package is needed for {needed_for}", f"pip install 'hopescale[{extra}]'"
        )
    )


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a phrase that names the valid spelling closest to `name`, then all of them."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}valid: {', '.join(names) if names else 'none'}"
