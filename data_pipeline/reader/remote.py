"""Data sets behind http, https and s3: streamed through fsspec, everything but the shards kept on the node."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from data_pipeline.cache import write_bytes
from data_pipeline.dataset.consistency import most_bytes
from data_pipeline.dataset.index import INDEX_FOLDER
from data_pipeline.dataset.manifest import MANIFEST_FILE, MAX_MANIFEST, load_manifest, parse_manifest
from data_pipeline.errors import DataError, Problem, missing_extra
from data_pipeline.reader.address import RemoteFolder, without_secrets
from data_pipeline.reader.fetching import CHUNK, FetchFailed, copy_checked, reason, retried
from data_pipeline.reader.node_folder import FIELD, NodeFolder
from data_pipeline.schema import Manifest

CONNECT_SECONDS = 30
READ_SECONDS = 60
"""Longest silence of a server while it sends a file."""

_S3_BLOCK = 16 << 20
_FILES_AT_ONCE = 8
_FINAL_ANSWERS = (400, 401, 403, 404, 410)

T = TypeVar("T")


class RemoteFiles:
    """The files of a folder behind a URL."""

    def __init__(self, folder: RemoteFolder, allowed_schemes: Sequence[str]) -> None:
        """Open nothing yet.

        Args:
            folder: Where the files are.
            allowed_schemes: A redirect to a URL of another scheme is not followed.

        Raises:
            MissingExtra: A package for this scheme is not installed.
        """
        self._folder = folder
        self._schemes = tuple(allowed_schemes)
        self._files = _file_system(folder.scheme, self._schemes, os.getpid())

    def below(self, name: str) -> RemoteFiles:
        """Return the files of a folder in this one, or of this one for `.`."""
        folder = self._folder if name == "." else RemoteFolder(self._folder.file(name))
        return RemoteFiles(folder, self._schemes)

    def where(self, name: str) -> str:
        """Return the URL of a file without its query."""
        return self._folder.shown(name)

    def chunks(self, name: str, nbytes: int) -> Generator[bytes, None, None]:
        """Yield the content of a file in order.

        Raises:
            FetchFailed: What the server or the library says, without secrets.
        """
        # Streamed: a size that is known saves a request, and block size 0 asks for no ranges.
        how = {"block_size": _S3_BLOCK} if self._folder.scheme == "s3" else {"block_size": 0, "size": nbytes}
        try:
            with self._files.open(self._folder.file(name), "rb", **how) as file:
                while chunk := file.read(CHUNK):
                    yield chunk
        except Exception as error:
            # fsspec hands on what a dozen libraries raise. From None: their texts hold the whole URL.
            raise _failure(error) from None


def fetch_description(source: RemoteFiles, node: NodeFolder, stop: threading.Event) -> tuple[Path, Manifest]:
    """Fetch all files of a data set but its shards, unless the node has them, and return their folder.

    The folder is named by the manifest's sha256, so that a data set that changed is another one.

    Args:
        source: The data set.
        node: Where the files are kept.
        stop: Ends the wait for another process that fetches them.

    Raises:
        DataError: A file cannot be had, or is not what the manifest says, or the manifest is none.
    """
    where = source.where(MANIFEST_FILE)
    content = _fetched(lambda: _manifest_bytes(source), where, stop)
    manifest = parse_manifest(content, where)
    name = hashlib.sha256(content).hexdigest()[:16]
    folder = node.datasets / name
    try:
        with node.exclusive(f"dataset-{name}", stop):
            if not _is_complete(folder, content):
                shutil.rmtree(folder, ignore_errors=True)
                _fetch_all(source, manifest, content, folder, stop)
    except OSError as error:
        fix = "free space there, or name another folder"
        raise DataError(Problem(FIELD, node.root, f"it cannot be written to ({reason(error)})", fix)) from error
    return folder, manifest


def _manifest_bytes(source: RemoteFiles) -> bytes:
    content = bytearray()
    with closing(source.chunks(MANIFEST_FILE, MAX_MANIFEST)) as chunks:
        for chunk in chunks:
            content += chunk
            if len(content) > MAX_MANIFEST:
                raise FetchFailed(f"it has more than {MAX_MANIFEST} bytes", again=False)
    return bytes(content)


def _is_complete(folder: Path, content: bytes) -> bool:
    """Return whether a folder holds the data set with this manifest, undamaged."""
    try:
        load_manifest(folder, shards=False)
        return (folder / MANIFEST_FILE).read_bytes() == content
    except (DataError, FileNotFoundError):
        return False


def _fetch_all(
    source: RemoteFiles,
    manifest: Manifest,
    content: bytes,
    folder: Path,
    stop: threading.Event,
) -> None:
    """Fill the folder, which appears complete or not at all. Holds the data set's lock."""
    for left in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(left)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (temporary / INDEX_FOLDER).mkdir()

        def fetch(name: str) -> None:
            _fetched(lambda: _fetch_file(source, manifest, name, temporary, stop), source.where(name), stop)

        with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="fetch") as pool:
            list(pool.map(fetch, manifest.files))
        write_bytes(temporary / MANIFEST_FILE, content)
        load_manifest(temporary, shards=False)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fetch_file(source: RemoteFiles, manifest: Manifest, name: str, folder: Path, stop: threading.Event) -> None:
    descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        limit, sha256 = most_bytes(manifest, name), manifest.files[name]
        copy_checked(source, name, descriptor, limit=limit, exact=False, sha256=sha256, stop=stop)
    finally:
        os.close(descriptor)


def _fetched(attempt: Callable[[], T], where: str, stop: threading.Event) -> T:
    try:
        return retried(attempt, stop)
    except FetchFailed as error:
        fix = "check that the data set is there and that this machine may read it"
        raise DataError(Problem("data.path", where, str(error), fix)) from error


def _failure(error: Exception) -> FetchFailed:
    if isinstance(error, FileNotFoundError):
        return FetchFailed("the server has no such file", again=False)
    status = getattr(error, "status", None)
    if isinstance(status, int) and status > 0:
        text = f"the server answers {status} {getattr(error, 'message', '')}".rstrip()
        return FetchFailed(without_secrets(text), again=status not in _FINAL_ANSWERS)
    text = f"{type(error).__name__}: {without_secrets(str(error))}".rstrip(": ")
    return FetchFailed(text, again=not isinstance(error, PermissionError | _Refused))


class _Refused(Exception):
    """What this side does not do."""


@lru_cache(maxsize=8)
def _file_system(scheme: str, allowed_schemes: tuple[str, ...], process: int) -> Any:
    """Return one file system for each scheme and process.

    They are kept: one that is collected waits for its thread, which may wait for just what the collection interrupted.
    One that was made before a fork has no thread any more.
    """
    needed_for = f"reading data sets over {scheme}"
    try:
        import fsspec
    except ImportError as error:
        raise missing_extra("fsspec", "remote", needed_for) from error
    try:
        options = _http_options(allowed_schemes) if scheme in ("http", "https") else _s3_options()
        return fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    except ImportError as error:
        raise missing_extra("s3fs" if scheme == "s3" else "aiohttp", "remote", needed_for) from error


def _s3_options() -> dict[str, Any]:
    return {"config_kwargs": {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}}


def _http_options(allowed_schemes: Sequence[str]) -> dict[str, Any]:
    import aiohttp

    async def check_redirect(_: object, __: object, redirect: Any) -> None:
        target = redirect.response.headers.get("Location", "")
        scheme = urlsplit(target).scheme
        if scheme and scheme not in allowed_schemes:
            raise _Refused(f"it redirects to {without_secrets(target)}, whose scheme is not allowed")

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(check_redirect)
    # No limit in all: a shard may take long. trust_env: clusters reach the world through a proxy, servers want a login.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
    client = {"timeout": timeout, "trace_configs": [trace], "trust_env": True}
    # Compressed on the way, a file would have another size.
    return {"client_kwargs": client, "headers": {"Accept-Encoding": "identity"}}
