"""The statement behind a page of a list: newest first, by the index that fits its filters best.

Every index ends in (owner, seq), so that the page is read in order and read no further than it is long.
"""

from __future__ import annotations

import sqlite3

from tesapi.store.base import TaskQuery
from tesapi.store.tokens import behind

_RARE = 1000
"""Up to so many tasks with a prefix are found by their names and sorted; more are met soon enough, newest first."""

Values = dict[str, object]


def statement(db: sqlite3.Connection, query: TaskQuery, select: str, before: int) -> tuple[str, Values]:
    """`select`, which begins with the tasks as `t`, of the tasks of `query` that came before task `before`."""
    values: Values = {"before": before, "limit": query.size + 1}
    where = ["t.seq < :before"]
    if query.owner is not None:
        where.append("t.owner = :owner")
        values["owner"] = query.owner
    if query.state is not None:
        where.append("t.state = :state")
        values["state"] = query.state.value
    if query.name_prefix:
        named = _named(query.name_prefix, values)
        # A sign before a column keeps SQLite from using its index: here, any but that of the names, or just that one.
        rare = not query.tags and _is_rare(db, named, values)
        where = [*(f"+{term}" for term in where), *named] if rare else [*where, *(f"+{term}" for term in named)]
    tags = []
    for number, (key, value) in enumerate(query.tags):
        values |= {f"key{number}": key, f"value{number}": value}
        tags.append(_fits(number, value, query.owner))
    # Only text of this module stands in these statements: what was asked for goes in by name.
    if not tags:
        return f"{select} WHERE {' AND '.join(where)} ORDER BY t.seq DESC LIMIT :limit", values
    # The first tag leads to the tasks, newest first; the others are looked up for each, until the page is full.
    where += [f"EXISTS (SELECT 1 FROM tags g WHERE {fits} AND g.seq = t.seq)" for fits in tags[1:]]  # noqa: S608
    found = (
        f"SELECT t.seq FROM tags g CROSS JOIN tasks t ON t.seq = g.seq WHERE {tags[0]} AND g.seq < :before"  # noqa: S608
        f" AND {' AND '.join(where)} ORDER BY g.seq DESC LIMIT :limit"
    )
    return f"{select} WHERE t.seq IN ({found}) ORDER BY t.seq DESC", values


def _fits(number: int, value: str, owner: str | None) -> str:
    fits = f"g.key = :key{number}"
    if value:
        fits += f" AND g.value = :value{number}"
    return fits if owner is None else fits + " AND g.owner = :owner"


def _named(prefix: str, values: Values) -> list[str]:
    """The range of the names that begin with `prefix`, in the order of code points."""
    values["prefix"] = prefix
    if (end := behind(prefix)) is None:
        return ["t.name >= :prefix"]
    values["behind"] = end
    return ["t.name >= :prefix", "t.name < :behind"]


def _is_rare(db: sqlite3.Connection, named: list[str], values: Values) -> bool:
    some = f"SELECT 1 FROM tasks t WHERE {' AND '.join(named)} LIMIT {_RARE + 1}"  # noqa: S608 - as above
    (count,) = db.execute(f"SELECT count(*) FROM ({some})", values).fetchone()  # noqa: S608 - as above
    return bool(count <= _RARE)
