"""What jobs at a Pulsar have in common, however one gets there: their options, and how their words are read."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tesapi.backends.pulsar_wire import JobStatus, parse_status
from tesapi.runner.probe import ENGINES
from tesapi.tes.events import JobEnded, JobNoted, Outcome, RunnerLine, parse_line

JOB_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}")
"""Ids that are folders, and nothing else, wherever they are used."""

_CUT = ".."  # what Pulsar puts, on a line of its own, where it cut the middle out of a stream


@dataclass(frozen=True, slots=True)
class PulsarOptions:
    """What the operator says of a Pulsar, besides where it is. `python` runs the runner there.

    A job is asked for at least every `poll_interval_s`, but for crowds of them; with `max_polls`, it is stopped after
    so many times that long. A job whose folder is not there is given up after `gone_s`: a file system may come back.
    In the folder `notes` helper jobs are noted while they are there (see HelperNotes), and what the last probe found.
    """

    python: str = "python3"
    poll_interval_s: float = 5.0
    max_polls: int | None = None
    runtime: Mapping[str, object] = field(default_factory=dict)
    gone_s: float = 60.0
    notes: Path | None = None

    @property
    def longest_s(self) -> float | None:
        """How long a job may take."""
        return None if self.max_polls is None else self.max_polls * self.poll_interval_s

    @property
    def limit_sentence(self) -> str:
        """Why a job was stopped that took longer."""
        return (
            f"The job was stopped because it took longer than max_polls ({self.max_polls}) times "
            f"poll_interval ({self.poll_interval_s:g} s) of pulsar.status."
        )


class ProbeNote:
    """What the last probe of a destination answered, for the time until the next one has.

    In a batch system that one waits like any other job, and what was started before is to be followed and canceled.
    `about` tells what was probed: another runner, address or setting may find something else.
    """

    def __init__(self, folder: Path | None, about: Sequence[object]) -> None:
        self._path = None if folder is None else folder / PROBE_NOTE
        self._about = json.loads(json.dumps(about))

    def read(self) -> Mapping[str, object] | None:
        """The answer, where there was one about the same."""
        if self._path is None:
            return None
        try:
            note = json.loads(self._path.read_text("utf-8"))
            return dict(note["answer"]) if note["about"] == self._about else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, answer: Mapping[str, object]) -> None:
        """Keep an answer. Where it cannot be written, the next start waits for its probe."""
        if self._path is None:
            return
        new = self._path.with_name(f"{PROBE_NOTE}.{uuid.uuid4()}")
        with contextlib.suppress(OSError):
            new.write_text(json.dumps({"about": self._about, "answer": dict(answer)}), "utf-8")
            new.replace(self._path)


PROBE_NOTE = ".probe.json"
"""The file in the folder of notes, beside those of HelperNotes, which bear the ids of jobs and begin with no dot."""


def probe_level(answer: Mapping[str, object]) -> int:
    """How loud to log what a probe has answered: whether the operator should do something, or know of it."""
    found = answer.get("found")
    if not isinstance(found, Mapping):
        return logging.WARNING
    return logging.WARNING if answer.get("batch") and found.get("kind") in ENGINES else logging.INFO


def read_report(stdout: str) -> list[RunnerLine]:
    """The events that a runner printed, from the first one on, as far as they can be read.

    Where Pulsar cut the middle out of a long report, a note stands for what is missing, and the numbers go on.
    """
    lines = stdout.split("\n")
    events: list[RunnerLine] = []
    position = 0
    for position, line in enumerate(lines):  # noqa: B007 - where it stopped is looked at below
        event = _event(line)
        if event is None or event.seq != len(events) + 1:
            break
        events.append(event)
    if events and isinstance(events[-1], JobEnded):
        return events
    rest = lines[position:]
    if _CUT not in rest[:2]:
        return events
    return events + _behind_the_cut(rest[rest.index(_CUT) + 1 :], len(events))


def _behind_the_cut(lines: list[str], before: int) -> list[RunnerLine]:
    read = [event for event in map(_event, lines) if event is not None]
    if not read:
        return []
    missing = read[0].seq - before - 1
    note = JobNoted(
        seq=before + 1,
        at=read[0].at,
        event="note",
        text=f"{missing} entries of the job's report are missing here, on executors or stored outputs: Pulsar cut its "
        "middle out, for it was longer than Pulsar's maximum_stream_size.",
    )
    return [note, *(event.model_copy(update={"seq": before + 2 + i}) for i, event in enumerate(read))]


def _event(line: str) -> RunnerLine | None:
    try:
        return parse_line(line.encode("utf-8", "replace"))
    except ValueError:
        return None


def read_update(answer: Mapping[str, Any]) -> tuple[str, JobStatus]:
    """The job that an update is on, and what it says. Raises ValueError where it is no update of Pulsar's."""
    job_id, folder = answer.get("job_id"), answer.get("job_directory")
    if not isinstance(job_id, str) or not JOB_ID.fullmatch(job_id):
        raise ValueError("it names no job")
    if folder is not None and (not isinstance(folder, str) or folder.rstrip("/").rpartition("/")[2] != job_id):
        raise ValueError("it tells of the folder of another job")
    return job_id, parse_status(answer)


def ended(seq: int, outcome: Outcome, reason: str | None) -> JobEnded:
    """The end of a job whose runner does not tell it."""
    return JobEnded(seq=seq, at=datetime.now(UTC), event="ended", outcome=outcome, reason=reason)


def why_not_run(name: str, status: JobStatus) -> str:
    """A sentence on a job of which Pulsar says that it is over, and whose runner has said nothing."""
    said = (status.stderr.strip().splitlines() or [""])[-1][:500].rstrip(".")
    code = "" if status.returncode is None else f" with exit code {status.returncode}"
    because = f": {said}" if said else ""
    if status.status == "failed":
        return f"{name} could not start the job's runner{code}{because}; Pulsar's own log says more."
    return f"The job's runner could not begin at {name}: it ended{code}{because}."
