"""From a task's record to the document that its runner reads (`tesapi.runner.job`). Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from tesapi import __version__
from tesapi.jobs.bundle import runner_text
from tesapi.runner import job as runner_job
from tesapi.tes.models import Executor, Input, Output, Resources
from tesapi.tes.record import TaskRecord

TAIL_BYTES = 64 << 10
"""How much of all its executors' streams a report may hold, as ASCII JSON: Pulsar cuts streams over 1 MiB."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a backend runs: a program and its document, and how much of the destination it needs.

    `document` may hold credentials: it is kept where only the runner's user can read it. `ram_gb` in 10^9 bytes.
    """

    job_id: str
    document: str
    runner: str
    cpu_cores: int
    ram_gb: float
    disk_gb: float = 0.0


def plan(
    record: TaskRecord,
    job_id: str,
    *,
    store_id: str,
    storage: Mapping[str, Mapping[str, object]],
    runtime: Mapping[str, object],
    tidy: bool = False,
) -> Job:
    """The job of one attempt at `record`, for a destination whose containers are run as `runtime` says.

    A `tidy` one removes the task's files at its end.
    """
    task = record.document
    document = {
        "version": runner_job.VERSION,
        "job_id": job_id,
        "task_id": record.id,
        "store_id": store_id,
        "executors": [_executor(executor) for executor in task.executors],
        "inputs": [_input(item) for item in task.inputs or ()],
        "outputs": [_output(output) for output in task.outputs or ()],
        "volumes": list(task.volumes or ()),
        "limits": _limits(task.resources),
        "storage": {name: dict(settings) for name, settings in storage.items()},
        "runtime": dict(runtime),
        "tail_bytes": TAIL_BYTES,
        "tidy": tidy,
    }
    cpu_cores, ram_gb, disk_gb = needs(record)
    return Job(
        job_id=job_id,
        document=json.dumps(document, ensure_ascii=True),
        runner=runner_text(__version__),
        cpu_cores=cpu_cores,
        ram_gb=ram_gb,
        disk_gb=disk_gb,
    )


def needs(record: TaskRecord) -> tuple[int, float, float]:
    """CPU cores, GB of memory and GB of disk that a task takes up: one core and nothing else where it does not say."""
    resources = record.document.resources
    if resources is None:
        return 1, 0.0, 0.0
    return max(1, resources.cpu_cores or 1), resources.ram_gb or 0.0, resources.disk_gb or 0.0


def _limits(resources: Resources | None) -> dict[str, object]:
    if resources is None:
        return {}
    asked = {"cpu_cores": resources.cpu_cores, "ram_gb": resources.ram_gb, "disk_gb": resources.disk_gb}
    return {name: value for name, value in asked.items() if value}


def _executor(executor: Executor) -> dict[str, object]:
    return {
        "image": executor.image,
        "command": list(executor.command),
        "env": executor.env or {},
        "workdir": executor.workdir or "",
        "stdin": executor.stdin or "",
        "stdout": executor.stdout or "",
        "stderr": executor.stderr or "",
        "ignore_error": bool(executor.ignore_error),
    }


def _input(item: Input) -> dict[str, object]:
    # "If content is not empty, url must be ignored." An empty content without a url is an empty file.
    if item.content or item.url is None:
        return {"path": item.path, "type": item.type.value, "content": item.content or ""}
    return {"path": item.path, "type": item.type.value, "url": item.url}


def _output(output: Output) -> dict[str, object]:
    return {
        "path": output.path,
        "type": output.type.value,
        "url": output.url,
        "path_prefix": output.path_prefix or "",
    }
