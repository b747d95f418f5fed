"""The tasks of a page, newest first, from the index that fits its filters best."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from pymongo import DESCENDING
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.cursor import AsyncCursor

from tesapi.store.base import TaskQuery
from tesapi.store.mongo_database import BY_NAME, BY_OWNER, BY_SEQ, BY_STATE, BY_TAG, Row
from tesapi.store.tokens import behind

_RARE = 1000
"""Up to so many tasks are found by an index that is not in their order, and sorted; more are met soon enough, newest
first."""
_LONG_TAG = 128


async def page(
    tasks: AsyncCollection[Row], query: TaskQuery, before: int | None, shown: Mapping[str, int]
) -> AsyncCursor[Row]:
    """The tasks of `query` that came before task number `before`, one more than its size; of each what is `shown`."""
    wanted = conditions(query, before)
    index = await _index(tasks, query, wanted)
    # In one batch: what is large lies beside the tasks.
    cursor = tasks.find(wanted, shown, hint=index, limit=query.size + 1, batch_size=query.size + 1)
    return cursor.sort("seq", DESCENDING)


def conditions(query: TaskQuery, before: int | None) -> Row:
    """What a task has to fit."""
    wanted: Row = {}
    if query.tags:
        wanted["tags"] = {"$all": [_fits(key, value) for key, value in query.tags]}
    if query.name_prefix:
        end = behind(query.name_prefix)
        wanted["name"] = {"$gte": query.name_prefix} | ({} if end is None else {"$lt": end})
    if query.state is not None:
        wanted["state"] = query.state.value
    if query.owner is not None:
        wanted["owner"] = query.owner
    if before is not None:
        wanted["seq"] = {"$lt": before}
    return wanted


async def _index(tasks: AsyncCollection[Row], query: TaskQuery, wanted: Row) -> str:
    if query.tags:
        return await _in_order_or_rare(tasks, query, {"tags": wanted["tags"]}, BY_TAG)
    if query.name_prefix:
        owned = {} if query.owner is None else {"owner": query.owner}
        if await _is_rare(tasks, {"name": wanted["name"], **owned}, BY_NAME):
            return BY_NAME
    if query.state is not None:
        return await _in_order_or_rare(tasks, query, {"state": wanted["state"]}, BY_STATE)
    return BY_SEQ if query.owner is None else BY_OWNER


async def _in_order_or_rare(tasks: AsyncCollection[Row], query: TaskQuery, wanted: Row, index: str) -> str:
    """`index`, which has the tasks of one owner in their order; those of all owners only where they are few."""
    return index if query.owner is not None or await _is_rare(tasks, wanted, index) else BY_SEQ


async def _is_rare(tasks: AsyncCollection[Row], wanted: Row, index: str) -> bool:
    return await tasks.count_documents(wanted, limit=_RARE + 1, hint=index) <= _RARE


def indexed_tags(tags: Iterable[tuple[str, str]]) -> list[str]:
    """What the index of tags has of a task: for each of them one text for the pair, and one for any of its values."""
    return list(dict.fromkeys(text for key, value in tags for text in (_fits(key, value), _fits(key, ""))))


def _fits(key: str, value: str) -> str:
    # A pair whose value is empty is met by any filter on its key, and needs no text of its own.
    text = f"{len(key)}:{key}{value}"
    if len(text) <= _LONG_TAG:
        return text
    return hashlib.sha256(text.encode()).hexdigest()
