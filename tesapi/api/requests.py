"""What operations need of a request: who sent it, and its body within bounds."""

from __future__ import annotations

import re
from collections.abc import Mapping

from starlette.types import Receive

from tesapi.errors import CallerProblem, FieldProblem, InvalidDocument
from tesapi.security.identity import ANONYMOUS, Identity

_KEY = re.compile(r"[!-~]{1,255}")


class ClientGone(Exception):
    """The client hung up before its request was complete."""


class BodyTooLong(CallerProblem):
    """The body is longer than this server takes."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The body is longer than {limit_bytes} bytes, which is as much as server.max_body_mb allows.")


def anonymous(headers: Mapping[bytes, bytes]) -> Identity:
    """Who is asking. Credentials that nobody has asked for are ignored."""
    return ANONYMOUS


def idempotency_key(headers: Mapping[bytes, bytes]) -> str | None:
    """What the client calls this one wish, if it gave it a name. Raises InvalidDocument."""
    header = headers.get(b"idempotency-key")
    if header is None:
        return None
    key = header.decode("latin-1").strip(" \t")
    if not _KEY.fullmatch(key):
        shown = repr(key) if len(key) <= 60 else f"{key[:60]!r}… ({len(key)} characters)"
        raise InvalidDocument([FieldProblem("Idempotency-Key", f"is {shown}", "1 to 255 visible ASCII characters")])
    return key


async def json_body(headers: Mapping[bytes, bytes], receive: Receive, limit_bytes: int) -> bytes:
    """The body, whatever its Content-Type says: clients forget it, or add a charset.

    Raises BodyTooLong, before it is all read, and InvalidDocument for one that is compressed.
    """
    encoding = headers.get(b"content-encoding", b"").strip().lower()
    if encoding not in {b"", b"identity"}:
        shown = encoding[:60].decode("latin-1")
        raise InvalidDocument([FieldProblem("Content-Encoding", f"is {shown!r}", "a body as it is, in UTF-8")])
    announced = headers.get(b"content-length", b"")
    if announced.isdigit() and (len(announced) > 15 or int(announced) > limit_bytes):
        raise BodyTooLong(limit_bytes)
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body = message.get("body", b"")
        size += len(body)
        if size > limit_bytes:
            raise BodyTooLong(limit_bytes)
        if not message.get("more_body", False):
            return body if not chunks else b"".join([*chunks, body])
        chunks.append(body)
