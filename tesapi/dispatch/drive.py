"""One task, from wherever its record stands to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import uuid_utils

from tesapi.backends.base import Backend
from tesapi.dispatch.routing import Destination, NowhereToGo, choose
from tesapi.errors import BackendUnavailable, JobLost
from tesapi.jobs.plan import Job, needs, plan
from tesapi.tasks import Tasks, now
from tesapi.tes.events import Discarded, Lost, Placed, Prepared, Refused, Reported
from tesapi.tes.record import Attempt, TaskRecord, Work
from tesapi.tes.states import State, is_settled

_ASK_AGAIN_S = 2.0


@dataclass(frozen=True, slots=True)
class Driver:
    """What driving needs: the door to the records, the destinations, and what job documents say of this server."""

    tasks: Tasks
    destinations: Mapping[str, Destination]
    store_id: str
    storage: Mapping[str, Mapping[str, object]]

    async def drive(self, record: TaskRecord, canceling: asyncio.Event) -> None:
        """See the task to its end, and its job's place removed. `canceling` is set when the user wants it to end.

        May be left at any await and called again with the record as it then is. Raises BackendUnavailable where
        its destination cannot be reached now; nothing is lost by trying again later.
        """
        record = await self._place(record)
        attempt = record.attempt
        if attempt is None or record.work is Work.DONE:
            return
        destination = self.destinations.get(attempt.destination)
        if destination is None:
            raise BackendUnavailable(
                f"The job {attempt.job_id} was placed at {attempt.destination}, which is not configured any more."
            )
        record, attempt, job = await self._prepare(record, attempt, destination.backend)
        if not is_settled(record.state):
            record = await self._run(record, attempt, job, destination.backend, canceling)
        await self._discard(record, destination.backend)

    async def _place(self, record: TaskRecord) -> TaskRecord:
        """Decide where the task goes, and record that before anything is asked there."""
        if record.work is not Work.QUEUED:
            return record
        known = [(destination.name, destination.backend.capacity) for destination in self.destinations.values()]
        choice = choose(*needs(record), known)
        if isinstance(choice, NowhereToGo):
            return await self.tasks.record(record, Refused(choice.sentence, now()))
        await self.destinations[choice].backend.runtime()  # placed only where it could run now
        return await self.tasks.record(record, Placed(str(uuid_utils.uuid7()), choice, now()))

    async def _prepare(self, record: TaskRecord, attempt: Attempt, backend: Backend) -> tuple[TaskRecord, Attempt, Job]:
        """The job's place, and its handle in the record: from then on the job may have been started."""
        runtime = await backend.runtime()
        job = plan(record, attempt.job_id, store_id=self.store_id, storage=self.storage, runtime=runtime)
        if attempt.handle is None:
            # Also for a task that was canceled meanwhile: what an earlier try may have left is found by its id.
            handle = await backend.prepare(job)
            record = await self.tasks.record(record, Prepared(attempt.job_id, handle))
        return record, _current(record), job

    async def _run(
        self, record: TaskRecord, attempt: Attempt, job: Job, backend: Backend, canceling: asyncio.Event
    ) -> TaskRecord:
        if record.state is State.CANCELING:
            canceling.set()
        try:
            async with asyncio.TaskGroup() as children:
                canceler = children.create_task(_cancel_when_asked(backend, attempt, canceling), name="cancel")
                record = await self._follow(record, attempt, job, backend, canceling)
                canceler.cancel()
        except ExceptionGroup as group:
            # The first to fail stopped the other, and says why.
            if not isinstance(group.exceptions[0], JobLost):
                raise group.exceptions[0] from group
            return await self.tasks.record(record, Lost(attempt.job_id, str(group.exceptions[0]), now()))
        return record

    async def _follow(
        self, record: TaskRecord, attempt: Attempt, job: Job, backend: Backend, canceling: asyncio.Event
    ) -> TaskRecord:
        handle = attempt.handle or {}
        if canceling.is_set():
            await backend.cancel(handle)  # before the start, so that a job that was never started never runs
        await backend.start(handle, job)
        async for lines in backend.follow(handle):
            record = await self.tasks.record(record, *(Reported(attempt.job_id, line) for line in lines))
        return record

    async def _discard(self, record: TaskRecord, backend: Backend) -> None:
        attempt = _current(record)
        if attempt.handle is not None:
            await backend.discard(attempt.handle)
        await self.tasks.record(record, Discarded(attempt.job_id))


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
