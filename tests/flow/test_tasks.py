"""The door to the records, on the embedded store."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tesapi.errors import DestinationFull, QueueFull, StoreUnavailable
from tesapi.store.sqlite import SqliteStore
from tesapi.tasks import Tasks
from tesapi.tes.events import CancelRequested, Discarded, Placed
from tesapi.tes.models import parse_document
from tesapi.tes.record import Work
from tests.contract.records import NOON

DOCUMENT = parse_document(b'{"executors": [{"image": "alpine", "command": ["true"]}]}')


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    async with SqliteStore(tmp_path / "tesapi.db") as store:
        yield store


async def test_no_more_tasks_are_placed_than_a_destination_may_have(store: SqliteStore) -> None:
    tasks = Tasks(store, {})
    first, second = [await tasks.load(await tasks.create(DOCUMENT, "ada")) for _ in range(2)]
    assert (await tasks.record(first, Placed("job-1", "far", NOON), at_most=1)).work is Work.PLACED
    with pytest.raises(DestinationFull):
        await tasks.record(second, Placed("job-2", "far", NOON), at_most=1)
    assert await tasks.load(second.id) == second
    await tasks.record(first, CancelRequested(NOON), Discarded("job-1"))
    assert (await tasks.record(second, Placed("job-2", "far", NOON), at_most=1)).work is Work.PLACED


async def test_a_task_that_was_canceled_meanwhile_is_not_placed_however_full_the_destination_is(
    store: SqliteStore,
) -> None:
    tasks = Tasks(store, {})
    known = await tasks.load(await tasks.create(DOCUMENT, "ada"))
    await tasks.record(known, CancelRequested(NOON))
    assert (await tasks.record(known, Placed("job-1", "far", NOON), at_most=0)).work is Work.DONE


async def test_no_more_tasks_are_made_than_may_be_queued(store: SqliteStore) -> None:
    tasks = Tasks(store, {}, max_queued=5)
    answers = await asyncio.gather(*(tasks.create(DOCUMENT, "ada") for _ in range(20)), return_exceptions=True)
    assert Counter(type(answer) for answer in answers) == {str: 5, QueueFull: 15}
    assert await store.queued(at_most=100) == 5


async def test_there_is_room_again_when_a_queued_task_is_canceled_or_started(store: SqliteStore) -> None:
    tasks = Tasks(store, {}, max_queued=1)
    first = await tasks.create(DOCUMENT, "ada")
    with pytest.raises(QueueFull, match=r"As many tasks are queued as server\.max_queued_tasks allows, 1"):
        await tasks.create(DOCUMENT, "ada")
    await tasks.cancel(first, "ada")
    async with asyncio.timeout(10):
        while True:
            try:
                await tasks.create(DOCUMENT, "ada")
                break
            except QueueFull:
                await asyncio.sleep(0.001)


async def test_a_task_that_was_not_stored_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def insert_nothing(*_: object) -> None:
        raise StoreUnavailable("The disk is full.")

    async with SqliteStore(tmp_path / "tesapi.db") as store:
        tasks = Tasks(store, {}, max_queued=1)
        with monkeypatch.context() as patched:
            patched.setattr(store, "insert", insert_nothing)
            for _ in range(3):
                with pytest.raises(StoreUnavailable):
                    await tasks.create(DOCUMENT, "ada")
        await tasks.create(DOCUMENT, "ada")


async def test_a_key_that_stands_for_a_task_is_answered_however_many_are_queued(store: SqliteStore) -> None:
    tasks = Tasks(store, {}, max_queued=1)
    first = await tasks.create(DOCUMENT, "ada", key="k")
    assert await tasks.create(DOCUMENT, "ada", key="k") == first
    with pytest.raises(QueueFull):
        await tasks.create(DOCUMENT, "ada", key="other")
