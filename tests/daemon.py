"""A program that runs while a test does: started in a session of its own, stopped or killed, started again."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from tests.jobs import until

_PATIENCE_S = 60.0


class Daemon:
    """What services have in common; each says in `_command` how it starts, and in `_ready` when it has."""

    def __init__(self, folder: pathlib.Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.name = name
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start it and wait until it serves. A restart serves at the same address."""
        command, environment = self._command()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, env=dict(environment),
                start_new_session=True,
            )  # fmt: skip
        try:
            until(self._serves, f"{self.name} (its log: {self.log})", patience_s=_PATIENCE_S)
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """End it as a service manager does, and wait for that."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a crash would."""
        self._end(signal.SIGKILL)

    def _command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        raise NotImplementedError

    def _ready(self) -> bool:
        raise NotImplementedError

    def _serves(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text("utf-8", "replace")[-4000:]
        return self._ready()

    def _end(self, number: signal.Signals) -> None:
        if self.process is None:
            return
        process, self.process = self.process, None
        # A crash takes the whole group at once; a service manager tells the one that it started.
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
        process.wait(timeout=_PATIENCE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        until(lambda: not _group_lives(process.pid), f"the end of {self.name}")


def _group_lives(group: int) -> bool:
    """Whether anything but zombies is in a process group."""
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text("ascii", "replace").rpartition(")")[2].split()[:3]
            # A zombie may have threads that still end, and with them its ports.
            if int(pgrp) == group and (state not in "ZX" or len(list((stat.parent / "task").iterdir())) > 1):
                return True
        except OSError:
            continue
    return False


def free_port() -> int:
    """A port of loopback that nobody has now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def answers(port: int) -> bool:
    """Whether somebody takes connections at a port of loopback."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
