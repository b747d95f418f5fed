"""Jobs for the runner: their documents, their places, and what they report."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from tesapi import __version__
from tesapi.jobs.bundle import runner_text
from tesapi.runner.job import Owner
from tesapi.runner.runtimes.engine import Engine

Event = dict[str, Any]


def step(*command: str, **fields: object) -> dict[str, Any]:
    """An executor of a job document: `step("sh", "-c", "…", env={…}, stdout="/…")`."""
    blank = {
        "image": "alpine",
        "env": {},
        "workdir": "",
        "stdin": "",
        "stdout": "",
        "stderr": "",
        "ignore_error": False,
    }
    return {**blank, "command": list(command), **fields}


def script(text: str, **fields: object) -> dict[str, Any]:
    """An executor that runs a shell script."""
    return step("sh", "-c", text, **fields)


def until(condition: Callable[[], Any], what: str | Callable[[], str], patience_s: float = 30.0) -> Any:
    """Wait for a state, never for a second; the first true value. `what` may be said when it did not come."""
    deadline = time.monotonic() + patience_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited in vain for: {what if isinstance(what, str) else what()}"
        time.sleep(0.01)


def sandboxes(job_id: str) -> list[int]:
    """Processes of bubblewrap that belong to a job."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if arguments[0].endswith(b"bwrap") and job_id.encode() in arguments:
                found.append(int(entry.name))
    return found


class Runner(subprocess.Popen[bytes]):
    """A runner, for which a test that fails does not wait."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, error, trace)


class Running(Protocol):
    """A runner at work, as far as tests use it wherever it runs; Popen is one."""

    @property
    def pid(self) -> int: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

    def poll(self) -> int | None: ...

    def communicate(self, *, timeout: float | None = None) -> tuple[bytes, bytes]: ...


class Place:
    """A job's directory with the runner in it, and `storage`, the only root of its files."""

    def __init__(self, folder: pathlib.Path, runtime: Mapping[str, object], directory: pathlib.Path, job_id: str):
        self.job_id = job_id
        self.directory = directory
        self.storage = folder / "storage"
        self.runtime = runtime
        self.storage.mkdir(parents=True, exist_ok=True)

    def another(self, folder: pathlib.Path) -> Place:
        """A place of the same kind for another job, whose storage is below `folder`."""
        raise NotImplementedError

    @property
    def owner(self) -> Owner:
        """Whose containers the job's are."""
        parent = self.directory.parent.stat()
        lock = str(self.directory / "metadata" / "lock")
        return Owner("a-store", f"task-of-{self.job_id}", self.job_id, lock, f"{parent.st_dev}:{parent.st_ino}")

    def url(self, name: str) -> str:
        """The URL of a file below the storage root."""
        return f"file://{self.storage}/{name}"

    def write(self, *steps: Mapping[str, object], **fields: Any) -> None:
        """Write the job: its executors, and `inputs`, `outputs`, `volumes` or anything else of its document."""
        document = {
            "version": 1,
            "job_id": self.job_id,
            "task_id": f"task-of-{self.job_id}",
            "store_id": "a-store",
            "limits": {},
            "executors": steps,
            "inputs": [{"type": "FILE", **item} for item in fields.pop("inputs", ())],
            "outputs": [{"type": "FILE", **item} for item in fields.pop("outputs", ())],
            "volumes": fields.pop("volumes", ()),
            "storage": {"file": {"roots": [str(self.storage)]}},
            "runtime": dict(self.runtime),
            "tail_bytes": 65536,
            **fields,
        }
        self._bring({"job.json": json.dumps(document), "runner.py": runner_text(__version__)})

    def _bring(self, inputs: Mapping[str, str]) -> None:
        raise NotImplementedError

    def start(self) -> Running:
        """Start the runner and do not wait for it."""
        raise NotImplementedError

    def run(self, *steps: Mapping[str, object], **fields: Any) -> list[Event]:
        """Run a job to its end; its report, which is all that the runner prints."""
        self.write(*steps, **fields)
        with self.start() as runner:
            stdout, stderr = runner.communicate(timeout=60)
        assert stderr == b""
        assert runner.poll() == 0
        assert stdout == self.report_file.read_bytes()
        return parse(stdout)

    def cancel(self) -> None:
        """Leave the mark that the runner looks for."""
        self.cancelled_file.touch()

    def remains(self) -> Sequence[object]:
        """Whatever there is of the job's containers: processes, or ids that its engine knows."""
        if self.runtime["kind"] == "bubblewrap":
            return [pid for pid in sandboxes(self.job_id) if pid_alive(pid)]
        label = f"label=tesapi.job={self.job_id}"
        if self.runtime["kind"] == "podman":
            runtime: Any = self.runtime
            command = [runtime["program"], *runtime["options"], "ps", "-a", "-q", "--filter", label]
            return subprocess.run(
                command, env=runtime["environment"], stdout=subprocess.PIPE, check=True
            ).stdout.split()
        query = {"all": "1", "filters": json.dumps({"label": [f"tesapi.job={self.job_id}"]})}
        found = Engine(str(self.runtime["socket"])).call("GET", "/containers/json", None, query)
        return [container["Id"] for container in found]

    @property
    def report_file(self) -> pathlib.Path:
        return self.directory / "metadata" / "report.jsonl"

    @property
    def cancelled_file(self) -> pathlib.Path:
        return self.directory / "cancelled"

    def report(self) -> list[Event]:
        """What has been reported so far."""
        return parse(self.report_file.read_bytes()) if self.report_file.exists() else []

    def end(self) -> Event:
        """The last line of the report, once it is there."""
        return until(lambda: [line for line in self.report() if line["event"] == "ended"], "the end of the job")[0]

    def stored(self, name: str) -> str:
        """The text of a file in storage."""
        return (self.storage / name).read_text("utf-8")


class JobPlace(Place):
    """A job whose runner the test starts by itself, in an environment that is empty but for `environment`."""

    def __init__(self, folder: pathlib.Path, runtime: Mapping[str, object]) -> None:
        job_id = f"job-{uuid.uuid4()}"
        super().__init__(folder, runtime, folder / "jobs" / job_id, job_id)
        self.environment: dict[str, str] = {}
        self.python = sys.executable
        self.directory.parent.mkdir(exist_ok=True)

    def another(self, folder: pathlib.Path) -> JobPlace:
        return JobPlace(folder, self.runtime)

    def _bring(self, inputs: Mapping[str, str]) -> None:
        (self.directory / "inputs").mkdir(parents=True)
        for name, text in inputs.items():
            (self.directory / "inputs" / name).write_text(text, "ascii")

    def command(self, python: str = "") -> list[str]:
        """How the runner is started."""
        inputs = self.directory / "inputs"
        return [python or self.python, "-I", "-S", str(inputs / "runner.py"), str(inputs / "job.json")]

    def start(self, python: str = "") -> subprocess.Popen[bytes]:
        return Runner(
            self.command(python),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            env=self.environment,
            start_new_session=True,
        )


def kill_at_start(place: JobPlace, delay_s: float) -> None:
    """Have a job begin its executor, and kill its runner `delay_s` after it has opened the streams for that."""
    place.write(step("sleep", "1000"))
    with place.start() as runner:
        until((place.directory / "tes" / "exec" / "0" / "stderr").exists, "the streams of the executor")
        time.sleep(delay_s)
        os.kill(runner.pid, signal.SIGKILL)
        runner.communicate(timeout=30)
    assert place.end()["outcome"] == "system_error"


def parse(report: bytes) -> list[Event]:
    """The lines of a report, which are numbered from 1 and plain ASCII."""
    assert report.isascii()
    lines = [json.loads(line) for line in report.splitlines()]
    assert [line["seq"] for line in lines] == list(range(1, len(lines) + 1))
    return lines


def only(events: Sequence[Event], kind: str) -> list[Event]:
    """The events of one kind."""
    return [event for event in events if event["event"] == kind]


def outcome(events: Sequence[Event]) -> tuple[str, str | None]:
    """How a job ended, and the sentence on it."""
    assert events[-1]["event"] == "ended"
    return events[-1]["outcome"], events[-1].get("reason")


def pid_alive(pid: int) -> bool:
    """Whether a process lives, and is not just waiting to be reaped."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def children_of(pid: int) -> list[int]:
    """The direct children of a process."""
    try:
        return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()]
    except OSError:
        return []


def processes_with(text: str) -> list[int]:
    """Processes whose command line contains `text`, but for this one."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if text.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def pythons() -> list[str]:
    """Every Python from 3.9 on that can be found: on PATH, and among pyenv's versions."""
    named = [shutil.which(f"python3.{minor}") for minor in range(9, 16)]
    kept = sorted(pathlib.Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser().glob("versions/3.*/bin/python3"))
    found = {path for path in (*named, *map(str, kept)) if path is not None and _new_enough(path)}
    return sorted(found | {sys.executable})


def _new_enough(python: str) -> bool:
    check = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 9))"]
    return subprocess.run(check, capture_output=True, check=False).returncode == 0
