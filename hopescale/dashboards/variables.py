"""Puts values for the variables of a query, as Grafana does when it asks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_VARIABLE = re.compile(r"\$\{?(\w+)\}?")
_SPECIAL = re.compile(r"[\\^$*+?.()|\[\]{}]")


@dataclass(frozen=True)
class Span:
    """The time that is shown, and how finely.

    Attributes:
        start: Unix seconds.
        end: Unix seconds.
        step: seconds between two points.
        scrape_interval: of Prometheus, in seconds.
        chosen: values by label; a label without any is not filtered by.
    """

    start: float
    end: float
    step: float
    scrape_interval: float
    chosen: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def substitute(self, promql: str) -> str:
        """The query as Prometheus understands it.

        Raises:
            KeyError: it has a variable that no dashboard of ours has.
        """
        return _VARIABLE.sub(lambda match: self._value(match.group(1)), promql)

    def _value(self, name: str) -> str:
        match name:
            case "__range":
                return _duration(self.end - self.start)
            case "__interval":
                return _duration(self.step)
            case "__rate_interval":
                # Grafana's rule: a window in which two scrapes lie even where one is missed.
                return _duration(max(self.step + self.scrape_interval, 4 * self.scrape_interval))
            case "cluster" | "run" | "node" | "rank":
                values = self.chosen.get(name)
                return "|".join(map(_literal, values)) if values else ".*"
        raise KeyError(name)


def _duration(seconds: float) -> str:
    return f"{max(round(seconds * 1000), 1)}ms"


def _literal(value: str) -> str:
    """A regular expression that matches the value alone, inside a string of PromQL."""
    return _SPECIAL.sub(r"\\\g<0>", value).replace("\\", "\\\\").replace('"', '\\"')
