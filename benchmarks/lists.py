"""Lists of 256 tasks beside few and beside many: after none, a tenth and nine tenths of them, and by each filter."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import uuid_utils

from tesapi.store.base import TaskQuery, TaskStore
from tesapi.tes.models import TaskDocument, View
from tesapi.tes.record import TaskRecord
from tesapi.tes.states import State

_FEW = 10_000
_BATCH = 2_000
_OWNER = "anonymous"
_PAGES = 40

FILTERS = {
    "by state": TaskQuery(owner=_OWNER, state=State.COMPLETE),
    "by a name all have": TaskQuery(owner=_OWNER, name_prefix="task"),
    "by a rare name": TaskQuery(owner=_OWNER, name_prefix="rare"),
    "by a tag all have": TaskQuery(owner=_OWNER, tags=(("project", "demo"),)),
    "by a rare tag": TaskQuery(owner=_OWNER, tags=(("kind", "rare"),)),
    "by three tags": TaskQuery(owner=_OWNER, tags=(("kind", "rare"), ("project", ""), ("half", "1"))),
    "by all of it": TaskQuery(
        owner=_OWNER, state=State.COMPLETE, name_prefix="task", tags=(("project", "demo"), ("half", "1"))
    ),
}


def run(rounds: int, size: int, store: Callable[[str], TaskStore]) -> None:
    """Measure and print. `store` gives one that is empty, by a name."""
    few, many = asyncio.run(_both(rounds, max(size, _FEW), store))
    print(f"Lists of 256, MINIMAL, milliseconds at the median of {rounds} rounds of {_PAGES}")
    print(f"  {'':<24} {_FEW:>10,} {max(size, _FEW):>10,} tasks")
    for name, took in few.items():
        print(f"  {name:<24} {took * 1e3:10.3f} {many[name] * 1e3:10.3f}   {many[name] / took:5.2f}")


async def _both(
    rounds: int, size: int, store_of: Callable[[str], TaskStore]
) -> tuple[dict[str, float], dict[str, float]]:
    async with store_of("few") as few, store_of("many") as many:
        measured: list[dict[str, list[float]]] = []
        queries = []
        for store, count in ((few, _FEW), (many, size)):
            await _fill(store, count)
            queries.append(await _queries(store, count))
            measured.append({name: [] for name in queries[-1]})
        for _ in range(rounds):
            for store, asked, times in zip((few, many), queries, measured, strict=True):
                for name, query in asked.items():
                    times[name].append(await _seconds(store, query))
        first, second = ({name: statistics.median(times[name]) for name in times} for times in measured)
        return first, second


async def _fill(store: TaskStore, count: int) -> None:
    records = _records(count)
    while batch := list(itertools.islice(records, _BATCH)):
        await store.insert(batch)


def _records(count: int) -> Iterator[TaskRecord]:
    """A thousand of them are rare, whatever the count, spread evenly; nine of ten are done."""
    created = datetime.now(UTC)
    rarely = max(1, count // 1000)
    for number in range(count):
        rare = number % rarely == 0
        document = TaskDocument.model_validate(
            {
                "name": "rare" if rare else f"task {number}",
                "executors": [{"image": "alpine", "command": ["sh", "-c", "x" * 200]}],
                "tags": {"project": "demo", "half": str(number // rarely % 2), "kind": "rare" if rare else "usual"},
            }
        )
        state = State.QUEUED if number % 10 == 0 else State.COMPLETE
        yield TaskRecord(id=str(uuid_utils.uuid7()), owner=_OWNER, document=document, created=created, state=state)


async def _queries(store: TaskStore, count: int) -> dict[str, TaskQuery]:
    """The first page, those that begin behind a part of the tasks, and one for each filter."""
    queries = {"after 0 %": TaskQuery(owner=_OWNER)}
    token = None
    passed = 0
    for share in (10, 90):
        while passed < count * share // 100:
            step = min(2047, count * share // 100 - passed)
            token = (await store.find(TaskQuery(owner=_OWNER, size=step, token=token))).next_token
            passed += step
        queries[f"after {share} %"] = TaskQuery(owner=_OWNER, token=token)
    return queries | FILTERS | {"BASIC, after 0 %": TaskQuery(owner=_OWNER, view=View.BASIC)}


async def _seconds(store: TaskStore, query: TaskQuery) -> float:
    await store.find(query)
    began = time.perf_counter()
    for _ in range(_PAGES):
        await store.find(query)
    return (time.perf_counter() - began) / _PAGES
