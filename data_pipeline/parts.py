"""The share of a job that one of several processes does."""

from __future__ import annotations

from data_pipeline.errors import DataError, Problem


def parse_part(part: str, doers: str) -> tuple[int, int]:
    """Return the number of a part and of all parts.

    Args:
        part: `i/n` with i from 0 to n - 1, as `$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT` of an array `0-(n-1)`.
        doers: What does one part each, for the error.

    Raises:
        DataError: It has another form.
    """
    number, _, count = part.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        rule = "must be i/n with i from 0 to n - 1"
        raise DataError(Problem("part", part, rule, f"write part=0/4 to part=3/4 for four {doers}"))
    return int(number), int(count)
