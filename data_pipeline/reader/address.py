"""What `data.path` names: a local folder, or a data set behind a URL of a scheme that the settings allow."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from data_pipeline.errors import DataError, Problem
from data_pipeline.schema import DataConfig

REMOTE_SCHEMES = ("http", "https", "s3")
SCHEMES = ("file", *REMOTE_SCHEMES)

# WebDataset runs what follows `pipe:` in a shell; it is refused by name instead of being taken for a file's.
_WITHOUT_SLASHES = ("file:", "pipe:", "gopen:")
_URL = re.compile(r"""([A-Za-z][A-Za-z0-9+.-]*://)([^\s'"<>]*)""")
_PLAIN = re.compile(r"""[^\s'"<>\\\x00-\x1f\x7f]+""")
_SERVER = re.compile(r"(\[[0-9a-fA-F:.]*\]|[^:]*)(:[0-9]*[,.;)]*)?")
_REMOTE = ", ".join(REMOTE_SCHEMES)
_MAKE = "make it with `hopescale data shard`"


@dataclass(frozen=True)
class RemoteFolder:
    """A folder behind a URL.

    Attributes:
        url: Without a slash at its end; the query, if any, goes with every request.
    """

    url: str

    @property
    def scheme(self) -> str:
        """`http`, `https` or `s3`."""
        return urlsplit(self.url).scheme

    def file(self, name: str) -> str:
        """Return the URL of a file by its relative path."""
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))

    def shown(self, name: str = "") -> str:
        """Return the URL of the folder or a file in it as people may see it."""
        return without_secrets(self.file(name) if name else self.url)


def data_address(config: DataConfig) -> Path | RemoteFolder:
    """Return what `data.path` names.

    Raises:
        DataError: No path, or a URL whose scheme is not allowed or not supported, or that is not well formed.
    """
    path = config.path
    if path is None:
        raise DataError(Problem("data.path", None, "no data set is named", f"set data.path, or {_MAKE}"))
    _check_schemes(config.allowed_schemes)
    scheme = _scheme(path)
    if scheme not in config.allowed_schemes:
        raise DataError(_not_allowed(scheme, path, config.allowed_schemes))
    if scheme in REMOTE_SCHEMES:
        return _remote(path)
    return _local(path)


def without_secrets(text: str) -> str:
    """Return a text with the users, passwords and queries of all its URLs cut out."""

    def cut(found: re.Match[str]) -> str:
        plain = re.split(r"[?#]", found[2], maxsplit=1)[0].rsplit("@", 1)[-1]
        server, slash, path = plain.partition("/")
        # What follows a colon is a port, or a password that was cut in two.
        return f"{found[1]}{server if _SERVER.fullmatch(server) else '...'}{slash}{path}"

    return _URL.sub(cut, text)


def _scheme(path: str) -> str:
    if "://" in path or path.startswith(_WITHOUT_SLASHES):
        return path.split(":", 1)[0].lower()
    return "file"


def _check_schemes(allowed: tuple[str, ...]) -> None:
    problems = [
        Problem("data.allowed_schemes", scheme, "is not supported", f"use some of {', '.join(SCHEMES)}")
        for scheme in allowed
        if scheme not in SCHEMES
    ]
    if problems:
        raise DataError(problems)


def _not_allowed(scheme: str, path: str, allowed: tuple[str, ...]) -> Problem:
    if scheme not in SCHEMES:
        rule = f"the scheme {scheme} is not supported"
        return Problem("data.path", without_secrets(path), rule, f"name a local folder, or a URL of {_REMOTE}")
    rule = f"the scheme {scheme} is not one of data.allowed_schemes={list(allowed)}"
    return Problem("data.path", without_secrets(path), rule, f"name another place, or add {scheme} to the list")


def _local(path: str) -> Path:
    if not path.startswith("file:"):
        return Path(path).expanduser()
    parts = urlsplit(path)
    if parts.netloc not in ("", "localhost"):
        rule = "a file: URL names a file of this machine"
        raise DataError(Problem("data.path", path, rule, "write file:///FOLDER, or the folder alone"))
    return Path(unquote(parts.path))


def _remote(path: str) -> RemoteFolder:
    rule, fix = _malformed(path)
    if rule:
        raise DataError(Problem("data.path", without_secrets(path), rule, fix))
    return RemoteFolder(urlunsplit(urlsplit(path)._replace(path=urlsplit(path).path.rstrip("/"))))


def _malformed(url: str) -> tuple[str, str]:
    if _PLAIN.fullmatch(url) is None:
        return "a URL has no spaces, quotes, backslashes or control characters", "write them as %XX"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return "its server or port is not well formed", "write SCHEME://SERVER:PORT/FOLDER"
    if "@" in parts.netloc:
        # It would be written into the run's config.yaml.
        fix = "leave it out; http servers get the login of ~/.netrc, s3 the credentials of the AWS tools"
        return "a URL with a user or password is not taken", fix
    if not parts.hostname or parts.fragment:
        return "it names no server, or has a part after #", "write SCHEME://SERVER/FOLDER"
    return "", ""
