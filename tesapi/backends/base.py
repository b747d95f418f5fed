"""What a place where jobs run promises. Its docstrings are what `tests/contract/test_backend.py` tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Protocol, Self

from tesapi.jobs.plan import Job
from tesapi.tes.events import Handle, RunnerEvent


@dataclass(frozen=True, slots=True)
class LogTails:
    """The ends of the streams of executor `index`, which runs."""

    index: int
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True)
class Capacity:
    """How many jobs a destination takes at once, and the most that one of them may ask for; None is no limit.

    `ram_gb` and `disk_gb` in 10^9 bytes.
    """

    max_jobs: int
    cpu_cores: int | None = None
    ram_gb: float | None = None
    disk_gb: float | None = None


@dataclass(frozen=True, slots=True)
class Need:
    """What one job takes up; `ram_gb` and `disk_gb` in 10^9 bytes."""

    cpu_cores: int
    ram_gb: float
    disk_gb: float = 0.0


@dataclass(frozen=True, slots=True)
class Condition:
    """Whether a destination can take jobs, and a sentence about that for its operator.

    `state` is one of starting, up, down, misconfigured, and `since` when it became so. `running` jobs are followed
    here; `waiting` ones have been given to the destination and wait for room.
    """

    ok: bool
    sentence: str
    state: str
    since: datetime
    running: int
    waiting: int


class Backend(Protocol):
    """Runs jobs at one destination; knows jobs, not tasks. An async context manager; leaving it ends no job.

    Entering it needs nothing of the destination, which may be down for now.

    Every method but `condition` raises BackendUnavailable where the destination cannot be reached: ask again later.
    """

    @property
    def capacity(self) -> Capacity:
        """What its jobs may take up together."""
        ...

    @property
    def images(self) -> Sequence[str] | None:
        """Patterns of the images that there are, as far as is known; None where any can be had."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def condition(self) -> Condition:
        """How the destination is, as far as is known without asking it."""
        ...

    async def runtime(self) -> Mapping[str, object]:
        """What a job's document says of the container runtime here. Raises BackendUnavailable where none works."""
        ...

    def address(self, job_id: str) -> Handle:
        """What is known of the handle of a job that may have been prepared without an answer: enough to discard it."""
        ...

    async def prepare(self, job: Job) -> Handle:
        """Make the job's place and start nothing. The same job has the same place, however often it is prepared."""
        ...

    async def start(self, handle: Handle, job: Job) -> None:
        """Have the job run, as soon as there is room. As often as you like: its commands run once.

        Raises JobLost where the place is gone.
        """
        ...

    async def resume(self, handle: Handle, need: Need) -> None:
        """Take note of a job that is known to have begun; it is not started again."""
        ...

    def follow(self, handle: Handle) -> AsyncIterator[Sequence[RunnerEvent]]:
        """Everything that the job reports, from its first event, until it has ended.

        A runner that died is noticed, what it left running is removed, and then the end is reported. Raises JobLost
        where the place is gone before the end was told.
        """
        ...

    async def tails(self, handle: Handle) -> LogTails | None:
        """The streams so far of the executor that runs, not older than a few seconds; None where nothing is known."""
        ...

    async def cancel(self, handle: Handle) -> None:
        """Ask the job to end, whether it was started or not; `follow` tells when nothing of it runs any more.

        Fine to ask twice, and of a job that has ended or is gone.
        """
        ...

    async def discard(self, handle: Handle) -> None:
        """Remove what a job that has ended, or was never started, has left. Fine to ask twice."""
        ...


def images_of(runtime: Mapping[str, object] | None) -> Sequence[str] | None:
    """The patterns of the images that a runtime has, as a job's document speaks of it; None where it can get any."""
    if runtime is None or runtime.get("kind") != "bubblewrap":
        return None
    images = runtime.get("images")
    return [str(pair[0]) for pair in images] if isinstance(images, Sequence) else None
