"""Where files come from and go to. One module per URL scheme; `SCHEMES` finds it."""

from __future__ import annotations

import importlib
import os
import re
from typing import Any, Callable, Dict, NamedTuple, Optional, Protocol

SCHEMES = {
    "file": "file:FileStorage",
    "http": "http:HttpStorage",
    "https": "http:HttpStorage",
}
"""Scheme -> module and class beside this one, imported when a job has such a URL; a job's `storage` is by module."""


_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/")  # RFC 3986, and /
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:/*)([^/?#]*@)?")
_SECRET = re.compile(r"(?i)([?&][^=&#]*(?:key|token|secret|sig|passw|credential|auth)[^=&#]*=)[^&#]*")


class StorageFailure(Exception):
    """A file could not be moved; the text is a sentence that names the URL."""


class StoredFile(NamedTuple):
    """A file in storage."""

    url: str
    size_bytes: int


class Storage(Protocol):
    """One scheme, or two. Blocking; `check` is called at least once a second, and raises when the job is to stop.

    What it says shows a URL as `shown` does.
    """

    @property
    def total(self) -> Optional[int]:
        """How many bytes the file has that `get` is getting; None where that is not known, and of a directory."""

    def unsupported(self, url: str, operation: str) -> Optional[str]:
        """A sentence on why `operation` cannot be done with `url`, or None. Moves nothing.

        It is "get", "get_directory" where that has to be a directory, or "put".
        """

    def get(self, url: str, path: str, check: Callable[[], None]) -> None:
        """Copy what is at `url`, a file to `path`, which does not exist, or a directory's entries into `path`.

        Raises StorageFailure.
        """

    def make_folder(self, url: str) -> None:
        """Have a directory at `url`, where the storage has directories; else do nothing. Raises StorageFailure."""

    def put(self, path: str, url: str, check: Callable[[], None]) -> StoredFile:
        """Copy the file at `path` to `url`: all of it or nothing. What was there is replaced. Raises StorageFailure."""


class Storages:
    """The storages of a job, by the scheme of a URL. A plain absolute path is a `file`."""

    def __init__(self, settings: Dict[str, Any]) -> None:
        self._settings = settings
        self._made: Dict[str, Storage] = {}

    def unsupported(self, url: str, operation: str) -> Optional[str]:
        """A sentence on why `url` cannot be served, or None."""
        scheme = _scheme(url)
        known = [name for name in sorted(SCHEMES) if _module(name) in self._settings]
        if scheme not in known:
            return f"{shown(url)}: this server has no storage for {scheme}: URLs; it has {', '.join(known)}."
        return self.of(url).unsupported(url, operation)

    def of(self, url: str) -> Storage:
        """The storage of a URL that is not unsupported."""
        scheme = _scheme(url)
        module = _module(scheme)
        if module not in self._made:
            make = getattr(importlib.import_module("." + module, __package__), SCHEMES[scheme].partition(":")[2])
            self._made[module] = make(self._settings[module])
        return self._made[module]


def below(url: str, relative: str) -> str:
    """The URL of `relative`, a path as it is, below the directory at `url`; a query stays behind the path."""
    if not relative:
        return url
    if not url.startswith("/"):
        relative = "".join(_quoted(byte) for byte in os.fsencode(relative))
    end = len(url)
    if _scheme(url) in ("http", "https"):
        end = min(position for position in (url.find("?"), url.find("#"), end) if position >= 0)
    return url[:end].rstrip("/") + "/" + relative + url[end:]


def shown(url: str) -> str:
    """`url` as it may be told: without user and password, and without what a query calls a key, a token and the like.

    Both may be in sentences of the runner, which others read than wrote the URL.
    """
    found = _USER.match(url)
    if found is None:
        return url
    rest = url[found.end() :]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if not found[2] and ":" in authority and not re.fullmatch(r".*:[0-9]*|\[.*", authority):
        rest = rest[rest.rfind("@") + 1 :]  # no port, so perhaps the half of a password that has a slash in it
    return found[1] + _SECRET.sub(r"\1********", rest)


def _quoted(byte: int) -> str:
    character = chr(byte)
    return character if character in _UNRESERVED else f"%{byte:02X}"


def _module(scheme: str) -> str:
    return SCHEMES[scheme].partition(":")[0]


def _scheme(url: str) -> str:
    return "file" if url.startswith("/") else url.partition(":")[0].lower()
