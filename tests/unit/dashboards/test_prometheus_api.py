from __future__ import annotations

import json
import math
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from hopescale.dashboards.prometheus_api import PrometheusApi, PrometheusError, QueryRefused, Series, parse_answer

MATRIX = {
    "resultType": "matrix",
    "result": [
        {"metric": {"__name__": "x", "run": "b"}, "values": [[1, "2"], [2.5, "NaN"]]},
        {"metric": {"__name__": "x", "run": "a"}, "values": [[1, "+Inf"]]},
    ],
}


@pytest.fixture
def serve() -> Iterator[Callable[..., PrometheusApi]]:
    """A server that gives every request the same answer, and notes what it was asked."""
    servers = []

    def start(status: int, body: bytes, asked: list[tuple[str, str]] | None = None) -> PrometheusApi:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                if asked is not None:
                    asked.append((self.path, self.rfile.read(length).decode()))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return PrometheusApi(f"http://127.0.0.1:{server.server_port}/prefix/")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def answer(data: object) -> bytes:
    return json.dumps({"status": "success", "data": data}).encode()


def test_a_range_is_posted_and_comes_back_as_series_in_the_order_of_their_labels(serve) -> None:
    asked: list[tuple[str, str]] = []
    first, second = serve(200, answer(MATRIX), asked).query_range('x{run=~".*"}', 0.25, 10, 2.5)
    ((path, body),) = asked
    assert path == "/prefix/api/v1/query_range"
    assert urllib.parse.parse_qs(body) == {
        "query": ['x{run=~".*"}'],
        "start": ["0.250"],
        "end": ["10.000"],
        "step": ["2.500"],
    }
    assert first == Series({"__name__": "x", "run": "a"}, [1.0], [math.inf])
    assert second.times == [1.0, 2.5]
    assert second.values[0] == 2
    assert math.isnan(second.values[1])


def test_values_of_a_label_are_asked_of_the_series_that_match(serve) -> None:
    asked: list[tuple[str, str]] = []
    assert serve(200, answer(["b", "a"]), asked).label_values("run", "x", "y") == ["a", "b"]
    path = urllib.parse.urlsplit(asked[0][0])
    assert path.path == "/prefix/api/v1/label/run/values"
    assert urllib.parse.parse_qs(path.query) == {"match[]": ["x", "y"]}


def test_an_answer_at_one_moment_has_one_sample() -> None:
    vector = {"resultType": "vector", "result": [{"metric": {"run": "a"}, "value": [3, "4"]}]}
    assert parse_answer(vector) == [Series({"run": "a"}, [3.0], [4.0])]
    assert parse_answer({"resultType": "scalar", "result": [3, "4"]}) == [Series({}, [3.0], [4.0])]


@pytest.mark.parametrize("data", [{}, {"resultType": "vector", "result": [{}]}, [], {"resultType": "x", "result": "y"}])
def test_what_is_no_answer_is_named(data) -> None:
    with pytest.raises(PrometheusError, match="must be the data of an answer"):
        parse_answer(data)


def test_a_refused_query_says_what_prometheus_said(serve) -> None:
    body = json.dumps({"status": "error", "errorType": "bad_data", "error": "1:3: parse error"}).encode()
    with pytest.raises(QueryRefused, match=r"x\(\(: Prometheus refused /api/v1/query: 1:3: parse error"):
        serve(400, body).query("x((")


@pytest.mark.parametrize(("status", "body"), [(200, b"<html>"), (200, b"[]"), (200, b'{"ok": true}')])
def test_another_server_is_recognised(serve, status: int, body: bytes) -> None:
    with pytest.raises(PrometheusError, match="what answers there is no Prometheus"):
        serve(status, body).query("up")


def test_a_page_of_a_proxy_is_no_answer(serve) -> None:
    with pytest.raises(PrometheusError, match="no Prometheus answers there"):
        serve(502, b"<html>Bad Gateway").query("up")


def test_nobody_there_is_said_with_the_address(free_port: int) -> None:
    with pytest.raises(PrometheusError, match=rf"127.0.0.1:{free_port}: no Prometheus answers there .*refused"):
        PrometheusApi(f"http://127.0.0.1:{free_port}").query("up")


@pytest.mark.parametrize("url", ["localhost:9090", "ftp://host", "http://", ""])
def test_an_address_must_be_one_of_http(url: str) -> None:
    with pytest.raises(PrometheusError, match="must be the address of a Prometheus"):
        PrometheusApi(url)
