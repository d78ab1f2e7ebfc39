"""Asks a Prometheus over its HTTP API (https://prometheus.io/docs/prometheus/latest/querying/api/)."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from data_pipeline.errors import Problem, UserError


class PrometheusError(UserError):
    """A Prometheus that does not answer, or an answer that is none."""


class QueryRefused(PrometheusError):
    """Prometheus understood the request and refused it, for example a query that is no PromQL."""


@dataclass(frozen=True)
class Series:
    """One series of an answer.

    Attributes:
        labels: names and values, `__name__` included where the query keeps it.
        times: Unix seconds, ascending.
        values: one a time; NaN and infinities as Prometheus has them.
    """

    labels: Mapping[str, str]
    times: Sequence[float]
    values: Sequence[float]


class PrometheusApi:
    """A Prometheus server.

    Args:
        url: up to its API, a path prefix included, for example `http://127.0.0.1:9090`.
        timeout_seconds: for each request.

    Raises:
        PrometheusError: the address is not one of http or https.
    """

    def __init__(self, url: str, timeout_seconds: float = 30.0) -> None:
        self.url = url.rstrip("/")
        self.timeout_seconds = timeout_seconds
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            rule = "must be the address of a Prometheus"
            raise PrometheusError(Problem("prometheus", url, rule, "write it like http://127.0.0.1:9090"))

    def get(self, path: str, **parameters: str | Sequence[str]) -> Any:
        """The `data` of an answer of `/api/v1/PATH`, as JSON.

        Args:
            path: for example `targets` or `label/run/values`.
            **parameters: of the request; several values of one name as a sequence. A name that ends in an underscore
                goes without it, and `match` as Prometheus writes it, `match[]`.

        Raises:
            PrometheusError: no answer, or not one of Prometheus.
            QueryRefused: Prometheus answered with an error.
        """
        return self._ask(path, parameters, post=False)

    def query(self, query: str, time: float | None = None) -> list[Series]:
        """The value of an expression at one moment (now, when None); of a range selector, its raw samples.

        Args:
            query: PromQL.
            time: Unix seconds.

        Raises:
            PrometheusError: see `get`.
        """
        moment = {} if time is None else {"time": f"{time:.3f}"}
        return parse_answer(self._ask("query", {"query": query, **moment}, post=True))

    def query_range(self, query: str, start: float, end: float, step: float) -> list[Series]:
        """The values of an expression from `start` to `end`, one every `step` seconds.

        Args:
            query: PromQL.
            start: Unix seconds.
            end: Unix seconds, included.
            step: seconds.

        Raises:
            PrometheusError: see `get`.
        """
        return parse_answer(self.query_range_answer(query, start, end, step))

    def query_range_answer(self, query: str, start: float, end: float, step: float) -> dict[str, Any]:
        """As `query_range`, the `data` of the answer as it came, for `parse_answer`."""
        span = {"start": f"{start:.3f}", "end": f"{end:.3f}", "step": f"{step:.3f}"}
        return self._ask("query_range", {"query": query, **span}, post=True)

    def label_values(self, label: str, *selectors: str) -> list[str]:
        """Values of a label, of all series or of those that a selector matches, sorted.

        Raises:
            PrometheusError: see `get`.
        """
        return sorted(self.get(f"label/{label}/values", match=selectors))

    def _ask(self, path: str, parameters: Mapping[str, str | Sequence[str]], *, post: bool) -> Any:
        named = {"match[]" if name == "match" else name.rstrip("_"): value for name, value in parameters.items()}
        fields = urllib.parse.urlencode(named, doseq=True)
        address = f"{self.url}/api/v1/{path}"
        # Posted, a query may be longer than what servers take as an address.
        request = urllib.request.Request(address, fields.encode()) if post else f"{address}?{fields}"
        try:
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_seconds) as answer:
                    content = answer.read()
            except urllib.error.HTTPError as error:
                content = error.read()
                if not content.lstrip().startswith(b"{"):
                    raise
            document = json.loads(content)
            if document["status"] == "success":
                return document["data"]
            refused = f"Prometheus refused /api/v1/{path}: {document['error']}"
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            rule = f"no Prometheus answers there ({reason})"
            fix = "start it, or name the address of the one that scrapes the run"
            raise PrometheusError(Problem("prometheus", self.url, rule, fix)) from error
        except (ValueError, KeyError, TypeError) as error:
            rule = "what answers there is no Prometheus"
            raise PrometheusError(Problem("prometheus", self.url, rule, "name the address of one")) from error
        fix = "ask by hand at that address, and see whether its version knows the function"
        raise QueryRefused(Problem("prometheus", parameters.get("query", self.url), refused, fix))


def parse_answer(data: Mapping[str, Any]) -> list[Series]:
    """The series in the `data` of an answer to `query` or `query_range`, ordered by their labels.

    Raises:
        PrometheusError: it is none.
    """
    try:
        kind, result = data["resultType"], data["result"]
        if kind == "scalar":
            result = [{"metric": {}, "value": result}]
        samples = [(entry["metric"], entry.get("values") or [entry["value"]]) for entry in result]
        series = [
            Series(dict(labels), [float(time) for time, _ in values], [float(value) for _, value in values])
            for labels, values in samples
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        rule = "must be the data of an answer to query or query_range"
        raise PrometheusError(Problem("answer", str(data)[:80], rule, "save it again")) from error
    return sorted(series, key=lambda one: sorted(one.labels.items()))
