"""What a store of task records promises. Its docstrings are what `tests/contract/test_store.py` tests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import TracebackType
from typing import Protocol, Self

from tesapi.tes.models import View
from tesapi.tes.record import TaskRecord
from tesapi.tes.states import State


@dataclass(frozen=True, slots=True)
class TaskQuery:
    """Which tasks, and how much of each: `size` tasks per page, `token` from the page before.

    All filters have to fit. `name_prefix` is literal text; a tag with an empty value fits any value of its key.
    """

    view: View = View.MINIMAL
    size: int = 256
    token: str | None = None
    owner: str | None = None
    name_prefix: str = ""
    state: State | None = None
    tags: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """Rendered views, newest first, and the token of the next page where there is one."""

    views: Sequence[bytes]
    next_token: str | None


class TaskStore(Protocol):
    """Keeps records and leases. An async context manager.

    A *lease* belongs to the store, not to the record: a holder's name beside a task, and one number per holder that
    the holder raises with `renew`. It is stale when that number stood still for `ttl` on the *taker's* monotonic
    clock, so no two clocks need to agree. A lease only saves work: what is true is guarded by `replace`.

    Every method raises StoreUnavailable where the store cannot answer. Of a write that raised it nobody knows whether
    it was done, or will be: an embedded store has changed nothing, one behind a network may have. It is done once or
    not at all, and what has been done is found by whoever asks again: a new task and a replaced record by `load`,
    tasks that were leased by the next `claim` of the same holder.
    """

    @property
    def id(self) -> str:
        """Made once for each store; job directories and containers carry it."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def insert(self, records: Sequence[TaskRecord]) -> None:
        """Keep new records, all or none. They survive a power loss once this has returned."""
        ...

    async def insert_once(self, record: TaskRecord, key: str, digest: str) -> str:
        """Keep a new record unless `key` stands for a task of its owner already; the id of the task that it stands for.

        One task is made however often and by however many processes this is called at the same time. The key is kept as
        long as the task is. Raises KeyReused where it came with another `digest` before; nothing is stored then.
        """
        ...

    async def keyed(self, owner: str, key: str, digest: str) -> str | None:
        """The id of the task that `key` stands for; None where it stands for none. Raises as `insert_once`."""
        ...

    async def load(self, task_id: str, *, owner: str | None = None) -> TaskRecord:
        """The record as it was last stored. Raises TaskNotFound, also where `owner` is given and is not its owner."""
        ...

    async def view(self, task_id: str, view: View, *, owner: str | None = None) -> bytes:
        """The rendered view of one task, without the cost of its record where that is possible. Raises as `load`."""
        ...

    async def find(self, query: TaskQuery) -> Page:
        """One page, newest first; neither skips nor repeats a task while others are created.

        Raises InvalidDocument where the token is not one of this store's for these filters.
        """
        ...

    async def replace(self, record: TaskRecord, *, at_most: int | None = None) -> bool:
        """Store `record` as its next revision if nobody was faster, durably; False where somebody was.

        A task that was released until some time is due again at once.

        With `at_most`, a placed record is stored only if no more than so many tasks are then placed at the destination
        of its current attempt, itself among them: exactly, however many processes use this store. Raises
        DestinationFull where there would be more, and nothing is changed. Without it, or for a record that is not
        placed, nothing is counted.
        """
        ...

    async def queued(self, *, at_most: int) -> int:
        """How many tasks are in state QUEUED, counted no further than `at_most`."""
        ...

    async def occupied(self) -> Mapping[str, int]:
        """How many tasks are placed at each destination; one where none is does not stand in it."""
        ...

    async def purge(self, *, before: datetime | None = None, keep: int | None = None, limit: int) -> int:
        """Remove tasks with which nothing is left to do (Work.DONE), and all that is kept of them; how many.

        Those go that were done before `before`, and those that are not among the `keep` tasks done last; without both,
        none. The ones done first go first, at most `limit` of them, and fewer where they are large, so that nobody who
        writes meanwhile waits for long: ask again until it answers 0.
        """
        ...

    async def purgeable(self, *, before: datetime | None = None, keep: int | None = None) -> int:
        """How many tasks `purge` would remove if it were asked until it answers 0."""
        ...

    async def claim(
        self, holder: str, *, queued: int, ttl: timedelta, passed_over: Collection[str] = ()
    ) -> list[TaskRecord]:
        """Lease to `holder` every placed task, and up to `queued` queued ones, that nobody holds and that are due.

        Tasks that are placed at a destination that is `passed_over` are left to others. The queued ones are taken from
        their owners in turn, each owner's oldest first. Placed ones come oldest first.
        """
        ...

    async def watch(self, tell: Callable[[], None]) -> None:
        """Call `tell` soon after any process has made a task or wants one to end, until canceled.

        It may be called for nothing, and not be called at all: whoever has to know looks for himself as well, now and
        then. Returns where this store cannot tell what others do.
        """
        ...

    async def renew(self, holder: str, task_ids: Collection[str]) -> Mapping[str, State]:
        """Raise the holder's number; the states of those of `task_ids` that it still holds."""
        ...

    async def canceling(self, holder: str) -> Collection[str]:
        """The ids of the tasks that `holder` holds and that are CANCELING. Cheap: it is asked about once a second."""
        ...

    async def release(self, holder: str, task_id: str, *, not_before: datetime | None = None) -> None:
        """Give a lease back; nobody can claim the task before `not_before`. Nothing happens if `holder` has it not."""
        ...
