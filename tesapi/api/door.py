"""Where every request comes in: refuses what was not meant for this server, and finds out who answers the rest."""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from tesapi.api import problems
from tesapi.api.problems import ForeignHost, ForeignPage
from tesapi.api.tasks import TesOperations
from tesapi.settings import Settings

PREFIXES = ("/ga4gh/tes/v1", "/v1", "/ga4gh/v1")
"""Where the API is served: the specification's place, and where clients look that were made for another one."""

_SLASHES = re.compile("//+")
_READING = {"GET", "HEAD", "OPTIONS"}


class Door:
    """An ASGI application: `operations` answer what is below one of PREFIXES, `others` everything else.

    A server on loopback that asks nobody for credentials can be reached by every web page that its user's browser
    shows. Only browsers send Origin, and a page cannot choose it: pages of elsewhere may not change anything. Nor can
    a page choose Host: one whose own name was made to lead here (DNS rebinding) is not let in at all.
    """

    def __init__(self, settings: Settings, operations: TesOperations, others: ASGIApp) -> None:
        server = settings.server
        self._operations = operations
        self._others = others
        self._root_path = server.root_path
        self._checks = not server.allow_anonymous or bool(server.allowed_hosts)
        self._hosts = {"localhost", *server.allowed_hosts}
        self._origins = {origin.encode() for origin in server.cors_origins}
        # Few names are ever asked for, and each of them ten thousand times a second.
        self._is_this_host = functools.lru_cache(maxsize=64)(self._names_this_host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._others(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            self._refuse_foreigners(scope, headers)
        except (ForeignHost, ForeignPage) as error:
            await problems.of_error(scope, error)(scope, receive, send)
            return
        path = self._plain(scope["path"])
        for prefix in PREFIXES:
            if path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] == "/":
                await self._operations(path[len(prefix) :], headers, scope, receive, send)
                return
        await self._others({**scope, "path": path, "raw_path": None, "root_path": ""}, receive, send)

    def _plain(self, path: str) -> str:
        """`path` from this server's root on, with single slashes: clients join URLs as they like."""
        if "//" in path:
            path = _SLASHES.sub("/", path)
        if self._root_path and f"{path}/".startswith(f"{self._root_path}/"):  # some proxies cut it off, some do not
            path = path.removeprefix(self._root_path)
        return path.rstrip("/") or "/"

    def _refuse_foreigners(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        host = headers.get(b"host")
        if self._checks and host is not None and not self._is_this_host(host):
            shown = host[:100].decode("latin-1")
            raise ForeignHost(f"This server is not {shown!r}; server.allowed_hosts lists the names that it goes by.")
        origin = headers.get(b"origin")
        if origin is None or not self._checks or scope["method"] in _READING or origin in self._origins:
            return
        own = b"%s://%s" % (scope["scheme"].encode(), host or b"")
        if origin != own and not _is_loopback(_origin_name(origin)):
            raise ForeignPage(f"Pages of {origin[:100].decode('latin-1')!r} may not make changes here.")

    def _names_this_host(self, header: bytes) -> bool:
        name = _host_name(header)
        return name in self._hosts or _is_loopback(name)


def _host_name(header: bytes) -> str:
    """The name in a Host header, without the port."""
    text = header.decode("latin-1").lower()
    name = text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
    return name.removesuffix(".")


def _origin_name(header: bytes) -> str:
    """The host of an Origin header; empty where it is none."""
    try:
        return urlsplit(header.decode("latin-1")).hostname or ""
    except ValueError:
        return ""


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
