"""Places of jobs in a real Pulsar, which are set up, filled, started and read over its REST interface."""

from __future__ import annotations

import json
import pathlib
import shlex
import subprocess
import time
import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import httpx

from tests.jobs import Event, Place, parse, until
from tests.pulsars import Pulsar

_OVER = {"complete", "failed", "cancelled", "lost"}


class PulsarPlace(Place):
    """A job that a manager of a Pulsar runs, with the environment and the Python that it gives to its jobs."""

    def __init__(
        self, folder: pathlib.Path, runtime: Mapping[str, object], pulsar: Pulsar, manager: str | None = None
    ) -> None:
        job_id = f"job-{uuid.uuid4()}"
        answer = pulsar.call("POST", "/jobs", manager, job_id=job_id).json()
        super().__init__(folder, runtime, pathlib.Path(answer["job_directory"]), job_id)
        self.pulsar = pulsar
        self.manager = manager
        self._others: list[PulsarPlace] = []

    def another(self, folder: pathlib.Path) -> PulsarPlace:
        other = PulsarPlace(folder, self.runtime, self.pulsar, self.manager)
        self._others.append(other)
        return other

    def discard(self) -> None:
        """Remove the job's folder; what still runs is killed."""
        for place in (*self._others, self):
            for method, path in (("PUT", "/cancel"), ("DELETE", "")):
                place.call(method, path).raise_for_status()

    def _bring(self, inputs: Mapping[str, str]) -> None:
        for name, text in inputs.items():
            self._upload("input", name, text)

    def _upload(self, kind: str, name: str, text: str) -> None:
        self.call("POST", "/files", name=name, type=kind, content=text.encode()).raise_for_status()

    def start(self) -> Submitted:
        inputs = f"{self.directory}/inputs"
        command = shlex.join(["python3", "-I", "-S", "-X", "utf8", f"{inputs}/runner.py", f"{inputs}/job.json"])
        self.call("POST", "/submit", command_line=command).raise_for_status()
        return Submitted(self)

    def cancel(self) -> None:
        self._upload("jobdir", "cancelled", "false")

    def report(self) -> list[Event]:
        answer = self.call("GET", "/files", type="output_metadata", name="report.jsonl")
        return parse(answer.content[: answer.content.rfind(b"\n") + 1]) if answer.status_code == 200 else []

    def status(self) -> dict[str, Any]:
        """What Pulsar says of the job."""
        return dict(self.call("GET", "/status").raise_for_status().json())

    def call(self, method: str, path: str, **query: Any) -> httpx.Response:
        """A request about this job."""
        return self.pulsar.call(method, f"/jobs/{self.job_id}{path}", self.manager, **query)


class Submitted:
    """A runner that a Pulsar has started, to be used as a process is; leaving it waits for its end."""

    def __init__(self, place: PulsarPlace) -> None:
        self._place = place

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        if kind is None:
            self.communicate(timeout=60)

    @property
    def pid(self) -> int:
        """The runner's own, once it has begun: the job is on this machine."""
        started = self._place.directory / "metadata" / "started"
        note = until(lambda: started.exists() and started.read_text("ascii"), "the runner's note")
        return int(json.loads(note)["pid"])

    def poll(self) -> int | None:
        """The exit code, where Pulsar has done with it."""
        status = self._place.status()
        return int(status["returncode"]) if status["status"] in _OVER else None

    def communicate(self, *, timeout: float | None = None) -> tuple[bytes, bytes]:
        """Wait for the end; both streams, as Pulsar tells them."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self._place.status())["status"] not in _OVER:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self._place.job_id, timeout or 0)
            time.sleep(0.03)
        assert status["status"] == "complete", status
        return status["job_stdout"].encode(), status["job_stderr"].encode()
