"""Where files come from and go to. One module per URL scheme; `SCHEMES` finds it."""

from __future__ import annotations

import importlib
import os
from typing import Any, Callable, Dict, NamedTuple, Optional, Protocol

SCHEMES = {
    "file": "file:FileStorage",
}
"""Scheme -> module and class beside this one, imported when a job has such a URL."""


_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/")  # RFC 3986, and /


class StorageFailure(Exception):
    """A file could not be moved; the text is a sentence that names the URL."""


class StoredFile(NamedTuple):
    """A file in storage."""

    url: str
    size_bytes: int


class Storage(Protocol):
    """One scheme. Blocking; `check` is called between chunks and raises when the job is to stop."""

    def unsupported(self, url: str, operation: str) -> Optional[str]:
        """A sentence on why `operation` ("get" or "put") cannot be done with `url`, or None. Moves nothing."""

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
        if scheme not in SCHEMES or scheme not in self._settings:
            known = ", ".join(sorted(set(SCHEMES) & set(self._settings)))
            return f"{url}: this server has no storage for {scheme}: URLs; it has {known}."
        return self.of(url).unsupported(url, operation)

    def of(self, url: str) -> Storage:
        """The storage of a URL that is not unsupported."""
        scheme = _scheme(url)
        if scheme not in self._made:
            module, _, name = SCHEMES[scheme].partition(":")
            make = getattr(importlib.import_module("." + module, __package__), name)
            self._made[scheme] = make(self._settings[scheme])
        return self._made[scheme]


def below(url: str, relative: str) -> str:
    """The URL of `relative`, a path as it is, below the directory at `url`."""
    if not relative:
        return url
    if not url.startswith("/"):
        relative = "".join(_quoted(byte) for byte in os.fsencode(relative))
    return url.rstrip("/") + "/" + relative


def _quoted(byte: int) -> str:
    character = chr(byte)
    return character if character in _UNRESERVED else f"%{byte:02X}"


def _scheme(url: str) -> str:
    return "file" if url.startswith("/") else url.partition(":")[0].lower()
