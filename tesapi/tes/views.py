"""The three views of a task as JSON bytes.

A stored BASIC view is a *fragment*: the fields behind id and state, which change while the fragment does not have to.
"""

from __future__ import annotations

import json
from datetime import UTC
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from tesapi.tes.models import ExecutorLog, OutputFileLog, TaskLog, View

if TYPE_CHECKING:
    from tesapi.tes.record import Attempt, ExecutorRun, Note, TaskRecord
    from tesapi.tes.states import State

RENDER_VERSION = 1
"""Raised whenever `basic_fragment` renders differently: stored fragments of other versions are rendered anew."""

_BASIC_INPUTS = {"inputs": {"__all__": {"content"}}}
_logs: TypeAdapter[tuple[TaskLog, ...]] = TypeAdapter(tuple[TaskLog, ...])
_time: TypeAdapter[object] = TypeAdapter(object)


def minimal(task_id: str, state: State) -> bytes:
    """The MINIMAL view: id and state, nothing else."""
    return b'{"id":%s,"state":"%s"}' % (json.dumps(task_id).encode(), state.value.encode())


def with_fragment(task_id: str, state: State, fragment: bytes) -> bytes:
    """A view of a task from its id, its state and a stored fragment."""
    return b'{"id":%s,"state":"%s",%s}' % (json.dumps(task_id).encode(), state.value.encode(), fragment)


def basic_fragment(record: TaskRecord) -> bytes:
    """All fields of the BASIC view behind id and state."""
    document = record.document.model_dump_json(exclude_none=True, exclude=_BASIC_INPUTS)
    return _fragment(record, document, View.BASIC)


def full(record: TaskRecord) -> bytes:
    """The FULL view."""
    document = record.document.model_dump_json(exclude_none=True)
    return with_fragment(record.id, record.state, _fragment(record, document, View.FULL))


def render(record: TaskRecord, view: View) -> bytes:
    """`record` in `view`."""
    match view:
        case View.MINIMAL:
            return minimal(record.id, record.state)
        case View.BASIC:
            return with_fragment(record.id, record.state, basic_fragment(record))
        case View.FULL:
            return full(record)


def _fragment(record: TaskRecord, document: str, view: View) -> bytes:
    logs = _logs.dump_json(_task_logs(record, view), exclude_none=True)
    created = _time.dump_json(record.created)
    return b'%s,"logs":%s,"creation_time":%s' % (document[1:-1].encode(), logs, created)


def _task_logs(record: TaskRecord, view: View) -> tuple[TaskLog, ...]:
    attempts = record.progress.attempts
    if not attempts:
        notes = record.progress.notes
        return (TaskLog(system_logs=_system_logs(notes, view)),) if notes else ()
    return tuple(
        _task_log(attempt, view, record.progress.notes if index == 0 else ()) for index, attempt in enumerate(attempts)
    )


def _task_log(attempt: Attempt, view: View, earlier: tuple[Note, ...]) -> TaskLog:
    metadata = {"destination": attempt.destination, "job_id": attempt.job_id}
    if attempt.host:
        metadata["host"] = attempt.host
    images = list(dict.fromkeys(run.image_used for run in attempt.executors if run.image_used))
    if images:
        metadata["image_used"] = "; ".join(images)
    return TaskLog(
        logs=tuple(_executor_log(run, view) for run in attempt.executors),
        metadata=metadata,
        start_time=attempt.started,
        end_time=attempt.ended,
        outputs=tuple(
            OutputFileLog(url=output.url, path=output.path, size_bytes=str(output.size_bytes))
            for output in attempt.outputs
        ),
        system_logs=_system_logs((*earlier, *attempt.notes), view),
    )


def _executor_log(run: ExecutorRun, view: View) -> ExecutorLog:
    full_view = view is View.FULL
    return ExecutorLog(
        start_time=run.started,
        end_time=run.ended,
        exit_code=-1 if run.exit_code is None else run.exit_code,
        stdout=run.stdout if full_view else None,
        stderr=run.stderr if full_view else None,
    )


def _system_logs(notes: tuple[Note, ...], view: View) -> tuple[str, ...] | None:
    if view is not View.FULL:
        return None
    ordered = sorted(notes, key=lambda note: note.at)
    return tuple(f"{note.at.astimezone(UTC):%Y-%m-%dT%H:%M:%S}Z {note.text}" for note in ordered)
