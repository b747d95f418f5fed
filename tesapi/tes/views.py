"""The three views of a task as JSON bytes.

A stored BASIC view is a *fragment*: the fields behind id and state, which change while the fragment does not have to.
Where nothing of the document is left out in BASIC, it is only what stands behind the document, and begins with a comma.
"""

from __future__ import annotations

import json
from datetime import UTC
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from tesapi.tes.models import ExecutorLog, OutputFileLog, TaskLog, View

if TYPE_CHECKING:
    from tesapi.tes.models import TaskDocument
    from tesapi.tes.record import Attempt, ExecutorRun, Note, TaskRecord
    from tesapi.tes.states import State

RENDER_VERSION = 2
"""Raised whenever `basic_fragment` renders differently: stored fragments of other versions are rendered anew."""

_BASIC_INPUTS = {"inputs": {"__all__": {"content"}}}
_logs: TypeAdapter[tuple[TaskLog, ...]] = TypeAdapter(tuple[TaskLog, ...])
_time: TypeAdapter[object] = TypeAdapter(object)


def minimal(task_id: str, state: State) -> bytes:
    """The MINIMAL view: id and state, nothing else."""
    return b'{"id":%s,"state":"%s"}' % (json.dumps(task_id).encode(), state.value.encode())


def with_fragment(task_id: str, state: State, fragment: bytes, document: bytes) -> bytes:
    """The BASIC view from a task's id, state, stored fragment and document (see `dump_document`)."""
    fields = document[1:-1] + fragment if fragment.startswith(b",") else fragment
    return b'{"id":%s,"state":"%s",%s}' % (json.dumps(task_id).encode(), state.value.encode(), fields)


def dump_document(document: TaskDocument) -> bytes:
    """The document as JSON text, as it is stored and shown."""
    return document.model_dump_json(exclude_none=True).encode()


def basic_fragment(record: TaskRecord) -> bytes:
    """What of the BASIC view is stored beside the document."""
    behind = _behind_document(record, View.BASIC)
    if all(source.content is None for source in record.document.inputs or ()):
        return behind
    return record.document.model_dump_json(exclude_none=True, exclude=_BASIC_INPUTS)[1:-1].encode() + behind


def full(record: TaskRecord) -> bytes:
    """The FULL view."""
    document = dump_document(record.document)
    return with_fragment(record.id, record.state, _behind_document(record, View.FULL), document)


def render(record: TaskRecord, view: View) -> bytes:
    """`record` in `view`."""
    match view:
        case View.MINIMAL:
            return minimal(record.id, record.state)
        case View.BASIC:
            document = dump_document(record.document)
            return with_fragment(record.id, record.state, basic_fragment(record), document)
        case View.FULL:
            return full(record)


def _behind_document(record: TaskRecord, view: View) -> bytes:
    logs = _logs.dump_json(_task_logs(record, view), exclude_none=True)
    return b',"logs":%s,"creation_time":%s' % (logs, _time.dump_json(record.created))


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
