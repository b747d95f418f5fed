"""The query parameters of GetTask and ListTasks. Others are ignored: clients put keys of their own there."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TypeVar
from urllib.parse import parse_qs

from tesapi.errors import FieldProblem, InvalidDocument
from tesapi.store.base import TaskQuery
from tesapi.tes.models import View
from tesapi.tes.states import State

DEFAULT_PAGE_SIZE = 256
MAX_PAGE_SIZE = 2047
MAX_TAGS = 64
"""How many tags a list can be filtered by; each is one more thing to look up for every task."""

_Choice = TypeVar("_Choice", bound=StrEnum)
_Given = Mapping[str, Sequence[str]]
_PLAIN_VIEWS = {b"": View.MINIMAL} | {b"view=" + view.value.encode(): view for view in View}


def view(query_string: bytes) -> View:
    """The view that GetTask is asked for. Raises InvalidDocument."""
    plain = _PLAIN_VIEWS.get(query_string)
    return _view(_given(query_string)) if plain is None else plain


def query(query_string: bytes, owner: str) -> TaskQuery:
    """The tasks of `owner` that ListTasks is asked for. Raises InvalidDocument."""
    given = _given(query_string)
    return TaskQuery(
        view=_view(given),
        size=_page_size(given),
        token=_text(given, "page_token") or None,
        owner=owner,
        name_prefix=_text(given, "name_prefix"),
        state=_choice(given, "state", State),
        tags=_tags(given),
    )


def _given(query_string: bytes) -> _Given:
    # What is no UTF-8 stays recognisable: it is refused only where it matters.
    text = query_string.decode("utf-8", "surrogateescape")
    return parse_qs(text, keep_blank_values=True, errors="surrogateescape")


def _view(given: _Given) -> View:
    return _choice(given, "view", View) or View.MINIMAL


def _page_size(given: _Given) -> int:
    if "page_size" not in given:
        return DEFAULT_PAGE_SIZE
    text = given["page_size"][-1]
    if text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= MAX_PAGE_SIZE:
        return int(text)
    raise _wrong("page_size", text, f"an integer from 1 to {MAX_PAGE_SIZE}")


def _text(given: _Given, name: str) -> str:
    return _unicode(name, given[name][-1]) if name in given else ""


def _choice(given: _Given, name: str, kind: type[_Choice]) -> _Choice | None:
    if name not in given:
        return None
    text = given[name][-1]
    if text not in kind.__members__:
        raise _wrong(name, text, f"one of {', '.join(kind.__members__)}")
    return kind[text]


def _tags(given: _Given) -> tuple[tuple[str, str], ...]:
    """The tags asked for; a key without a value fits any value."""
    keys, values = given.get("tag_key", ()), given.get("tag_value", ())
    if len(keys) > MAX_TAGS:
        raise InvalidDocument([FieldProblem("tag_key", f"is given {len(keys)} times", f"at most {MAX_TAGS} times")])
    if len(values) > len(keys):
        problem = FieldProblem("tag_value", f"is given {len(values)} times", f"as often as tag_key ({len(keys)} times)")
        raise InvalidDocument([problem])
    return tuple(
        (_unicode("tag_key", key), _unicode("tag_value", value))
        for key, value in itertools.zip_longest(keys, values, fillvalue="")
    )


def _unicode(name: str, text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise _wrong(name, text, "text in UTF-8")
    return text


def _wrong(name: str, text: str, allowed: str) -> InvalidDocument:
    return InvalidDocument([FieldProblem(name, f"is {text[:60]!r}", allowed)])
