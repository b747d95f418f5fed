"""What can happen to a task: words of its user, of the dispatcher, and of the runner (whose lines are parsed here)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter

Handle = Mapping[str, str]
"""How a backend finds its job again: what it needs of addresses, as text, without secrets."""


class Outcome(StrEnum):
    """How a job ended, in the words of whoever saw that nothing of it runs any more."""

    COMPLETE = "complete"
    EXECUTOR_ERROR = "executor_error"
    SYSTEM_ERROR = "system_error"
    CANCELED = "canceled"


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """The user wants the task to end."""

    at: datetime


@dataclass(frozen=True, slots=True)
class Refused:
    """No destination can or may run the task; `reason` says why in a sentence."""

    reason: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Noted:
    """Something that its user should know, such as what the task waits for. A repetition of the last one is dropped."""

    text: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Placed:
    """The intent to run the task as job `job_id` at `destination`, recorded before anything is asked of it."""

    job_id: str
    destination: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Prepared:
    """The job's place exists; from here on the job may have been started."""

    job_id: str
    handle: Handle


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The job is taken back: its destination could not be asked to make a place, so that nothing was started."""

    job_id: str
    reason: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Lost:
    """The job is gone and its own word on how it ended will not come."""

    job_id: str
    reason: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Discarded:
    """Nothing of the job is left at its destination."""

    job_id: str


class _Line(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    seq: Annotated[int, Field(ge=1)]
    at: AwareDatetime


class JobStarted(_Line):
    """The runner has begun on `host`."""

    event: Literal["started"]
    host: str


class JobNoted(_Line):
    """A sentence for `system_logs`."""

    event: Literal["note"]
    text: str


class ExecutorStarted(_Line):
    """Executor `index` has been started; `image_used` says what stands for its image there."""

    event: Literal["executor_started"]
    index: Annotated[int, Field(ge=0)]
    image_used: str | None = None


class ExecutorEnded(_Line):
    """Executor `index` has ended; the ends of its streams."""

    event: Literal["executor_ended"]
    index: Annotated[int, Field(ge=0)]
    exit_code: int
    stdout: str = ""
    stderr: str = ""


class OutputStored(_Line):
    """One output file is in storage."""

    event: Literal["output"]
    url: str
    path: str
    size_bytes: Annotated[int, Field(ge=0)]


class JobEnded(_Line):
    """The last line: nothing of the job runs any more."""

    event: Literal["ended"]
    outcome: Outcome
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class JobSeen:
    """The destination says that the job runs, whose runner tells nothing before its end. Not a line of the report."""

    at: datetime
    text: str
    event: Literal["seen"] = "seen"


RunnerLine = JobStarted | JobNoted | ExecutorStarted | ExecutorEnded | OutputStored | JobEnded
RunnerEvent = RunnerLine | JobSeen

_lines: TypeAdapter[RunnerLine] = TypeAdapter(
    Annotated[
        JobStarted | JobNoted | ExecutorStarted | ExecutorEnded | OutputStored | JobEnded,
        Field(discriminator="event"),
    ]
)


def parse_line(line: bytes) -> RunnerLine:
    """One line of a report. Raises ValueError where it is none."""
    return _lines.validate_json(line)


@dataclass(frozen=True, slots=True)
class Reported:
    """The runner of job `job_id` said `line`, or was seen to run. Repetitions are skipped by `line.seq`."""

    job_id: str
    line: RunnerEvent


Event = CancelRequested | Refused | Noted | Placed | Prepared | Withdrawn | Reported | Lost | Discarded
