"""What handlers need of a request: its body within bounds, its caller, and that no foreign web page sent it."""

from __future__ import annotations

from urllib.parse import urlsplit

from fastapi import Request

from tesapi.api.problems import Forbidden
from tesapi.errors import FieldProblem, InvalidDocument
from tesapi.security.identity import ANONYMOUS, Identity

_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def caller(request: Request) -> Identity:
    """Who is asking. Credentials that nobody has asked for are ignored."""
    return ANONYMOUS


async def body_within(request: Request, limit_bytes: int) -> bytes:
    """The body. Raises InvalidDocument for more than `limit_bytes`, before it is all read."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit_bytes:
            allowed = f"at most {limit_bytes} bytes (server.max_body_mb)"
            raise InvalidDocument([FieldProblem("the body", f"is longer than {limit_bytes} bytes", allowed)])
        chunks.append(chunk)
    return b"".join(chunks)


def refuse_foreign_pages(request: Request) -> None:
    """Raise Forbidden for a change that a web page of elsewhere wants to make.

    A server on loopback that asks nobody for credentials can be reached by every page that its user's browser shows;
    only browsers send Origin, and a page cannot choose it.
    """
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).hostname not in _LOOPBACK:
        raise Forbidden(f"Pages of {origin} may not make changes here.")
