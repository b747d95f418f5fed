"""The command line as a process: in a pipe, and at a terminal."""

from __future__ import annotations

import fcntl
import os
import pathlib
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

TESAPI = [sys.executable, "-m", "tesapi"]
_PATIENCE_S = 30.0
# A process that leads its own session takes a terminal as its own; then ^C comes as SIGINT.
_AT_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


def environment(url: str, **variables: str) -> dict[str, str]:
    """What a user has set: the server's address, and nothing of this project's otherwise."""
    ours = ("TESAPI_", "TESP_", "TES_", "NO_COLOR", "FORCE_COLOR")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**clean, "TERM": "xterm", "TES_URL": url, **variables}


def typed(
    url: str, *words: str | bytes, cwd: pathlib.Path, given: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `tesapi WORDS` to its end in a pipe, with `given` on its standard input."""
    return subprocess.run(
        [*TESAPI, *words],
        cwd=cwd,
        env=environment(url, **variables),
        input=given,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


class Piped:
    """`tesapi WORDS` in a pipe, while it runs."""

    def __init__(self, url: str, *words: str, cwd: pathlib.Path, given: bytes = b"") -> None:
        self.process = subprocess.Popen(
            [*TESAPI, *words],
            cwd=cwd,
            env=environment(url),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(given)
        self.process.stdin.close()
        self.process.stdin = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def line(self) -> str:
        """The next line of its standard output."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode()

    def end(self, number: signal.Signals | None = None) -> tuple[int, str, str]:
        """Its exit code, and the rest of its standard output and error; after a signal, if one is given."""
        if number is not None:
            self.process.send_signal(number)
        stdout, stderr = self.process.communicate(timeout=_PATIENCE_S)
        return self.process.returncode, (stdout or b"").decode(), stderr.decode()


class Terminal:
    """`tesapi WORDS` at a terminal of its own. `shown` is all that it has been sent."""

    def __init__(self, url: str, *words: str, cwd: pathlib.Path, **variables: str) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, b"\x28\x00\x78\x00\x00\x00\x00\x00")  # 40 lines of 120 characters
        self.process = subprocess.Popen(
            [sys.executable, "-c", _AT_TERMINAL, *TESAPI, *words],
            cwd=cwd,
            env=environment(url, **variables),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._ours, keys.encode())

    def wait_for(self, text: str) -> None:
        """Wait until `text` has been shown since the last time."""
        start = len(self.shown)
        deadline = time.monotonic() + _PATIENCE_S
        while text not in self.shown[max(0, start - len(text)) :]:
            assert time.monotonic() < deadline, f"{text!r} is not in {self.shown!r}"
            assert self._read(), f"{text!r} is not in {self.shown!r}"

    def end(self) -> int:
        """Wait until it has ended; its exit code."""
        while self._read():
            pass
        return self.process.wait(timeout=_PATIENCE_S)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._ours], [], [], _PATIENCE_S)
        assert ready, f"nothing more comes after {self.shown!r}"
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # the other side has been closed
            return False
        self.shown += data.decode("utf-8", "replace")
        return bool(data)


def modules_imported(words: Sequence[str], cwd: pathlib.Path) -> tuple[set[str], Mapping[str, str]]:
    """The modules that a command imports, and what it said (`stdout`)."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "tesapi", *words],
        cwd=cwd,
        env=environment(""),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = [line for line in run.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}, {"stdout": run.stdout}
