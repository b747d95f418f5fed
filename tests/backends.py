"""Jobs for backends: made, started, followed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

from tesapi import __version__
from tesapi.backends.base import Backend
from tesapi.errors import BackendUnavailable
from tesapi.jobs.bundle import runner_text
from tesapi.jobs.plan import Job
from tesapi.tes.events import Handle, JobEnded, JobSeen, RunnerEvent
from tests.jobs import processes_with, sandboxes


async def runtime_of(backend: Backend) -> Mapping[str, object]:
    """What a job's document says of containers there, as soon as that is known."""
    while True:
        try:
            return await backend.runtime()
        except BackendUnavailable:
            await asyncio.sleep(0.02)


async def make_job(
    backend: Backend, *steps: dict[str, Any], cpu_cores: int = 1, ram_gb: float = 0.0, **fields: Any
) -> Job:
    """A job for a backend, with a document of its own."""
    job_id = f"job-{uuid.uuid4()}"
    document = {
        "version": 1,
        "job_id": job_id,
        "task_id": "task",
        "store_id": "store",
        "limits": {},
        "executors": steps,
        "inputs": [],
        "outputs": [],
        "volumes": [],
        "storage": {"file": {"roots": []}},
        "runtime": dict(await runtime_of(backend)),
        "tail_bytes": 65536,
        "tidy": True,
        **fields,
    }
    return Job(job_id, json.dumps(document), runner_text(__version__), cpu_cores, ram_gb)


async def events_of(backend: Backend, handle: Handle) -> list[RunnerEvent]:
    """What the job's runner reports, without what its destination may have said before."""
    return [event async for batch in backend.follow(handle) for event in batch if not isinstance(event, JobSeen)]


async def end_of(backend: Backend, handle: Handle) -> JobEnded:
    """How the job ends."""
    end = (await events_of(backend, handle))[-1]
    assert isinstance(end, JobEnded)
    return end


async def until_running(backend: Backend, handle: Handle, job: Job) -> None:
    """Wait until an executor runs: the job tells that, or only that it runs and then it is looked for."""
    async with contextlib.aclosing(backend.follow(handle)) as batches:  # type: ignore[type-var]
        async for batch in batches:
            for event in batch:
                if event.event == "executor_started":
                    return
                if isinstance(event, JobSeen):
                    while not sandboxes(job.job_id):
                        await asyncio.sleep(0.01)
                    return
    raise AssertionError("the job ended before an executor ran")


async def started_job(backend: Backend, *steps: dict[str, Any]) -> tuple[Job, Handle]:
    """A job that was prepared and started."""
    job = await make_job(backend, *steps)
    handle = await backend.prepare(job)
    await backend.start(handle, job)
    return job, handle


def place_of(runner: int) -> pathlib.Path:
    """The folder of a runner's job."""
    arguments = pathlib.Path(f"/proc/{runner}/cmdline").read_text("utf-8").split("\0")
    return next(pathlib.Path(argument) for argument in arguments if argument.endswith("job.json")).parent.parent


def runner_of(job_id: str) -> int:
    """The job's runner: its watchdog, which looks alike, has no parent any more, and shells have other arguments."""
    for pid in processes_with("runner.py"):
        with contextlib.suppress(OSError):
            arguments = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            parent = int(pathlib.Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[1])
            if job_id.encode() in arguments[-2] and b"python" in arguments[0] and parent != 1:
                return pid
    raise AssertionError(f"{job_id} has no runner")
