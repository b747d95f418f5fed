"""The door to the records, on the embedded store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tesapi.errors import DestinationFull
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
