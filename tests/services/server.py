"""A real `tesapi serve`, or a part of it, as a process, to be used over HTTP and killed."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import httpx

from tests.jobs import processes_with, until

SETTLED = {"COMPLETE", "EXECUTOR_ERROR", "SYSTEM_ERROR", "CANCELED"}
_ADDRESS = re.compile(rb"(?:TES is served at|Tasks are driven;) (http://[^/\s]+)/")
_PORTS = {"serve": "SERVER__PORT", "api": "SERVER__PORT", "dispatcher": "DISPATCHER__PORT"}


class Server:
    """The service with its data below `folder`. Leaving it stops the process; `kill` does so by -9."""

    def __init__(self, folder: pathlib.Path, command: str = "serve", /, **settings: object) -> None:
        self.folder = folder
        self.command = command
        self.settings = {_PORTS[command]: 0, "RUNTIME__KIND": "bubblewrap", **settings}
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self._client = httpx.Client(timeout=30)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()
        if self.process is not None:
            self.stop()
        for pid in processes_with(str(self.folder / "data" / "jobs")):  # jobs outlive the service, and not the test
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def start(self) -> None:
        """Start it and wait until it listens; a restart listens at the same port."""
        start_of_log = self.log.stat().st_size if self.log.exists() else 0
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("TESAPI_", "TESP_"))}
        environment |= {f"TESAPI_{key}": str(value) for key, value in self.settings.items()}
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "tesapi", self.command]
            self.process = subprocess.Popen(command, cwd=self.folder, env=environment, stderr=log, stdout=log)
        address = until(lambda: self._address(start_of_log), "the server")
        self.url = address.decode()
        self.settings[_PORTS[self.command]] = self.url.rpartition(":")[2]

    def _address(self, start_of_log: int) -> bytes | None:
        assert self.process is not None
        text = self.log.read_bytes()[start_of_log:]
        found = _ADDRESS.search(text)
        if found is None:
            assert self.process.poll() is None, text.decode()
            return None
        return found[1]

    def kill(self) -> None:
        """As a power switch does, but for the page cache."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """As a service manager does; the exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> int:
        assert self.process is not None
        process, self.process = self.process, None
        process.send_signal(number)
        return process.wait(timeout=30)

    @property
    def jobs(self) -> list[pathlib.Path]:
        """The job directories that are there."""
        return list((self.folder / "data" / "jobs").glob("*/*"))

    def post(self, document: Mapping[str, Any]) -> str:
        """Create a task; its id."""
        answer = self._client.post(f"{self.url}/ga4gh/tes/v1/tasks", json=document)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def get(self, task_id: str, view: str = "FULL") -> dict[str, Any]:
        """A task."""
        answer = self._client.get(f"{self.url}/ga4gh/tes/v1/tasks/{task_id}", params={"view": view})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def cancel(self, task_id: str) -> None:
        """Cancel a task."""
        answer = self._client.post(f"{self.url}/ga4gh/tes/v1/tasks/{task_id}:cancel")
        assert (answer.status_code, answer.json()) == (200, {})

    def all(self, view: str = "MINIMAL") -> list[dict[str, Any]]:
        """Every task, page by page."""
        tasks: list[dict[str, Any]] = []
        token = ""
        while True:
            parameters = {"view": view, "page_size": "50", "page_token": token}
            page = self._client.get(f"{self.url}/ga4gh/tes/v1/tasks", params=parameters).json()
            tasks += page["tasks"]
            token = page.get("next_page_token", "")
            if not token:
                return tasks

    def wait_for(self, task_id: str, *states: str) -> str:
        """Wait until the task is in one of `states`, by default any that is final; the state."""
        wanted = set(states) or SETTLED
        state: str = until(lambda: (s := self.get(task_id, "MINIMAL")["state"]) in wanted and s, f"one of {wanted}")
        return state
