"""URLs of the web, as people and programs write them: with spaces and letters that a URL has not."""

from __future__ import annotations

import base64
import ipaddress
import re
from typing import NamedTuple, Optional, Tuple
from urllib.parse import unquote_to_bytes, urljoin

_LONGEST_AUTHORITY = 2000
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")
_NOT_IN_PATHS = frozenset(b' "<>\\^`{}')
_NOT_IN_QUERIES = frozenset(b' "<>')


class WebUrl(NamedTuple):
    """A URL in its parts. `target` is what a server is asked for, `authorization` what it is told of the user."""

    text: str
    scheme: str
    host: str
    port: int
    target: str
    authorization: Optional[str]

    @property
    def authority(self) -> str:
        """Host and port as servers know themselves."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    def moved_to(self, location: str) -> WebUrl:
        """Where a redirect leads. Raises ValueError with a reason.

        User and password stay with their host and port, or go along from http to https on the usual ones.
        """
        there = parse(urljoin(self.text, location))
        if self.authorization is None:
            return there
        if self.scheme == "https" and there.scheme == "http":
            raise ValueError("user and password would go there unencrypted")
        upgraded = (self.port, there.port) == (80, 443)
        if there.authorization is None and there.host == self.host and (there.port == self.port or upgraded):
            return there._replace(authorization=self.authorization)
        return there


def parse(text: str) -> WebUrl:
    """The parts of an http or https URL. Raises ValueError with a reason, which shows nothing of it."""
    text = text.strip(" ")
    scheme, _, rest = text.partition(":")
    scheme = scheme.lower()
    if scheme not in _PORTS:
        raise ValueError("it is not a URL that begins with http:// or https://")
    if not rest.startswith("//"):
        raise ValueError(f"the host is missing; {scheme}: URLs begin with {scheme}://")
    rest = rest[2:].partition("#")[0]
    authority = re.split(r"[/?]", rest, maxsplit=1)[0]
    if "\\" in authority or len(authority) > _LONGEST_AUTHORITY:
        raise ValueError("its host or port is malformed")
    userinfo, at, place = authority.rpartition("@")
    host, port = _host_and_port(place, _PORTS[scheme])
    return WebUrl(text, scheme, host, port, _target(rest[len(authority) :]), _authorization(userinfo) if at else None)


def _host_and_port(place: str, default: int) -> Tuple[str, int]:
    bracketed = re.fullmatch(r"\[([^\]]*)\](?::([0-9]*))?", place)
    found = bracketed or re.fullmatch(r"([^:\[\]\\]*)(?::([0-9]*))?", place)
    if found is None:
        raise ValueError("its host or port is malformed")
    host, port = found[1], int(found[2] or default)
    if not 0 < port < 65536:
        raise ValueError("its port is not one from 1 to 65535")
    if bracketed:
        try:
            return str(ipaddress.IPv6Address(host.replace("%", "no zones"))), port
        except ValueError:
            raise ValueError("its host is not an IPv6 address") from None
    if not host.isascii():
        try:
            host = host.encode("idna").decode("ascii")
        except UnicodeError:
            raise ValueError("its host is not a name that can be looked up") from None
    if not _HOST.fullmatch(host) or ".." in host:
        raise ValueError("its host is not a name that can be looked up")
    return host.lower(), port


def _target(rest: str) -> str:
    path, mark, query = rest.partition("?")
    return _escaped(path or "/", _NOT_IN_PATHS) + mark + _escaped(query, _NOT_IN_QUERIES)


def _escaped(text: str, unfit: frozenset[int]) -> str:
    # A "%" stays what it is: whoever escaped something before us is not to be escaped again.
    return "".join(
        f"%{byte:02X}" if byte <= 0x20 or byte >= 0x7F or byte in unfit else chr(byte)
        for byte in text.encode("utf-8", "surrogateescape")
    )


def _authorization(userinfo: str) -> str:
    user, _, password = userinfo.partition(":")
    pair = unquote_to_bytes(user) + b":" + unquote_to_bytes(password)
    return "Basic " + base64.b64encode(pair).decode("ascii")
