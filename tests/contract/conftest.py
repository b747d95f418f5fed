"""The implementations on which the contract suites run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tesapi.store.base import TaskStore
from tesapi.store.sqlite import SqliteStore


class Clock:
    """A monotonic clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def _sqlite(folder: Path, clock: Clock) -> TaskStore:
    return SqliteStore(folder / "tesapi.db", clock=clock)


@pytest.fixture
def clock() -> Clock:
    """The clock by which the store sees leases go stale."""
    return Clock()


@pytest.fixture(params=[pytest.param(_sqlite, id="sqlite")])
def open_store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Callable[[], TaskStore]:
    """Gives the same store each time, to be entered one after the other."""
    return lambda: request.param(tmp_path, clock)


@pytest.fixture
async def store(open_store: Callable[[], TaskStore]) -> AsyncIterator[TaskStore]:
    """A store with nothing in it."""
    async with open_store() as store:
        yield store
