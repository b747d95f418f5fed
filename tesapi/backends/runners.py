"""Processes that run jobs on this machine: forked from a warm one where that can be, which saves them their start."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

from tesapi import __version__
from tesapi.jobs.bundle import CODE_SUFFIX, runner_code, runner_text
from tesapi.runner.job import Places
from tesapi.runner.processes import start_time
from tesapi.runner.warm import LONGEST

_log = logging.getLogger(__name__)

_KEPT_VARIABLES = ("PATH", "SSL_CERT_FILE", "SSL_CERT_DIR")
_ANSWER_S = 30.0
_END_S = 5.0
_PYTHON = (sys.executable, "-I", "-S", "-X", "utf8")
_STORAGE = ("storage.file", "storage.http")


class Runner:
    """A process that runs a job, or has done so. It is a child of this one where `process` is given."""

    def __init__(self, pid: int, started: int, process: subprocess.Popen[bytes] | None = None) -> None:
        self.pid = pid
        self._started = started
        self._process = process

    def lives(self) -> bool:
        """Whether it goes on; a child that has ended is reaped."""
        if self._process is not None:
            return self._process.poll() is None
        return start_time(self.pid) == self._started

    def leave(self) -> None:
        """It goes on without us; a Popen that is dropped while its process runs would complain."""
        if self._process is not None:
            self._process.returncode = self._process.poll() or 0


class Runners:
    """Starts runners of the jobs below `directory`. For threads; blocking."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._text = runner_text(__version__).encode("ascii")
        self._lock = threading.Lock()
        self._warm: _Warm | None = None
        self._closed = False

    def start(self, places: Places, kind: str) -> Runner:
        """Start a runner of the job, which probably needs the runtime `kind`, if that is not empty. Raises OSError."""
        program = Path(places.directory, "inputs", "runner.py")
        if program.read_bytes() != self._text:
            return _spawned(places)  # of another version, which its document is for
        try:
            with self._lock:
                if self._warm is None and not self._closed:
                    self._warm = _Warm(self._directory, self._text, kind, places)
                if self._warm is not None:
                    return self._warm.fork(places)
        except (OSError, ValueError) as error:
            # It may have been forked: a second runner then waits for the first, as with every second start.
            _log.warning("The warm runner did not answer (%s); %s is run by a process of its own.", error, program)
            self._end_warm()
        with contextlib.suppress(OSError):  # it does without, and takes longer to start
            program.with_name(program.name + CODE_SUFFIX).write_bytes(runner_code())
        return _spawned(places)

    def close(self) -> None:
        """Start no more. What runs goes on."""
        self._closed = True
        self._end_warm()

    def _end_warm(self) -> None:
        with self._lock:
            warm, self._warm = self._warm, None
        if warm is not None:
            warm.close()


class _Warm:
    """The process that forks; see `tesapi.runner.warm`."""

    def __init__(self, directory: Path, text: bytes, kind: str, first: Places) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_ANSWER_S)
        program = os.memfd_create("runner.py")
        try:
            with os.fdopen(os.dup(program), "wb") as file:
                file.write(text)
            descriptor = theirs.fileno()
            options = [f"/dev/fd/{program}", "--warm", str(descriptor)]
            # Its arguments take as much room as those of a runner, which are shown in their place after a fork.
            room = _size(*_of_job(first)) - _size(*options, str(directory))
            self._process = subprocess.Popen(
                [*_PYTHON, *options, str(directory) + " " * room],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd="/",
                env=_environment(),
                pass_fds=(program, descriptor),
                start_new_session=True,
            )
            modules = [*_STORAGE, *([f"runtimes.{kind}"] if kind else [])]
            self._socket.send(" ".join(modules).encode("ascii"))
        except OSError:
            self._socket.close()
            raise
        finally:
            theirs.close()
            os.close(program)

    def fork(self, places: Places) -> Runner:
        """Raises OSError and ValueError where it does not answer as it should."""
        document = os.fsencode(places.document)
        if len(document) > LONGEST:
            raise ValueError(f"the path {places.document} is too long")
        self._socket.send(document)
        pid, started = self._socket.recv(64).split()
        return Runner(int(pid), int(started))

    def close(self) -> None:
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_END_S)
            return
        self._process.kill()
        self._process.wait()


def _spawned(places: Places) -> Runner:
    os.makedirs(places.metadata, exist_ok=True)  # noqa: PTH103 - the runner's places are text
    complaints = os.open(places.complaints, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        process = subprocess.Popen(
            [*_PYTHON, *_of_job(places)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=complaints,
            cwd="/",
            env=_environment(),
            start_new_session=True,
        )
    finally:
        os.close(complaints)
    return Runner(process.pid, 0, process)


def _of_job(places: Places) -> list[str]:
    return [f"{places.directory}/inputs/runner.py", places.document]


def _size(*arguments: str) -> int:
    return sum(len(os.fsencode(argument)) + 1 for argument in arguments)


def _environment() -> dict[str, str]:
    return {"PATH": os.defpath} | {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
