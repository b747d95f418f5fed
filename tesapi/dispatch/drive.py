"""One task, from wherever its record stands to its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import uuid_utils

from tesapi.backends.base import Backend, Need
from tesapi.dispatch.routing import Destination, NotNow, NowhereToGo, Offer, choose, wish_of
from tesapi.errors import BackendUnavailable, DestinationFull, JobLost
from tesapi.jobs.plan import Job, needs, plan
from tesapi.store.base import TaskStore
from tesapi.tasks import Tasks, now
from tesapi.tes.events import Discarded, Lost, Placed, Prepared, Refused, Reported, Withdrawn
from tesapi.tes.record import Attempt, TaskRecord, Work
from tesapi.tes.states import State, is_settled

_ASK_AGAIN_S = 2.0


class Waiting(Exception):
    """The task has to wait; the text says what for. `full` says that it is only for room."""

    def __init__(self, sentence: str, *, full: bool) -> None:
        super().__init__(sentence)
        self.full = full


@dataclass(frozen=True, slots=True)
class Driver:
    """What driving needs: the door to the records, how much is placed where, and the destinations by name."""

    tasks: Tasks
    store: TaskStore
    destinations: Mapping[str, Destination]

    async def drive(self, record: TaskRecord, canceling: asyncio.Event, placed: Callable[[], None]) -> None:
        """See the task to its end, and its job's place removed. `canceling` is set when the user wants it to end.

        `placed` is called when the store counts it at a destination, or it will never be.

        May be left at any await and called again with the record as it then is. Raises Waiting where no destination
        takes it now, and BackendUnavailable where its own cannot be reached; nothing is lost by trying again later.
        """
        record = await self._place(record)
        placed()
        attempt = record.attempt
        if attempt is not None and not is_settled(record.state):
            backend = self._destination(attempt).backend
            record = await self._prepare(record, attempt)
            record = await self._run(record, _current(record), backend, canceling)
        await self._discard(record)

    def offers(self, placed: Mapping[str, int]) -> list[Offer]:
        """The destinations as they are now, with so many jobs `placed` at each."""
        offers = []
        for name, destination in self.destinations.items():
            condition, backend = destination.backend.condition(), destination.backend
            unavailable = None if condition.ok else condition.sentence
            offers.append(Offer(destination.site, backend.capacity, placed.get(name, 0), unavailable, backend.images))
        return offers

    def knows_destination_of(self, record: TaskRecord) -> bool:
        """Whether the destination of the task's job is among these."""
        return _current(record).destination in self.destinations

    def takes_jobs(self, record: TaskRecord) -> bool:
        """Whether the destination of the task's job answers, and could run it."""
        destination = self.destinations.get(_current(record).destination)
        return destination is not None and destination.backend.condition().ok

    async def _place(self, record: TaskRecord) -> TaskRecord:
        """Decide where the task goes, and record that before anything is asked there."""
        wish = wish_of(record)
        while record.work is Work.QUEUED:
            await self._look_again()
            choice = choose(wish, self.offers(await self.store.occupied()))
            if isinstance(choice, NowhereToGo):
                return await self.tasks.record(record, Refused(choice.sentence, now()))
            if isinstance(choice, NotNow):
                raise Waiting(choice.sentence, full=choice.full)
            backend = self.destinations[choice].backend
            await backend.runtime()  # placed only where it could run now
            placed = Placed(str(uuid_utils.uuid7()), choice, now())
            try:
                record = await self.tasks.record(record, placed, at_most=backend.capacity.max_jobs)
            except DestinationFull:  # another dispatcher was faster
                continue
        return record

    async def _look_again(self) -> None:
        """Ask destinations that had no runtime for containers whether they have one by now."""
        for destination in self.destinations.values():
            if not destination.backend.condition().ok:
                with contextlib.suppress(BackendUnavailable):
                    await destination.backend.runtime()

    async def _prepare(self, record: TaskRecord, attempt: Attempt) -> TaskRecord:
        """The job's place, and its handle in the record: from then on the job may have been started."""
        if attempt.handle is not None:
            return record
        destination = self._destination(attempt)
        try:
            handle = await destination.backend.prepare(await self._job(record, attempt))
        except BackendUnavailable as error:
            # Nothing was started, and nothing will be: it may go elsewhere.
            await self.tasks.record(record, Withdrawn(attempt.job_id, f"Taken back: {error}", now()))
            raise
        return await self.tasks.record(record, Prepared(attempt.job_id, handle))

    async def _job(self, record: TaskRecord, attempt: Attempt) -> Job:
        destination = self._destination(attempt)
        runtime = await destination.backend.runtime()
        return plan(
            record,
            attempt.job_id,
            store_id=self.store.id,
            storage=destination.storage,
            runtime=runtime,
            tidy=destination.site.kind != "local",  # the local backend removes everything itself
        )

    async def _run(
        self, record: TaskRecord, attempt: Attempt, backend: Backend, canceling: asyncio.Event
    ) -> TaskRecord:
        if attempt.handle is None:  # it was canceled meanwhile
            return record
        if record.state is State.CANCELING:
            canceling.set()
        try:
            async with asyncio.TaskGroup() as children:
                canceler = children.create_task(_cancel_when_asked(backend, attempt, canceling), name="cancel")
                record = await self._follow(record, attempt, backend, canceling)
                canceler.cancel()
        except ExceptionGroup as group:
            # The first to fail stopped the other, and says why.
            if not isinstance(group.exceptions[0], JobLost):
                raise group.exceptions[0] from group
            return await self.tasks.record(record, Lost(attempt.job_id, str(group.exceptions[0]), now()))
        return record

    async def _follow(
        self, record: TaskRecord, attempt: Attempt, backend: Backend, canceling: asyncio.Event
    ) -> TaskRecord:
        handle = attempt.handle or {}
        if canceling.is_set():
            await backend.cancel(handle)  # before the start, so that a job that was never started never runs
        if attempt.started is None:
            await backend.start(handle, await self._job(record, attempt))
        else:
            await backend.resume(handle, Need(*needs(record)))
        async for lines in backend.follow(handle):
            record = await self.tasks.record(record, *(Reported(attempt.job_id, line) for line in lines))
        return record

    async def _discard(self, record: TaskRecord) -> None:
        """Remove what every job of a settled task has left, also those that were taken back."""
        for attempt in record.progress.attempts:
            if attempt.discarded:
                continue
            if attempt.destination in self.destinations or attempt.handle is not None:
                backend = self._destination(attempt).backend
                await backend.discard(attempt.handle or backend.address(attempt.job_id))
            record = await self.tasks.record(record, Discarded(attempt.job_id))

    def _destination(self, attempt: Attempt) -> Destination:
        destination = self.destinations.get(attempt.destination)
        if destination is None:
            raise BackendUnavailable(
                f"The job {attempt.job_id} was placed at {attempt.destination}, which this dispatcher does not have."
            )
        return destination


async def _cancel_when_asked(backend: Backend, attempt: Attempt, canceling: asyncio.Event) -> None:
    await canceling.wait()
    while True:
        await backend.cancel(attempt.handle or {})
        await asyncio.sleep(_ASK_AGAIN_S)


def _current(record: TaskRecord) -> Attempt:
    attempt = record.attempt
    if attempt is None:
        raise LookupError(f"Task {record.id} has been placed, and has no attempt.")
    return attempt
