"""Claims tasks, drives each in a child of its own, renews the leases, and finds everything again after a restart."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import uuid
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from tesapi import logs
from tesapi.dispatch.drive import Driver, Waiting
from tesapi.dispatch.routing import LOCAL_AT
from tesapi.errors import BackendUnavailable, StoreUnavailable
from tesapi.store.base import TaskStore
from tesapi.tasks import Tasks, now
from tesapi.tes.events import Lost, Noted
from tesapi.tes.record import TaskRecord, Work
from tesapi.tes.states import State, is_settled

_log = logging.getLogger(__name__)

_FIRST_RETRY_S = 1.0
_SLOWEST_RETRY_S = 60.0
_RETRY_AFTER_BUG_S = 30.0
_STALLED_S = 15.0
_GATHER_NEWS_S = 0.02
_RENEWALS_PER_LEASE = 3
_LOOK_FOR_ITS_RETURN_S = 0.5
_TOLD_AT_ONCE = 8  # of tasks that wait for a destination to come back


@dataclass(eq=False, slots=True)
class _Driven:
    placing: bool
    canceling: asyncio.Event = field(default_factory=asyncio.Event)
    child: asyncio.Task[None] | None = None

    def is_placed(self) -> None:
        """From now on the store counts it."""
        self.placing = False


class Dispatcher:
    """One holder of leases. `run` goes on until it is canceled; then every lease is given back, no state changed."""

    def __init__(
        self,
        store: TaskStore,
        tasks: Tasks,
        driver: Driver,
        *,
        lease_s: float,
        poll_interval_s: float,
        give_up_after_s: float = 604800.0,
    ) -> None:
        self._store = store
        self._tasks = tasks
        self._driver = driver
        self._lease = timedelta(seconds=lease_s)
        self._poll_interval_s = poll_interval_s
        self._give_up_after = timedelta(seconds=give_up_after_s)
        self._holder = uuid.uuid4().hex
        self._driven: dict[str, _Driven] = {}
        self._failures: dict[str, int] = {}
        self._unreleased: dict[str, datetime | None] = {}
        self._news = asyncio.Event()
        self._cancels = asyncio.Event()
        self._awaited: asyncio.TimerHandle | None = None
        self._last_round = time.monotonic()
        self._pause_until = float("-inf")
        self._last_renewal = float("-inf")
        self._has_room = True
        self._failing = False
        tasks.listen(self._on_change)

    @property
    def alive(self) -> bool:
        """Whether it has come round recently."""
        return time.monotonic() - self._last_round < _STALLED_S

    async def run(self) -> None:
        """Drive whatever there is to drive, until canceled."""
        async with asyncio.TaskGroup() as children:
            children.create_task(self._hear_of_cancels(), name="cancels")
            children.create_task(self._store.watch(self._on_news), name="news")
            while True:
                self._news.clear()
                await self._round(children)
                self._last_round = time.monotonic()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_interval_s):
                        await self._news.wait()

    async def _round(self, children: asyncio.TaskGroup) -> None:
        try:
            await self._renew()
            for task_id in list(self._unreleased):
                await self._release(task_id, self._unreleased.pop(task_id))
            if not self._driven:
                await self._claim(children, queued=0)  # what is placed takes room before anything new does
            await self._claim(children, queued=await self._room())
        except StoreUnavailable as error:
            if not self._failing:
                _log.error("The store does not answer; trying again: %s", error)
            self._failing = True
        else:
            self._failing = False

    async def _room(self) -> int:
        """How many more tasks may be driven now: what the destinations that take jobs have left, over all dispatchers.

        Where none takes any, a few tasks are looked at all the same, now and then, to be told so.
        """
        if time.monotonic() < self._pause_until:
            return 0
        offers = [offer for offer in self._driver.offers(await self._store.occupied()) if not offer.site.drain]
        room = sum(max(0, offer.capacity.max_jobs - offer.placed) for offer in offers if offer.unavailable is None)
        if offers and all(offer.unavailable is not None for offer in offers):
            room = _TOLD_AT_ONCE
        placing = sum(driven.placing for driven in self._driven.values())
        self._has_room = room > placing
        return max(0, room - placing)

    async def _claim(self, children: asyncio.TaskGroup, *, queued: int) -> None:
        elsewhere = [name for name in await self._store.occupied() if self._is_of_another_host(name)]
        claimed = await self._store.claim(self._holder, queued=queued, ttl=self._lease, passed_over=elsewhere)
        for record in claimed:
            driven = self._driven[record.id] = _Driven(placing=record.work is Work.QUEUED)
            driven.child = children.create_task(self._see_through(record, driven), name=f"drive {record.id}")

    def _is_of_another_host(self, destination: str) -> bool:
        """Whether only another dispatcher can reach the jobs there."""
        return destination.startswith(LOCAL_AT) and destination not in self._driver.destinations

    async def _renew(self) -> None:
        if time.monotonic() - self._last_renewal < self._lease.total_seconds() / _RENEWALS_PER_LEASE:
            return
        held = await self._store.renew(self._holder, list(self._driven))
        self._last_renewal = time.monotonic()
        for task_id, driven in list(self._driven.items()):
            if task_id not in held and driven.child is not None:
                _log.warning("%s is driven by another dispatcher now.", task_id)
                driven.child.cancel()
            elif held.get(task_id) is State.CANCELING:
                driven.canceling.set()

    async def _hear_of_cancels(self) -> None:
        """Other processes tell nobody when they store that a user wants a task to end: it is looked up."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_interval_s):
                    await self._cancels.wait()
            self._cancels.clear()
            if self._driven:
                with contextlib.suppress(StoreUnavailable):
                    for task_id in await self._store.canceling(self._holder):
                        if driven := self._driven.get(task_id):
                            driven.canceling.set()

    def _on_news(self) -> None:
        """Some process has made a task or wants one to end: look in a moment, at all that has come by then."""
        if self._awaited is None:
            self._awaited = asyncio.get_running_loop().call_later(_GATHER_NEWS_S, self._look)

    def _look(self) -> None:
        self._awaited = None
        self._cancels.set()
        if self._has_room:
            self._news.set()

    def _on_change(self, task_id: str, state: State) -> None:
        driven = self._driven.get(task_id)
        if driven is not None and state is State.CANCELING:
            driven.canceling.set()
        if driven is None and (self._has_room or state is State.CANCELING):
            self._news.set()

    async def _see_through(self, record: TaskRecord, driven: _Driven) -> None:
        """Drive one task, and give its lease back: when it is done, when it has to wait, and when we stop."""
        with logs.about(record.id):
            delay_s: float | None = None
            try:
                delay_s = await self._attempt(record, driven)
            finally:
                del self._driven[record.id]
                not_before = None if delay_s is None else now() + timedelta(seconds=delay_s)
                # Also when we are canceled: without it, others would have to wait until the lease goes stale.
                await self._release(record.id, not_before)
                self._news.set()

    async def _release(self, task_id: str, not_before: datetime | None) -> None:
        try:
            await self._store.release(self._holder, task_id, not_before=not_before)
        except StoreUnavailable:
            self._unreleased[task_id] = not_before  # the next round tries again; meanwhile nobody can claim it

    async def _attempt(self, record: TaskRecord, driven: _Driven) -> float | None:
        """Drive the task; seconds to wait before the next try, or None where it is done."""
        try:
            while True:
                try:
                    await self._driver.drive(record, driven.canceling, driven.is_placed)
                except StoreUnavailable as error:
                    _log.warning("The store does not answer; trying again: %s", error)
                    await asyncio.sleep(self._retry_s(record.id))
                except BackendUnavailable as error:
                    record = await self._reloaded(record)
                    if record.work is Work.QUEUED or not self._driver.knows_destination_of(record):
                        raise
                    await self._wait_for_its_destination(record, driven, error)
                else:
                    self._failures.pop(record.id, None)
                    return None
                record = await self._reloaded(record)
        except Waiting as wait:
            return await self._postponed(record, str(wait), because_full=wait.full)
        except BackendUnavailable as error:
            return await self._postponed(record, str(error), because_full=False)
        except Exception as error:  # noqa: BLE001 - it is logged whole
            # A bug, or a record that nobody can drive: the others are not to suffer, and the task is not to be lost.
            _log.exception("Driving the task failed; trying again in %.0f s.", _RETRY_AFTER_BUG_S)
            await self._note(record, f"Waiting: the dispatcher failed on this task ({type(error).__name__}: {error}).")
            return _RETRY_AFTER_BUG_S

    async def _postponed(self, record: TaskRecord, why: str, *, because_full: bool) -> float:
        delay_s = self._retry_s(record.id)
        if await self._is_hopeless(record, BackendUnavailable(why)):
            return delay_s
        if not because_full and record.work is Work.QUEUED:  # so will others find it
            self._pause_until = time.monotonic() + self._poll_interval_s
        _log.info("Looking for a place again in %.0f s: %s", delay_s, why)
        await self._note(record, f"Waiting: {why}")
        return delay_s

    async def _wait_for_its_destination(self, record: TaskRecord, driven: _Driven, error: BackendUnavailable) -> None:
        """A job that was placed belongs to its destination: wait for it to come back, or for a while."""
        delay_s = self._retry_s(record.id)
        _log.warning("Trying again in %.0f s: %s", delay_s, error)
        if await self._is_hopeless(record, error):
            return
        await self._note(record, f"Waiting: {error}")
        ok = self._driver.takes_jobs(record)
        canceling = driven.canceling.is_set()
        deadline = time.monotonic() + delay_s
        while time.monotonic() < deadline:
            await asyncio.sleep(min(_LOOK_FOR_ITS_RETURN_S, delay_s))
            if (not ok and self._driver.takes_jobs(record)) or canceling is not driven.canceling.is_set():
                return

    async def _is_hopeless(self, record: TaskRecord, error: BackendUnavailable) -> bool:
        """Whether the task's destination has been away for so long that the task is settled without its word."""
        record = await self._reloaded(record)
        attempt = record.attempt
        if attempt is None or attempt.handle is None or is_settled(record.state):
            return False
        destination = self._driver.destinations.get(attempt.destination)
        away_since = attempt.placed
        if destination is not None:
            condition = destination.backend.condition()
            away_since = now() if condition.ok else max(condition.since, attempt.placed)
        if now() - away_since < self._give_up_after:
            return False
        days = self._give_up_after.total_seconds() / 86400
        reason = f"Given up after {days:g} days; the job may still run there: {error}"
        with contextlib.suppress(StoreUnavailable):
            await self._tasks.record(record, Lost(attempt.job_id, reason, now()))
        return True

    def _retry_s(self, task_id: str) -> float:
        failures = self._failures[task_id] = self._failures.get(task_id, 0) + 1
        ceiling = min(_FIRST_RETRY_S * 2.0 ** min(failures - 1, 16), _SLOWEST_RETRY_S)
        jitter: float = random.uniform(0.5, 1.0)  # noqa: S311
        return ceiling * jitter

    async def _reloaded(self, record: TaskRecord) -> TaskRecord:
        with contextlib.suppress(StoreUnavailable):
            return await self._tasks.load(record.id)
        return record

    async def _note(self, record: TaskRecord, text: str) -> None:
        with contextlib.suppress(StoreUnavailable):
            await self._tasks.record(record, Noted(text, now()))
