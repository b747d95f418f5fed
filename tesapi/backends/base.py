"""What a place where jobs run promises. Its docstrings are what `tests/contract/test_backend.py` tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
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
    """What a destination gives all its jobs together; `ram_gb` in 10^9 bytes."""

    max_jobs: int
    cpu_cores: int
    ram_gb: float


@dataclass(frozen=True, slots=True)
class Condition:
    """Whether a destination can take jobs, and a sentence about that for its operator."""

    ok: bool
    sentence: str


class Backend(Protocol):
    """Runs jobs at one destination; knows jobs, not tasks. An async context manager; leaving it ends no job.

    Every method but `condition` raises BackendUnavailable where the destination cannot be reached: ask again later.
    """

    @property
    def capacity(self) -> Capacity:
        """What its jobs may take up together."""
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

    async def prepare(self, job: Job) -> Handle:
        """Make the job's place and start nothing. The same job has the same place, however often it is prepared."""
        ...

    async def start(self, handle: Handle, job: Job) -> None:
        """Have the job run, as soon as there is room. As often as you like: its commands run once.

        Raises JobLost where the place is gone.
        """
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
