from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pytest

from data_pipeline.dataset.index import Index
from data_pipeline.dataset.manifest import load_manifest
from data_pipeline.errors import DataError, MissingExtra
from data_pipeline.reader import fetching, remote
from data_pipeline.reader.address import RemoteFolder, data_address, without_secrets
from data_pipeline.reader.staging import StagedShards
from data_pipeline.reader.storage import OpenedDataset, open_dataset
from data_pipeline.schema import DataConfig
from tests.small_dataset import rewrite_manifest, write_dataset

needs_remote = pytest.mark.requires("remote")
LONG = 200_000


class Server(ThreadingHTTPServer):
    """Serves a folder of this machine, with faults by path."""

    daemon_threads = True
    # A short queue makes the eighth connection wait for a second.
    request_queue_size = 64

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.requests: list[str] = []
        self.encodings: set[str] = set()
        self.faults: dict[str, list[str]] = {}
        self.url = f"http://127.0.0.1:{self.server_port}/data"


class _Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append(self.path)
        self.server.encodings.add(self.headers["Accept-Encoding"])
        faults = self.server.faults.get(path, [])
        fault = (faults.pop(0) if len(faults) > 1 else faults[0]) if faults else "none"
        name = self.server.folder / path.removeprefix("/data/").removeprefix("/moved/")
        if fault.startswith("to "):
            self.send_response(302)
            self.send_header("Location", fault.removeprefix("to "))
            self.end_headers()
        elif fault.isdigit():
            self.send_error(int(fault))
        elif not name.is_file():
            self.send_error(404)
        else:
            self._send(name.read_bytes(), fault)

    def _send(self, content: bytes, fault: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        if fault == "endless":
            content = bytes(LONG)
            self.close_connection = True
        self.end_headers()
        try:
            self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        except ConnectionError:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def server(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(fetching, "PAUSES", (0, 0))
    with Server(Path(shutil.copytree(written, tmp_path / "served"))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def _open(url: str, node: Path, **settings: Any) -> OpenedDataset:
    settings = {"allowed_schemes": ["http"], "staging": {"folder": str(node)}} | settings
    return open_dataset(DataConfig.model_validate({"path": url, **settings}))


def _read(opened: OpenedDataset, shard: int) -> bytes:
    with os.fdopen(opened.store.open(shard), "rb") as file:
        return file.read()


def _error(url: str, node: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        _open(url, node, **settings)
    assert "Fix: " in str(caught.value)
    return str(caught.value)


@needs_remote
def test_a_data_set_behind_http_is_the_one_on_disk(server: Server, written: Path, tmp_path: Path) -> None:
    opened = _open(server.url, tmp_path / "node")
    assert opened.manifest == load_manifest(written)
    assert list(Index(opened.folder, opened.manifest).rows()) == list(Index(written, opened.manifest).rows())
    assert tmp_path / "node" in opened.folder.parents
    assert not any(path.startswith("/data/shards") for path in server.requests)
    # Compressed on the way, a file could not be held against its size.
    assert server.encodings == {"identity"}
    for number, entry in enumerate(opened.manifest.shards):
        assert _read(opened, number) == (written / "shards" / entry.name).read_bytes()
        assert opened.store.where(number) == f"{server.url}/shards/{entry.name}"
    opened.store.close()


@needs_remote
def test_a_second_run_asks_for_the_manifest_alone(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        opened = _open(server.url, tmp_path / "node")
        _read(opened, 0)
        opened.store.close()
    counted = Counter(server.requests)
    assert counted.pop("/data/manifest.json") == 2
    assert set(counted.values()) == {1}


@needs_remote
def test_processes_of_a_node_fetch_the_index_once(server: Server, tmp_path: Path) -> None:
    def use() -> None:
        _open(server.url, tmp_path / "node").store.close()

    processes = [multiprocessing.get_context("fork").Process(target=use) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    counted = Counter(server.requests)
    assert counted.pop("/data/manifest.json") == 3
    assert set(counted.values()) == {1}


@needs_remote
def test_a_data_set_that_changed_is_another_one(server: Server, tmp_path: Path) -> None:
    first = _open(server.url, tmp_path / "node")
    shutil.rmtree(server.folder)
    write_dataset(server.folder, seed=1)
    second = _open(server.url, tmp_path / "node")
    assert first.folder != second.folder
    assert first.manifest.fingerprint != second.manifest.fingerprint
    assert load_manifest(first.folder, shards=False) == first.manifest


@needs_remote
@pytest.mark.parametrize("damage", ["uid.npy", "../manifest.json", "../keys.txt"])
def test_a_damaged_index_on_the_node_is_fetched_again(server: Server, tmp_path: Path, damage: str) -> None:
    opened = _open(server.url, tmp_path / "node")
    (opened.folder / "index" / damage).write_bytes(b"x")
    again = _open(server.url, tmp_path / "node")
    assert again.folder == opened.folder
    assert load_manifest(again.folder, shards=False) == opened.manifest


@needs_remote
def test_a_manifest_that_was_edited_on_the_node_is_fetched_again(server: Server, tmp_path: Path) -> None:
    opened = _open(server.url, tmp_path / "node")
    rewrite_manifest(opened.folder, seed=99)
    assert load_manifest(opened.folder, shards=False).seed == 99
    again = _open(server.url, tmp_path / "node")
    assert load_manifest(again.folder, shards=False) == opened.manifest


@needs_remote
def test_an_interrupted_fetch_leaves_no_data_set(server: Server, tmp_path: Path) -> None:
    server.faults["/data/keys.txt"] = ["403"]
    _error(server.url, tmp_path / "node")
    datasets = next((tmp_path / "node").glob("hopescale-*/datasets"))
    assert list(datasets.iterdir()) == []
    name = hashlib.sha256((server.folder / "manifest.json").read_bytes()).hexdigest()[:16]
    (datasets / f".{name}-left").mkdir()
    server.faults.clear()
    opened = _open(server.url, tmp_path / "node")
    assert list(datasets.iterdir()) == [opened.folder] == [datasets / name]


@needs_remote
@pytest.mark.parametrize(
    ("path", "fault", "expected", "requests"),
    [
        ("/data/manifest.json", "404", "the server has no such file", 1),
        ("/data/manifest.json", "403", "the server answers 403 Forbidden", 1),
        ("/data/manifest.json", "503", "the server answers 503 Service Unavailable (3 tries)", 3),
        ("/data/manifest.json", "cut", "ClientPayloadError", 3),
        ("/data/keys.txt", "500", "the server answers 500 Internal Server Error (3 tries)", 3),
        ("/data/keys.txt", "cut", "ClientPayloadError", 3),
        ("/data/index/uid.npy", "404", "the server has no such file", 1),
    ],
)
def test_what_the_server_says_is_told(
    server: Server, tmp_path: Path, path: str, fault: str, expected: str, requests: int
) -> None:
    server.faults[path] = [fault]
    text = _error(server.url, tmp_path / "node")
    assert expected in text
    assert f"data.path={server.url}{path.removeprefix('/data')}: " in text
    assert server.requests.count(path) == requests


@needs_remote
def test_a_server_that_fails_now_and_then_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.faults = {
        "/data/manifest.json": ["503", "cut", "none"],
        "/data/keys.txt": ["500", "none"],
        "/data/shards/train-000000.tar": ["cut", "502", "none"],
    }
    opened = _open(server.url, tmp_path / "node")
    assert hashlib.sha256(_read(opened, 0)).hexdigest() == opened.manifest.shards[0].sha256
    opened.store.close()


@needs_remote
def test_another_content_is_refused(server: Server, tmp_path: Path) -> None:
    opened = _open(server.url, tmp_path / "node")
    path = server.folder / "shards" / opened.manifest.shards[2].name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"shard train-000002\.tar.*its sha256 is .*, the manifest says"):
        opened.store.open(2)
    (server.folder / "keys.txt").write_bytes((server.folder / "keys.txt").read_bytes().replace(b"0", b"1", 1))
    assert "its sha256 is" in _error(server.url, tmp_path / "other")


@needs_remote
@pytest.mark.parametrize("size", ["keys.txt", "mean_frame.npy", "index/length.npy"])
def test_a_file_longer_than_the_manifest_allows_is_not_kept(server: Server, tmp_path: Path, size: str) -> None:
    (server.folder / size).write_bytes(bytes(10 * LONG))
    text = _error(server.url, tmp_path / "node")
    assert "it has more than" in text
    assert f"{server.url}/{size}" in text


@needs_remote
def test_a_manifest_longer_than_any_is_not_read_to_its_end(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "MAX_MANIFEST", LONG)
    (server.folder / "manifest.json").write_bytes(bytes(10 * LONG))
    assert f"it has more than {LONG} bytes" in _error(server.url, tmp_path / "node")


@needs_remote
@pytest.mark.parametrize(
    "changes",
    [
        {"files": {"../../evil.npy": "0" * 64}},
        {"files": {"/etc/passwd": "0" * 64}},
        {"files": {"index/../../evil.npy": "0" * 64}},
        {"shard_folder": "../../.."},
        {"shard_folder": "file:///etc"},
        {"num_clips": 1 << 60},
        {"shards": [{"name": "../evil.tar", "bytes": 1024, "num_clips": 16, "sha256": "0" * 64}]},
    ],
)
def test_a_manifest_that_leads_elsewhere_is_refused_before_anything_is_fetched(
    server: Server, tmp_path: Path, changes: dict[str, Any]
) -> None:
    rewrite_manifest(server.folder, **changes)
    text = _error(server.url, tmp_path / "node")
    assert "manifest.json" in text
    assert server.requests == ["/data/manifest.json"]
    assert list((tmp_path / "node").rglob("*evil*")) == []


@needs_remote
def test_a_redirect_is_followed_to_allowed_schemes_alone(server: Server, tmp_path: Path) -> None:
    server.faults["/data/keys.txt"] = ["to /moved/keys.txt"]
    _open(server.url, tmp_path / "node").store.close()
    assert "/moved/keys.txt" in server.requests
    for target in ("file:///etc/passwd", "https://127.0.0.1:1/keys.txt?token=secret", "ftp://127.0.0.1/keys.txt"):
        server.faults["/data/keys.txt"] = [f"to {target}"]
        text = _error(server.url, tmp_path / target[:4])
        assert "redirects to" in text
        assert "secret" not in text


@needs_remote
def test_a_server_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "PAUSES", (0, 0))
    text = _error("http://127.0.0.1:9/data?token=secret", tmp_path)
    assert "data.path=http://127.0.0.1:9/data/manifest.json: ClientConnectorError" in text
    assert "secret" not in text


@needs_remote
def test_the_query_goes_with_every_request_and_into_no_message(server: Server, tmp_path: Path) -> None:
    opened = _open(f"{server.url}/?token=secret", tmp_path / "node")
    _read(opened, 0)
    assert all(request.endswith("?token=secret") for request in server.requests)
    assert "secret" not in opened.store.where(0)
    server.faults["/data/shards/train-000001.tar"] = ["401"]
    with pytest.raises(DataError) as caught:
        opened.store.open(1)
    assert "401" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "secret" not in "".join(traceback.format_exception(caught.value))
    opened.store.close()


@needs_remote
def test_s3_is_read_through_fsspec(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem
    from fsspec.registry import _registry

    class Bucket(MemoryFileSystem):
        protocol = "s3"
        store: ClassVar[dict[str, Any]] = {}
        pseudo_dirs: ClassVar[list[str]] = [""]

    monkeypatch.setitem(_registry, "s3", Bucket)
    for path in written.rglob("*"):
        if path.is_file():
            Bucket().pipe_file(f"s3://bucket/sets/a/{path.relative_to(written)}", path.read_bytes())
    opened = _open("s3://bucket/sets/a/", tmp_path, allowed_schemes=["s3"])
    assert isinstance(opened.store, StagedShards)
    assert opened.manifest == load_manifest(written)
    assert hashlib.sha256(_read(opened, 1)).hexdigest() == opened.manifest.shards[1].sha256
    assert opened.store.where(1) == f"s3://bucket/sets/a/shards/{opened.manifest.shards[1].name}"
    opened.store.close()
    Bucket().rm("s3://bucket/sets/a/manifest.json")
    assert "no such file" in _error("s3://bucket/sets/a", tmp_path, allowed_schemes=["s3"])


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingExtra, match=r"hopescale\[remote\]"):
        _open("https://example.org/data", tmp_path, allowed_schemes=["https"])


def test_a_remote_data_set_needs_a_folder_on_the_node(tmp_path: Path) -> None:
    text = _error("https://example.org/data?token=secret", tmp_path, allowed_schemes=["https"], staging={})
    assert "data.staging.folder=None: https://example.org/data is read through copies" in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("path", "allowed", "expected"),
    [
        (None, ["file"], "no data set is named"),
        ("https://example.org/x", ["file"], "the scheme https is not one of data.allowed_schemes=['file']"),
        ("http://example.org/x", ["https"], "the scheme http is not one of"),
        ("s3://bucket/x", ["file", "http"], "the scheme s3 is not one of"),
        ("/data", ["https"], "the scheme file is not one of"),
        ("pipe:cat /etc/passwd", ["file"], "the scheme pipe is not supported"),
        ("pipe:cat /etc/passwd", ["file", "pipe"], "data.allowed_schemes=pipe: is not supported"),
        ("gopen:x", ["file"], "the scheme gopen is not supported"),
        ("gs://bucket/x", ["gs"], "data.allowed_schemes=gs: is not supported"),
        ("ftp://user:secret@example.org/x", ["file"], "the scheme ftp is not supported"),
        ("simplecache::s3://bucket/x", ["s3"], "the scheme simplecache is not supported"),
        ("memory://x", ["file"], "the scheme memory is not supported"),
        ("file://elsewhere/x", ["file"], "names a file of this machine"),
        ("https://user:secret@example.org/x", ["https"], "a URL with a user or password is not taken"),
        ("https://user:sec/ret@example.org/x", ["https"], "not well formed"),
        ("https://user:sec?ret@example.org/x", ["https"], "not well formed"),
        ("https://example.org:port/x", ["https"], "not well formed"),
        ("https:///x", ["https"], "names no server"),
        ("https://example.org/x#part", ["https"], "names no server, or has a part after #"),
        ("https://example.org/x y", ["https"], "no spaces"),
        ("https://example.org/x\ny", ["https"], "no spaces"),
    ],
)
def test_paths_that_name_no_usable_place_are_refused(path: str | None, allowed: list[str], expected: str) -> None:
    with pytest.raises(DataError) as caught:
        data_address(DataConfig(path=path, allowed_schemes=tuple(allowed)))
    text = str(caught.value)
    assert expected in text
    assert "secret" not in text
    assert "sec" not in text.replace("second", "")


def test_paths_and_urls_name_folders() -> None:
    assert data_address(DataConfig(path="/a/b")) == Path("/a/b")
    assert data_address(DataConfig(path="~/b")) == Path.home() / "b"
    assert data_address(DataConfig(path="a:b/c")) == Path("a:b/c")
    assert data_address(DataConfig(path="file:///a/b%20c")) == Path("/a/b c")
    for path, file in [
        ("https://example.org/a/", "https://example.org/a/index/uid.npy"),
        ("https://example.org", "https://example.org/index/uid.npy"),
        ("HTTPS://example.org:8443/a?x=1&y=2", "https://example.org:8443/a/index/uid.npy?x=1&y=2"),
        ("https://[::1]:80/a", "https://[::1]:80/a/index/uid.npy"),
    ]:
        folder = data_address(DataConfig(path=path, allowed_schemes=("https",)))
        assert isinstance(folder, RemoteFolder)
        assert folder.file("index/uid.npy") == file
        assert folder.shown("x") == file.split("?")[0].replace("index/uid.npy", "x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GET https://u:p@h/x?sig=1 failed", "GET https://h/x failed"),
        ("no URL('http://h:80/x?a=b@c&d')", "no URL('http://h:80/x')"),
        ("proxy http://u:p@proxy:3128, then s3://b/k#x", "proxy http://proxy:3128, then s3://b/k"),
        ("https://u:p?w@h/x", "https://..."),
        ("nothing here", "nothing here"),
    ],
)
def test_secrets_are_cut_out_of_urls(text: str, expected: str) -> None:
    assert without_secrets(text) == expected
