"""The implementations on which the contract suites run."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tesapi.store.base import TaskStore
from tesapi.store.mongo import MongoStore
from tesapi.store.sqlite import SqliteStore
from tests.mongod import Mongod


class Clock:
    """A monotonic clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    """The clock by which the store sees leases go stale."""
    return Clock()


@pytest.fixture(params=["sqlite", "mongo", "mongo-standalone"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Callable[[], TaskStore]:
    """Gives the same store each time, to be entered one after the other."""
    if request.param == "sqlite":
        return lambda: SqliteStore(tmp_path / "tesapi.db", clock=clock)
    mongod: Mongod = request.getfixturevalue("mongod" if request.param == "mongo" else "standalone_mongod")
    uri = mongod.database_url(f"test-{uuid.uuid4().hex}")
    return lambda: MongoStore(uri, clock=clock)


@pytest.fixture
async def store(open_store: Callable[[], TaskStore]) -> AsyncIterator[TaskStore]:
    """A store with nothing in it."""
    async with open_store() as store:
        yield store
