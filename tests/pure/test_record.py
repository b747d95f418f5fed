"""`apply`: whatever is told in whatever order and however often, a record stays legal and only goes forward."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesapi.tes import views
from tesapi.tes.events import (
    CancelRequested,
    Discarded,
    Event,
    ExecutorEnded,
    ExecutorStarted,
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
    RunnerEvent,
)
from tesapi.tes.models import View, parse_document
from tesapi.tes.record import (
    MAX_NOTES,
    Attempt,
    ExecutorRun,
    Note,
    Progress,
    StoredOutput,
    TaskRecord,
    Work,
    apply,
    apply_all,
    dump_progress,
    parse_progress,
)
from tesapi.tes.states import TRANSITIONS, State, is_settled

NOON = datetime(2026, 7, 1, 12, 0, 0, 0, UTC)
JOB = "job-1"


def at(minute: int) -> datetime:
    return NOON + timedelta(minutes=minute)


def new() -> TaskRecord:
    document = parse_document(b'{"executors": [{"image": "alpine", "command": ["true"]}]}')
    return TaskRecord(id="task-1", owner="ada", document=document, created=NOON)


def after(record: TaskRecord, *events: Event) -> TaskRecord:
    for event in events:
        record = apply(record, event)
    return record


def started(seq: int = 1, host: str = "node1") -> JobStarted:
    return JobStarted(seq=seq, at=at(seq), event="started", host=host)


def note(seq: int, text: str = "Pulling the image.") -> JobNoted:
    return JobNoted(seq=seq, at=at(seq), event="note", text=text)


def executor_started(seq: int, index: int = 0) -> ExecutorStarted:
    return ExecutorStarted(seq=seq, at=at(seq), event="executor_started", index=index, image_used="host")


def executor_ended(seq: int, index: int = 0, exit_code: int = 0) -> ExecutorEnded:
    return ExecutorEnded(
        seq=seq, at=at(seq), event="executor_ended", index=index, exit_code=exit_code, stdout="out", stderr="err"
    )


def output(seq: int) -> OutputStored:
    return OutputStored(seq=seq, at=at(seq), event="output", url=f"s3://b/{seq}", path=f"/out/{seq}", size_bytes=seq)


def end(seq: int, outcome: Outcome = Outcome.COMPLETE, reason: str | None = None) -> JobEnded:
    return JobEnded(seq=seq, at=at(seq), event="ended", outcome=outcome, reason=reason)


def reported(*lines: RunnerEvent, job_id: str = JOB) -> list[Event]:
    return [Reported(job_id, line) for line in lines]


PLACED = Placed(JOB, "local", NOON)
PREPARED = Prepared(JOB, {"directory": "/jobs/1"})
CANCEL = CancelRequested(at(30))


def placed(*lines: RunnerEvent) -> TaskRecord:
    """A task whose job may have been started, and what its runner has said so far."""
    return after(new(), PLACED, PREPARED, *reported(*lines))


def running() -> TaskRecord:
    return placed(started(), executor_started(2))


def attempt_of(record: TaskRecord) -> Attempt:
    assert record.attempt is not None
    return record.attempt


# What always holds.


def assert_legal(record: TaskRecord) -> None:
    """What is true of every record, whatever has happened."""
    state, attempts, attempt = record.state, record.progress.attempts, record.attempt
    assert state in TRANSITIONS
    assert (record.work is Work.QUEUED) == (state is State.QUEUED and not attempts)
    assert (record.work is Work.DONE) == (is_settled(state) and all(each.discarded for each in attempts))
    if state in {State.INITIALIZING, State.RUNNING, State.CANCELING}:
        assert attempt is not None
        assert attempt.ended is None, "a job that has ended has settled its task"
    if state is State.CANCELING:
        assert attempt is not None
        assert attempt.handle is not None, "nothing was started: there is nothing to wait for"
    if state in {State.COMPLETE, State.EXECUTOR_ERROR} or (state is State.SYSTEM_ERROR and attempts):
        assert attempt is not None
        assert attempt.ended is not None
    if not is_settled(state):
        assert all(each.ended is None for each in attempts[-1:])
    for notes in (record.progress.notes, *(each.notes for each in attempts)):
        assert len(notes) <= MAX_NOTES + 3  # that some were dropped, how the job ended, that it was canceled
        assert all(one.text != other.text for one, other in itertools.pairwise(notes))
    for each in attempts:
        assert len(each.executors) + len(each.outputs) <= each.seq
        assert all((run.exit_code is None) == (run.ended is None) for run in each.executors)
    assert parse_progress(dump_progress(record.progress)) == record.progress
    for view in View:
        assert json.loads(views.render(record, view))["state"] == state.value


def reachable(state: State) -> set[State]:
    found, more = {state}, [state]
    while more:
        fresh = TRANSITIONS[more.pop()] - found
        found |= fresh
        more += fresh
    return found


TEXTS = st.sampled_from(["Waiting: the destination is down.", "Waiting.", "", "no Unicode: \udcff"])
JOBS = st.sampled_from([JOB, "job-2", "nobody's"])
TIMES = st.integers(0, 59).map(at)
SEQS = st.integers(1, 8)
INDICES = st.integers(0, 2)
LINES: st.SearchStrategy[RunnerEvent] = st.one_of(
    st.builds(started, SEQS),
    st.builds(note, SEQS, st.sampled_from(["one", "two"])),
    st.builds(executor_started, SEQS, INDICES),
    st.builds(executor_ended, SEQS, INDICES, st.integers(0, 255)),
    st.builds(output, SEQS),
    st.builds(JobSeen, TIMES, st.just("It runs.")),
    st.builds(end, SEQS, st.sampled_from(Outcome), st.none() | st.just("The disk is full.")),
)
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(CancelRequested, TIMES),
    st.builds(Refused, TEXTS, TIMES),
    st.builds(Noted, TEXTS, TIMES),
    st.builds(Placed, JOBS, st.sampled_from(["local", "pulsar"]), TIMES),
    st.builds(Prepared, JOBS, st.sampled_from([{}, {"directory": "/jobs/1"}])),
    st.builds(Lost, JOBS, TEXTS, TIMES),
    st.builds(Discarded, JOBS),
    st.builds(Reported, JOBS, LINES),
    st.builds(Reported, JOBS, LINES),
)
SECOND_ATTEMPT = replace(
    placed(started()),
    progress=Progress(
        attempts=(replace(attempt_of(placed(started())), ended=at(1)), Attempt("job-2", "pulsar", at(2), {})),
    ),
)
RECORDS = st.sampled_from([new(), after(new(), PLACED), placed(), placed(started()), running(), SECOND_ATTEMPT])
HISTORIES = st.lists(EVENTS, max_size=30)


@given(RECORDS, HISTORIES)
def test_a_record_stays_legal_and_its_state_only_goes_forward(record: TaskRecord, events: list[Event]) -> None:
    for event in events:
        before, record = record, apply(record, event)
        assert_legal(record)
        assert record.state in reachable(before.state)
        if is_settled(before.state):
            assert record.state is before.state
        assert replace(record, state=before.state, progress=before.progress) == before, "nothing else ever changes"
        assert [attempt.job_id for attempt in before.progress.attempts] == [
            attempt.job_id for attempt in record.progress.attempts[: len(before.progress.attempts)]
        ]


@given(RECORDS, HISTORIES, EVENTS)
def test_an_event_that_is_told_twice_changes_nothing_the_second_time(
    record: TaskRecord, events: list[Event], event: Event
) -> None:
    once = after(record, *events, event)
    assert apply(once, event) is once


@given(RECORDS, HISTORIES)
def test_the_very_same_record_says_that_nothing_changed(record: TaskRecord, events: list[Event]) -> None:
    for event in events:
        before, record = record, apply(record, event)
        assert (record is before) == (record == before)


@given(HISTORIES)
def test_what_a_superseded_attempt_says_changes_only_its_own_entry(events: list[Event]) -> None:
    late: list[Event] = [event for event in events if isinstance(event, Prepared | Reported | Lost | Discarded)]
    own = [replace(event, job_id=JOB) for event in late if not isinstance(event, CancelRequested | Refused | Noted)]
    record = after(SECOND_ATTEMPT, *own)
    assert record.state is SECOND_ATTEMPT.state
    assert record.progress.attempts[1:] == SECOND_ATTEMPT.progress.attempts[1:]


# Reports that come in pieces, again and again.


@st.composite
def reports(draw: st.DrawFn) -> list[RunnerEvent]:
    """A whole report, as a runner writes it."""
    lines: list[RunnerEvent] = [started()]

    def some_notes() -> None:
        for text in draw(st.lists(st.sampled_from(["one", "two", "three"]), max_size=2)):
            lines.append(note(len(lines) + 1, text))

    for index in range(draw(st.integers(0, 3))):
        some_notes()
        lines.append(executor_started(len(lines) + 1, index))
        some_notes()
        lines.append(executor_ended(len(lines) + 1, index, draw(st.integers(0, 1))))
    for _ in range(draw(st.integers(0, 2))):
        lines.append(output(len(lines) + 1))
    some_notes()
    lines.append(end(len(lines) + 1, draw(st.sampled_from(Outcome)), draw(st.none() | st.just("Because."))))
    return lines


@given(reports(), st.data())
def test_a_report_converges_however_it_was_cut_repeated_and_mixed_up(
    report: list[RunnerEvent], data: st.DataObject
) -> None:
    whole = placed(*report)
    pieces = data.draw(st.lists(st.lists(st.sampled_from(report), max_size=6), max_size=4))
    prefixes = data.draw(st.lists(st.integers(0, len(report)).map(lambda cut: report[:cut]), max_size=4))
    deliveries = data.draw(st.permutations([*pieces, *prefixes]))
    told = after(placed(), *(event for lines in [*deliveries, report] for event in reported(*lines)))
    assert told == whole


@given(reports(), st.data())
def test_cancel_changes_only_how_a_report_ends(report: list[RunnerEvent], data: st.DataObject) -> None:
    asked = data.draw(st.integers(0, len(report)))
    events = reported(*report)
    whole, told = placed(*report), after(placed(), *events[:asked], CANCEL, *events, CANCEL, *events)
    assert told.state is (State.CANCELED if asked < len(report) else whole.state)
    assert replace(attempt_of(told), notes=()) == replace(attempt_of(whole), notes=())
    assert [text for text in texts(told) if not text.startswith("Canceled by its user")] == [
        text for text in texts(whole) if not text.startswith(("Canceled by its user", "The job was stopped"))
    ] or told == whole


def texts(record: TaskRecord) -> list[str]:
    attempts = record.progress.attempts
    return [each.text for notes in (record.progress.notes, *(each.notes for each in attempts)) for each in notes]


# Each step of a life.


def test_a_task_goes_from_queued_to_complete() -> None:
    record = new()
    assert (record.state, record.work) == (State.QUEUED, Work.QUEUED)
    steps: Sequence[tuple[Event, State, Work]] = [
        (PLACED, State.QUEUED, Work.PLACED),
        (PREPARED, State.QUEUED, Work.PLACED),
        *zip(
            reported(started(), executor_started(2), executor_ended(3), output(4), end(5)),
            [State.INITIALIZING, State.RUNNING, State.RUNNING, State.RUNNING, State.COMPLETE],
            [Work.PLACED] * 5,
            strict=True,
        ),
        (Discarded(JOB), State.COMPLETE, Work.DONE),
    ]
    for event, state, work in steps:
        record = apply(record, event)
        assert (record.state, record.work) == (state, work)
    assert record.progress == Progress(
        attempts=(
            Attempt(
                job_id=JOB,
                destination="local",
                placed=NOON,
                handle={"directory": "/jobs/1"},
                seq=5,
                host="node1",
                started=at(1),
                ended=at(5),
                executors=(ExecutorRun(at(2), at(3), 0, "out", "err", "host"),),
                outputs=(StoredOutput("s3://b/4", "/out/4", 4),),
                discarded=True,
            ),
        ),
    )


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        (Outcome.COMPLETE, State.COMPLETE),
        (Outcome.EXECUTOR_ERROR, State.EXECUTOR_ERROR),
        (Outcome.SYSTEM_ERROR, State.SYSTEM_ERROR),
        (Outcome.CANCELED, State.SYSTEM_ERROR),  # nobody had asked for it
    ],
)
@pytest.mark.parametrize("lines", [[], [started()], [started(), executor_started(2)]])
def test_a_job_that_ends_settles_its_task(outcome: Outcome, state: State, lines: list[RunnerEvent]) -> None:
    record = after(placed(*lines), *reported(end(len(lines) + 1, outcome, "Because.")))
    assert record.state is state
    assert texts(record)[0] == "Because."
    assert (outcome is Outcome.CANCELED) == ("nobody had asked this server to cancel it" in texts(record)[-1])


def test_a_task_that_no_destination_takes_is_a_system_error_and_done() -> None:
    record = apply(new(), Refused("No destination has 500 cores.", NOON))
    assert (record.state, record.work, texts(record)) == (
        State.SYSTEM_ERROR,
        Work.DONE,
        ["No destination has 500 cores."],
    )


def test_a_task_that_was_placed_is_not_refused_any_more() -> None:
    record = after(new(), PLACED)
    assert apply(record, Refused("No destination has 500 cores.", NOON)) is record


@pytest.mark.parametrize("record", [placed(), placed(started()), running(), apply(running(), CANCEL)])
def test_a_job_that_is_lost_is_a_system_error(record: TaskRecord) -> None:
    lost = apply(record, Lost(JOB, "Its directory is gone.", at(9)))
    assert (lost.state, lost.work, attempt_of(lost).ended) == (State.SYSTEM_ERROR, Work.PLACED, at(9))
    assert texts(lost)[-1] == "Its directory is gone."


@pytest.mark.parametrize("record", [new(), after(new(), PLACED)])
def test_cancel_before_anything_can_have_been_started_settles_at_once(record: TaskRecord) -> None:
    canceled = apply(record, CANCEL)
    assert (canceled.state, texts(canceled)) == (
        State.CANCELED,
        ["Canceled by its user before anything was started."],
    )
    assert canceled.work is (Work.PLACED if canceled.attempt else Work.DONE)


def test_a_job_whose_place_is_made_while_its_task_is_canceled_is_only_discarded() -> None:
    record = after(new(), PLACED, CANCEL, PREPARED)
    assert (record.state, record.work, attempt_of(record).handle) == (
        State.CANCELED,
        Work.PLACED,
        {"directory": "/jobs/1"},
    )
    assert apply(record, Discarded(JOB)).work is Work.DONE


def test_a_canceled_task_is_not_placed() -> None:
    record = apply(new(), CANCEL)
    assert apply(record, PLACED) is record


@pytest.mark.parametrize("record", [placed(), placed(started()), running()])
def test_cancel_of_what_may_run_waits_for_the_word_that_nothing_runs(record: TaskRecord) -> None:
    canceling = apply(record, CANCEL)
    assert (canceling.state, canceling.work) == (State.CANCELING, Work.PLACED)
    going_on = after(canceling, *reported(started(), executor_started(2), executor_ended(3)))
    assert going_on.state is State.CANCELING
    canceled = after(going_on, *reported(end(4, Outcome.CANCELED)))
    assert (canceled.state, texts(canceled)) == (
        State.CANCELED,
        ["Canceled by its user; nothing of it runs any more."],
    )


@pytest.mark.parametrize("outcome", [Outcome.COMPLETE, Outcome.EXECUTOR_ERROR, Outcome.SYSTEM_ERROR])
def test_a_task_is_canceled_also_where_its_job_had_just_ended_and_says_so(outcome: Outcome) -> None:
    record = after(running(), CANCEL, *reported(end(3, outcome)))
    words = outcome.value.replace("_", " ")
    assert record.state is State.CANCELED
    assert texts(record) == [f"Canceled by its user; the job had already come to its own end ({words})."]


@pytest.mark.parametrize(
    "record", [placed(started(), end(2)), apply(new(), CANCEL), apply(new(), Refused("No.", NOON))]
)
def test_a_settled_task_is_not_canceled(record: TaskRecord) -> None:
    assert apply(record, CANCEL) is record


def test_a_line_behind_a_gap_waits_until_the_missing_ones_are_told() -> None:
    record = placed(started())
    assert after(record, *reported(executor_ended(3), end(4))) is record
    assert after(record, *reported(executor_started(2), executor_ended(3), end(4))).state is State.COMPLETE


def test_what_is_said_of_another_job_changes_nothing() -> None:
    record = running()
    events: list[Event] = [
        *reported(end(3), job_id="job-2"),
        Lost("job-2", "Gone.", NOON),
        Discarded("job-2"),
        Prepared("job-2", {}),
        Placed("job-2", "pulsar", NOON),
    ]
    for event in events:
        assert apply(record, event) is record


def test_a_place_is_kept_as_it_was_first_told() -> None:
    record = placed()
    assert apply(record, Prepared(JOB, {"directory": "/jobs/elsewhere"})) is record


def test_an_executor_that_runs_has_no_exit_code_yet() -> None:
    (run,) = attempt_of(running()).executors
    assert run == ExecutorRun(started=at(2), image_used="host")


# Notes.


def test_a_note_that_repeats_the_last_one_is_dropped() -> None:
    record = after(new(), Noted("one", at(1)), Noted("one", at(2)), Noted("two", at(3)), Noted("one", at(4)))
    assert record.progress.notes == (Note(at(1), "one"), Note(at(3), "two"), Note(at(4), "one"))


def test_notes_are_kept_up_to_a_number_and_the_last_one_says_so() -> None:
    record = after(new(), *(Noted(f"{number}", NOON) for number in range(MAX_NOTES + 50)))
    assert texts(record) == [*(f"{number}" for number in range(MAX_NOTES)), "Further notes were dropped."]
    record = placed(started(), *(note(number + 2, f"{number}") for number in range(MAX_NOTES + 50)))
    assert texts(record) == [*(f"{number}" for number in range(MAX_NOTES)), "Further notes were dropped."]
    ended = after(record, *reported(end(attempt_of(record).seq + 1, Outcome.SYSTEM_ERROR, "The disk is full.")))
    assert ended.state is State.SYSTEM_ERROR
    assert texts(ended)[-1] == "The disk is full."


def test_a_note_in_no_unicode_can_be_stored() -> None:
    record = apply(new(), Noted("cannot open b\udcff", NOON))
    assert texts(record) == ["cannot open b?"]


def test_progress_comes_back_from_its_text_as_it_was() -> None:
    record = placed(started(), note(2, "ü 😀\0"), executor_started(3), executor_ended(4), output(5), end(6))
    record = after(record, Noted("one", at(1).astimezone()), Discarded(JOB))
    assert parse_progress(dump_progress(record.progress)) == record.progress
    assert parse_progress(dump_progress(Progress())) == Progress()


def test_the_end_of_a_report_that_lost_lines_counts() -> None:
    record = apply(apply(new(), Placed(JOB, "local", at(1))), Prepared(JOB, {"directory": "/j"}))
    record = apply(record, Reported(JOB, JobStarted(seq=1, at=at(2), event="started", host="h")))
    record = apply(record, Reported(JOB, ExecutorStarted(seq=2, at=at(2), event="executor_started", index=0)))
    end = JobEnded(seq=2, at=at(3), event="ended", outcome=Outcome.SYSTEM_ERROR, reason="The machine went down.")
    record = apply(record, Reported(JOB, end))
    assert record.state is State.SYSTEM_ERROR
    assert [note.text for note in record.progress.attempts[0].notes] == ["The machine went down."]


@given(
    numbers=st.lists(st.integers(1, 12), max_size=12),
    outputs=st.lists(st.booleans(), min_size=12, max_size=12),
    jobs=st.lists(st.sampled_from([JOB, JOB, JOB, "job-2"]), min_size=12, max_size=12),
)
def test_all_events_at_once_come_to_the_same_as_one_after_the_other(
    numbers: list[int], outputs: list[bool], jobs: list[str]
) -> None:
    record = apply(apply(new(), Placed(JOB, "local", at(1))), Prepared(JOB, {"directory": "/j"}))
    events = [
        Reported(
            job,
            OutputStored(seq=number, at=at(2), event="output", url=f"file:///{number}", path="/o", size_bytes=number)
            if is_output
            else JobNoted(seq=number, at=at(2), event="note", text=str(number)),
        )
        for number, is_output, job in zip(sorted(numbers), outputs, jobs, strict=False)
    ]
    one_by_one = record
    for event in events:
        one_by_one = apply(one_by_one, event)
    assert apply_all(record, events) == one_by_one


def test_a_job_that_is_seen_to_run_makes_its_task_run_before_its_runner_says_anything() -> None:
    seen = Reported(JOB, JobSeen(at(1), "It runs."))
    record = after(placed(), seen)
    assert record.state is State.RUNNING
    assert attempt_of(record).started == at(1)
    assert "It runs." in texts(record)
    assert apply(record, seen) is record
    record = after(record, *reported(started(1), executor_started(2), executor_ended(3), end(4)))
    assert record.state is State.COMPLETE
    assert attempt_of(record).host == "node1"
    assert apply(record, seen) is record


def test_a_canceled_task_stays_canceling_when_its_job_is_seen_to_run() -> None:
    record = after(placed(), CancelRequested(at(1)), Reported(JOB, JobSeen(at(2), "It runs.")))
    assert record.state is State.CANCELING
