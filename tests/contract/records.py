"""Tasks to keep: their records, and their life in a few words."""

from __future__ import annotations

import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from tesapi.store.base import TaskStore
from tesapi.tes.events import Discarded, Event, JobEnded, JobStarted, Outcome, Placed, Prepared, Reported
from tesapi.tes.models import parse_document
from tesapi.tes.record import TaskRecord, apply

NOON = datetime(2026, 7, 1, 12, 0, 0, 123456, UTC)
MINUTE = timedelta(minutes=1)

_BODY = b"""{
  "name": "count", "description": "counts \\"lines\\"\\n",
  "inputs": [{"url": "s3://bucket/in.txt", "path": "/data/in.txt"}, {"content": "abc", "path": "/data/abc"}],
  "outputs": [{"url": "s3://bucket/out.txt", "path": "/data/out.txt", "type": "FILE"}],
  "resources": {"cpu_cores": 2, "ram_gb": 0.1},
  "executors": [{"image": "alpine", "command": ["wc", "-l", "/data/in.txt"], "stdout": "/data/out.txt"}],
  "tags": {"lab": "\\u00fc\\ud83d\\ude00"}
}"""


def new(
    owner: str = "ada", task_id: str = "", name: str | None = "count", tags: dict[str, str] | None = None
) -> TaskRecord:
    """A task that nobody has looked at."""
    document = parse_document(_BODY).model_copy(update={"name": name} | ({} if tags is None else {"tags": tags}))
    return TaskRecord(id=task_id or f"task-{uuid.uuid4()}", owner=owner, document=document, created=NOON)


def after(record: TaskRecord, *events: Event) -> TaskRecord:
    """The record with `events` folded in."""
    for event in events:
        record = apply(record, event)
    return record


def placed(record: TaskRecord, destination: str = "local") -> TaskRecord:
    """The task with a job that may have been started."""
    job_id = f"job-{record.id}"
    return after(record, Placed(job_id, destination, NOON), Prepared(job_id, {"directory": "/jobs/1"}))


def ended(record: TaskRecord) -> TaskRecord:
    """The placed task, COMPLETE; its job is still to be discarded."""
    job_id = f"job-{record.id}"
    return after(
        record,
        Reported(job_id, JobStarted(seq=1, at=NOON, event="started", host="node1")),
        Reported(job_id, JobEnded(seq=2, at=NOON, event="ended", outcome=Outcome.COMPLETE)),
    )


def done(record: TaskRecord) -> TaskRecord:
    """The placed task with nothing left to do."""
    return after(ended(record), Discarded(f"job-{record.id}"))


async def kept(store: TaskStore, *records: TaskRecord) -> list[TaskRecord]:
    """The records, inserted."""
    await store.insert(records)
    return list(records)


async def stored(store: TaskStore, record: TaskRecord) -> TaskRecord:
    """`record` stored as its next revision, which it then carries."""
    assert await store.replace(record)
    return replace(record, revision=record.revision + 1)
