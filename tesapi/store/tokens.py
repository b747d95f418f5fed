"""Page tokens: a task's place in the order of its store, bound to that store and to the filters of the list."""

from __future__ import annotations

import contextlib
import hashlib
import json

from tesapi.errors import FieldProblem, InvalidDocument
from tesapi.store.base import TaskQuery


def page_token(store_id: str, query: TaskQuery, seq: int) -> str:
    """The token of the page behind task number `seq`."""
    bound = [store_id, query.owner, query.name_prefix, query.state, query.tags, seq]
    digest = hashlib.blake2s(json.dumps(bound).encode(), digest_size=8)
    return f"{seq:x}-{digest.hexdigest()}"


def position(store_id: str, query: TaskQuery) -> int | None:
    """The number of the task behind which the page of `query` begins; None for the first page.

    Raises InvalidDocument where the token is not one of this store's for these filters.
    """
    if query.token is None:
        return None
    head = query.token.partition("-")[0]
    with contextlib.suppress(ValueError):
        if page_token(store_id, query, seq := int(head, 16)) == query.token:
            return seq
    shown = repr(query.token[:60])
    allowed = "a next_page_token that this server gave for the same filters, or none"
    raise InvalidDocument([FieldProblem("page_token", f"{shown} is none for this list", allowed)])


def behind(prefix: str) -> str | None:
    """The least text, in the order of code points, that is greater than all that begin with `prefix`."""
    for length in range(len(prefix), 0, -1):
        following = ord(prefix[length - 1]) + 1
        if following <= 0x10FFFF:
            # Surrogates are no text.
            return prefix[: length - 1] + chr(0xE000 if following == 0xD800 else following)
    return None
