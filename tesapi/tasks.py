"""`Tasks`: the one door through which tasks are made, read and changed."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime

import uuid_utils

from tesapi import logs
from tesapi.backends.base import Backend
from tesapi.errors import QueueFull, TesapiError
from tesapi.store.base import Page, TaskQuery, TaskStore
from tesapi.tes import views
from tesapi.tes.events import CancelRequested, Event, Noted, Refused
from tesapi.tes.models import TaskDocument, View
from tesapi.tes.record import TaskRecord, apply, apply_all
from tesapi.tes.states import State, is_settled

_log = logging.getLogger(__name__)

_TAILS_PATIENCE_S = 2.0
_COUNT_SELDOM = 50

Listener = Callable[[str, State], None]
"""Called with a task's id and its new state, on the event loop, after the change is stored; is not to block."""


def now() -> datetime:
    """The time, as records have it."""
    return datetime.now(UTC)


class Tasks:
    """Makes, reads and changes tasks. `backends`, by the name of their destination, are asked for live log tails.

    `parameters` are the `backend_parameters` that tasks may use. Where `max_queued` tasks are queued, no more are made.
    """

    def __init__(
        self,
        store: TaskStore,
        backends: Mapping[str, Backend],
        parameters: Collection[str] = frozenset(),
        *,
        max_queued: int | None = None,
    ) -> None:
        self._store = store
        self._parameters = frozenset(parameters)
        self._backends = backends
        self._queue = None if max_queued is None else _Queue(store, max_queued)
        self._listeners: list[Listener] = []

    def listen(self, listener: Listener) -> None:
        """Have `listener` told of every change of a state that this process makes."""
        self._listeners.append(listener)

    async def create(self, document: TaskDocument, owner: str, *, key: str | None = None) -> str:
        """Store a new task durably; its id.

        With a `key`, a task is made only the first time that `owner` sends it; afterwards the id is that task's. Raises
        KeyReused where it comes with another document. Raises QueueFull.
        """
        digest = "" if key is None else _digest(document)
        if key is not None and (known := await self._store.keyed(owner, key, digest)) is not None:
            return known
        document, events = _without_unsupported_parameters(document, self._parameters)
        record = TaskRecord(id=str(uuid_utils.uuid7()), owner=owner, document=document, created=now())
        for event in events:
            record = apply(record, event)
        async with self._queue.room() if self._queue is not None else contextlib.nullcontext():
            if key is None:
                await self._store.insert([record])
            elif (first := await self._store.insert_once(record, key, digest)) != record.id:
                return first
        self._tell(record.id, None, record.state)
        return record.id

    async def view(self, task_id: str, view: View, owner: str) -> bytes:
        """A task as JSON. FULL has what a running executor has printed so far. Raises TaskNotFound."""
        if view is not View.FULL:
            return await self._store.view(task_id, view, owner=owner)
        record = await self._store.load(task_id, owner=owner)
        return views.full(await self._with_live_tails(record))

    async def find(self, query: TaskQuery) -> Page:
        """A page of tasks, newest first. Raises InvalidDocument for a page token that is none."""
        return await self._store.find(query)

    async def cancel(self, task_id: str, owner: str) -> None:
        """Have the task end. One that has ended stays as it is. Raises TaskNotFound."""
        record = await self._store.load(task_id, owner=owner)
        await self.record(record, CancelRequested(now()))

    async def load(self, task_id: str) -> TaskRecord:
        """The record as it is stored. Raises TaskNotFound."""
        return await self._store.load(task_id)

    async def record(self, record: TaskRecord, *events: Event, at_most: int | None = None) -> TaskRecord:
        """Fold `events` into the task, whatever has become of it meanwhile; the record as it is stored then.

        `record` is what the caller knows of it, and may be old. With `at_most`, raises DestinationFull, as
        `TaskStore.replace` does.
        """
        while True:
            after = apply_all(record, events)
            if after is record:
                return record
            if await self._store.replace(after, at_most=at_most):
                self._tell(record.id, record.state, after.state)
                return replace(after, revision=record.revision + 1)
            record = await self._store.load(record.id)

    def _tell(self, task_id: str, before: State | None, after: State) -> None:
        if before is not after:
            with logs.about(task_id):
                _log.info("%s", after.value if before is None else f"{before.value} -> {after.value}")
        for listener in self._listeners:
            listener(task_id, after)

    async def _with_live_tails(self, record: TaskRecord) -> TaskRecord:
        attempt = record.attempt
        if attempt is None or attempt.handle is None or is_settled(record.state) or not attempt.executors:
            return record
        run = attempt.executors[-1]
        backend = self._backends.get(attempt.destination)
        if backend is None or run.exit_code is not None:
            return record
        tails = None
        with contextlib.suppress(TesapiError, TimeoutError):
            async with asyncio.timeout(_TAILS_PATIENCE_S):
                tails = await backend.tails(attempt.handle)
        if tails is None or tails.index != len(attempt.executors) - 1:
            return record
        run = replace(run, stdout=tails.stdout, stderr=tails.stderr)
        attempt = replace(attempt, executors=(*attempt.executors[:-1], run))
        attempts = (*record.progress.attempts[:-1], attempt)
        return replace(record, progress=replace(record.progress, attempts=attempts))


class _Queue:
    """Lets in new tasks while fewer than `at_most` are queued, as far as this process knows.

    Of one process there are never more; several processes may be off together by what each lets in between two counts.
    Between counts every task that came is added, and none that has started is taken off.
    """

    def __init__(self, store: TaskStore, at_most: int) -> None:
        self._store = store
        self._at_most = at_most
        self._known = 0
        self._coming = 0
        self._count_again = float("-inf")
        self._lock = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def room(self) -> AsyncIterator[None]:
        """Room for one more task, which is made inside. Raises QueueFull."""
        async with self._lock:
            if time.monotonic() >= self._count_again:
                await self._count()
            if self._known >= self._at_most:
                raise QueueFull(self._at_most)
            self._known += 1
            self._coming += 1
        try:
            yield
        except TesapiError:
            self._known -= 1
            raise
        finally:
            self._coming -= 1

    async def _count(self) -> None:
        begin = time.monotonic()
        self._known = await self._store.queued(at_most=self._at_most) + self._coming
        # A long queue takes longer to count; it is to take a small part of the time, whatever its length.
        self._count_again = begin + _COUNT_SELDOM * (time.monotonic() - begin)


def _digest(document: TaskDocument) -> str:
    """The same for documents that say the same, in whatever order."""
    said = json.dumps(document.model_dump(mode="json", exclude_none=True), sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _without_unsupported_parameters(
    document: TaskDocument, supported: frozenset[str]
) -> tuple[TaskDocument, list[Event]]:
    """The document as it is kept, and what happens at once.

    "Backends shall log system warnings if a key is passed that is unsupported. Backends shall not store or return
    unsupported keys. If backend_parameters_strict equals true, backends should fail the task." (TES 1.1)
    """
    resources = document.resources
    given = (resources and resources.backend_parameters) or {}
    unsupported = ", ".join(sorted(given.keys() - supported))
    if resources is None or not unsupported:
        return document, []
    kept = {name: value for name, value in given.items() if name in supported}
    resources = resources.model_copy(update={"backend_parameters": kept or None})
    document = document.model_copy(update={"resources": resources})
    there = f" (it has: {', '.join(sorted(supported))})" if supported else ""
    what = f"this server does not support the backend_parameters {unsupported}{there}."
    if resources.backend_parameters_strict:
        return document, [Refused(f"backend_parameters_strict is set, and {what}", now())]
    return document, [Noted(f"Warning: {what}", now())]
