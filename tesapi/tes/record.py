"""The record of a task, and `apply`: the one place where anything about its state is decided.

A record is a value. `apply(record, event)` gives the next one, or the very same object where the event changes
nothing: repeated, late, or about an attempt that is over. So whoever holds an event may apply it as often as they
like; the store's compare-and-swap on `revision` does the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import assert_never

from pydantic import TypeAdapter

from tesapi.tes.events import (
    CancelRequested,
    Discarded,
    Event,
    ExecutorEnded,
    ExecutorStarted,
    Handle,
    JobEnded,
    JobNoted,
    JobSeen,
    JobStarted,
    Lost,
    Noted,
    Outcome,
    OutputStored,
    Placed,
    Prepared,
    Refused,
    Reported,
    RunnerLine,
    Withdrawn,
)
from tesapi.tes.models import TaskDocument
from tesapi.tes.states import State, advance, is_settled

MAX_NOTES = 200
"""How many notes a record keeps; later ones are dropped after one that says so, but for those on how a job ended."""


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence for `system_logs`."""

    at: datetime
    text: str


@dataclass(frozen=True, slots=True)
class ExecutorRun:
    """One executor of one attempt; `exit_code` is None until it has ended."""

    started: datetime | None = None
    ended: datetime | None = None
    exit_code: int | None = None
    stdout: str = ""
    stderr: str = ""
    image_used: str | None = None


@dataclass(frozen=True, slots=True)
class StoredOutput:
    """One file that the attempt has stored."""

    url: str
    path: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Attempt:
    """One job of the task. `handle` is None until its place exists; with it, the job may have been started.

    One that was `withdrawn` never was started, and the task is to be placed anew.
    """

    job_id: str
    destination: str
    placed: datetime
    handle: Handle | None = None
    seq: int = 0
    host: str | None = None
    started: datetime | None = None
    ended: datetime | None = None
    executors: tuple[ExecutorRun, ...] = ()
    outputs: tuple[StoredOutput, ...] = ()
    notes: tuple[Note, ...] = ()
    discarded: bool = False
    withdrawn: bool = False


class Work(StrEnum):
    """What there is to do about a task: place it, see its job to the end, or nothing."""

    QUEUED = "queued"
    PLACED = "placed"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Progress:
    """What changes about a task: its attempts, and the notes that belong to none."""

    attempts: tuple[Attempt, ...] = ()
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """Everything known of one task. `revision` grows by one with each stored change."""

    id: str
    owner: str
    document: TaskDocument
    created: datetime
    state: State = State.QUEUED
    revision: int = 0
    progress: Progress = Progress()

    @property
    def attempt(self) -> Attempt | None:
        """The attempt that counts: the last one."""
        return self.progress.attempts[-1] if self.progress.attempts else None

    @property
    def work(self) -> Work:
        """What there is left to do."""
        attempts = self.progress.attempts
        if not is_settled(self.state):
            return Work.QUEUED if not attempts or attempts[-1].withdrawn else Work.PLACED
        return Work.DONE if all(attempt.discarded for attempt in attempts) else Work.PLACED


_progress: TypeAdapter[Progress] = TypeAdapter(Progress)


def dump_progress(progress: Progress) -> bytes:
    """`progress` as JSON text, for a store."""
    return _progress.dump_json(progress)


def parse_progress(text: bytes) -> Progress:
    """The opposite of `dump_progress`."""
    return _progress.validate_json(text)


def apply(record: TaskRecord, event: Event) -> TaskRecord:
    """The record after `event`; the same object where it changes nothing."""
    match event:
        case CancelRequested():
            return _cancel(record, event)
        case Refused(reason=reason, at=at):
            if record.progress.attempts:
                return record
            return _settle_unplaced(record, State.SYSTEM_ERROR, Note(at, reason))
        case Noted(text=text, at=at):
            progress = _with_note(record.progress, Note(at, text))
            return record if progress is record.progress else replace(record, progress=progress)
        case Placed():
            return _place(record, event)
        case Prepared() | Withdrawn() | Reported() | Lost() | Discarded():
            return _about_attempt(record, event)
        case _:
            assert_never(event)


def apply_all(record: TaskRecord, events: Sequence[Event]) -> TaskRecord:
    """The record after all `events`, in their order. A run of outputs is taken at once: there may be very many."""
    position = 0
    while position < len(events):
        run = _outputs_from(events, position)
        if len(run) > 1:
            record = _store_outputs(record, run)
            position += len(run)
        else:
            record = apply(record, events[position])
            position += 1
    return record


def _outputs_from(events: Sequence[Event], position: int) -> list[tuple[str, OutputStored]]:
    run: list[tuple[str, OutputStored]] = []
    for event in itertools.islice(events, position, None):
        if not isinstance(event, Reported) or not isinstance(event.line, OutputStored):
            break
        if run and event.job_id != run[0][0]:
            break
        run.append((event.job_id, event.line))
    return run


def _store_outputs(record: TaskRecord, run: Sequence[tuple[str, OutputStored]]) -> TaskRecord:
    attempts = record.progress.attempts
    index = next((i for i, attempt in enumerate(attempts) if attempt.job_id == run[0][0]), None)
    if index is None or attempts[index].ended is not None:
        return record
    seq, outputs = attempts[index].seq, list(attempts[index].outputs)
    for _, line in run:
        if line.seq == seq + 1:  # as for every line, see `_advance_attempt`
            seq = line.seq
            outputs.append(StoredOutput(line.url, line.path, line.size_bytes))
    if seq == attempts[index].seq:
        return record
    after = replace(attempts[index], seq=seq, outputs=tuple(outputs))
    changed = (*attempts[:index], after, *attempts[index + 1 :])
    return replace(record, progress=replace(record.progress, attempts=changed))


def _cancel(record: TaskRecord, event: CancelRequested) -> TaskRecord:
    if is_settled(record.state) or record.state is State.CANCELING:
        return record
    if record.attempt is None or record.attempt.handle is None:  # withdrawn ones never have one
        note = Note(event.at, "Canceled by its user before anything was started.")
        return _settle_unplaced(record, State.CANCELED, note)
    return replace(record, state=advance(record.state, State.CANCELING))


def _settle_unplaced(record: TaskRecord, state: State, note: Note) -> TaskRecord:
    settled = advance(record.state, state)
    if settled is record.state:
        return record
    return replace(record, state=settled, progress=_with_note(record.progress, note))


def _with_note(progress: Progress, note: Note) -> Progress:
    notes = _appended(progress.notes, note)
    return progress if notes is progress.notes else replace(progress, notes=notes)


def _appended(notes: tuple[Note, ...], note: Note) -> tuple[Note, ...]:
    note = _storable(note)
    if len(notes) > MAX_NOTES or (notes and notes[-1].text == note.text):
        return notes
    if len(notes) == MAX_NOTES:
        note = Note(note.at, "Further notes were dropped.")
    return (*notes, note)


def _with_last_word(notes: tuple[Note, ...], note: Note) -> tuple[Note, ...]:
    """How the job ended is told however much was noted before."""
    note = _storable(note)
    return notes if notes and notes[-1].text == note.text else (*notes, note)


def _storable(note: Note) -> Note:
    # Errors of the operating system quote names of files as they are, and what is no Unicode cannot be stored.
    return Note(note.at, note.text.encode("utf-8", "replace").decode())


def _place(record: TaskRecord, event: Placed) -> TaskRecord:
    attempts = record.progress.attempts
    if record.state is not State.QUEUED or record.work is not Work.QUEUED:
        return record
    if any(attempt.job_id == event.job_id for attempt in attempts):
        return record
    attempt = Attempt(job_id=event.job_id, destination=event.destination, placed=event.at)
    return replace(record, progress=replace(record.progress, attempts=(*attempts, attempt)))


_OfAttempt = Prepared | Withdrawn | Reported | Lost | Discarded


def _about_attempt(record: TaskRecord, event: _OfAttempt) -> TaskRecord:
    attempts = record.progress.attempts
    index = next((i for i, attempt in enumerate(attempts) if attempt.job_id == event.job_id), None)
    if index is None:
        return record
    before = attempts[index]
    after = _advance_attempt(before, event)
    if after is before:
        return record
    state = record.state
    if index == len(attempts) - 1:  # what a superseded attempt says changes only its own entry
        state = _state_after(record.state, event)
        if isinstance(event, Reported) and isinstance(event.line, JobEnded):
            after = _with_word_on_cancel(after, record.state, event.line)
    changed = (*attempts[:index], after, *attempts[index + 1 :])
    return replace(record, state=state, progress=replace(record.progress, attempts=changed))


def _with_word_on_cancel(attempt: Attempt, state: State, end: JobEnded) -> Attempt:
    if state is State.CANCELING and end.outcome is Outcome.CANCELED:
        text = "Canceled by its user; nothing of it runs any more."
    elif state is State.CANCELING:
        outcome = end.outcome.value.replace("_", " ")
        text = f"Canceled by its user; the job had already come to its own end ({outcome})."
    elif end.outcome is Outcome.CANCELED:
        text = "The job was stopped from outside; nobody had asked this server to cancel it."
    else:
        return attempt
    return replace(attempt, notes=_with_last_word(attempt.notes, Note(end.at, text)))


def _advance_attempt(attempt: Attempt, event: _OfAttempt) -> Attempt:
    match event:
        case Prepared(handle=handle):
            if attempt.handle is not None or attempt.withdrawn:
                return attempt
            return replace(attempt, handle=dict(handle))
        case Withdrawn(reason=reason, at=at):
            if attempt.handle is not None or attempt.withdrawn or attempt.ended is not None:
                return attempt
            notes = _with_last_word(attempt.notes, Note(at, reason))
            return replace(attempt, ended=at, notes=notes, withdrawn=True)
        case Discarded():
            return attempt if attempt.discarded else replace(attempt, discarded=True)
        case Lost(reason=reason, at=at):
            if attempt.ended is not None:
                return attempt
            return replace(attempt, ended=at, notes=_with_last_word(attempt.notes, Note(at, reason)))
        case Reported(line=line):
            if isinstance(line, JobSeen):
                return _seen(attempt, line)
            # Lines come in order and from the first one, as often as somebody asks: a gap means that the missing
            # ones will be told again, and this one with them. An end with a number that was there already is of a
            # report that lost lines with its machine's power, and was numbered on from what was left.
            is_next = line.seq == attempt.seq + 1 or (line.seq <= attempt.seq and isinstance(line, JobEnded))
            if attempt.ended is not None or not is_next:
                return attempt
            return replace(_with_line(attempt, line), seq=line.seq)
        case _:
            assert_never(event)


def _seen(attempt: Attempt, event: JobSeen) -> Attempt:
    if attempt.ended is not None or attempt.started is not None:
        return attempt
    return replace(attempt, started=event.at, notes=_appended(attempt.notes, Note(event.at, event.text)))


def _with_line(attempt: Attempt, line: RunnerLine) -> Attempt:
    match line:
        case JobStarted(host=host, at=at):
            return replace(attempt, host=host, started=at)
        case JobNoted(text=text, at=at):
            return replace(attempt, notes=_appended(attempt.notes, Note(at, text)))
        case ExecutorStarted(index=index, at=at, image_used=image_used):
            if index != len(attempt.executors):
                return attempt
            return replace(attempt, executors=(*attempt.executors, ExecutorRun(started=at, image_used=image_used)))
        case ExecutorEnded(index=index, at=at, exit_code=code, stdout=stdout, stderr=stderr):
            if index >= len(attempt.executors):
                return attempt
            run = replace(attempt.executors[index], ended=at, exit_code=code, stdout=stdout, stderr=stderr)
            return replace(attempt, executors=(*attempt.executors[:index], run, *attempt.executors[index + 1 :]))
        case OutputStored(url=url, path=path, size_bytes=size_bytes):
            return replace(attempt, outputs=(*attempt.outputs, StoredOutput(url, path, size_bytes)))
        case JobEnded(at=at, reason=reason):
            notes = attempt.notes if reason is None else _with_last_word(attempt.notes, Note(at, reason))
            return replace(attempt, ended=at, notes=notes)
        case _:
            assert_never(line)


_STATE_AFTER_OUTCOME = {
    Outcome.COMPLETE: State.COMPLETE,
    Outcome.EXECUTOR_ERROR: State.EXECUTOR_ERROR,
    Outcome.SYSTEM_ERROR: State.SYSTEM_ERROR,
    Outcome.CANCELED: State.SYSTEM_ERROR,  # unless it was asked for
}


def _state_after(state: State, event: _OfAttempt) -> State:
    match event:
        case Lost():
            return advance(state, State.SYSTEM_ERROR)
        case Reported(line=JobStarted()):
            return advance(state, State.INITIALIZING)
        case Reported(line=ExecutorStarted() | JobSeen()):
            return advance(advance(state, State.INITIALIZING), State.RUNNING)
        case Reported(line=JobEnded(outcome=outcome)):
            return advance(state, State.CANCELED if state is State.CANCELING else _STATE_AFTER_OUTCOME[outcome])
        case Prepared() | Withdrawn() | Discarded() | Reported():
            return state
        case _:
            assert_never(event)
