"""What is to be removed at a destination, noted on disk while it is there: a process may be killed meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from tesapi.errors import ConfigurationProblem

_LOCK = ".lock"


class HelperNotes:
    """The notes of one process on one destination; they bear the ids of jobs.

    Processes that share `folder` each have a folder below it, and a lock on that for as long as they live. What one
    has left when it ended, however it ended, goes over to whichever asks first: see `adopt`. Without a folder, notes
    end with the process.
    """

    def __init__(self, folder: Path | None) -> None:
        self._shared = folder
        self._own = Path()
        self._in_memory: dict[str, tuple[float, str]] = {}
        self._stack = contextlib.ExitStack()

    @property
    def durable(self) -> bool:
        """Whether notes outlive the process."""
        return self._shared is not None

    def __enter__(self) -> Self:
        """Raises ConfigurationProblem where the folder cannot be used."""
        if self._shared is not None:
            try:
                self._make_own(self._shared)
            except OSError as error:
                raise ConfigurationProblem(
                    f"{self._shared} cannot be written or locked ({error.strerror}); server.data_dir is to be on a file"
                    " system with locks, such as a disk of this machine."
                ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack, contextlib.suppress(OSError):  # somebody may have removed the data folder
            if self._shared is not None and not self.noted():
                _remove(self._own)

    def _make_own(self, shared: Path) -> None:
        name = str(uuid.uuid4())
        shared.mkdir(mode=0o700, parents=True, exist_ok=True)
        hidden = shared / f".{name}"  # until it is locked: nobody is to take it for one that was left
        hidden.mkdir(mode=0o700)
        (hidden / _LOCK).touch(mode=0o600)
        self._stack.enter_context(_locked(hidden / _LOCK))
        self._own = hidden.rename(shared / name)

    def note(self, job_id: str, text: str = "") -> None:
        """Remember, over the end of this process, that something of `job_id` is there, and `text` about it."""
        if self._shared is None:
            self._in_memory[job_id] = (time.time(), text)
        else:
            (self._own / job_id).write_text(text, "ascii")

    def forget(self, job_id: str) -> None:
        """Nothing of it is there any more."""
        if self._shared is None:
            self._in_memory.pop(job_id, None)
        else:
            (self._own / job_id).unlink(missing_ok=True)

    def noted(self) -> list[str]:
        """The jobs of the notes that this process has."""
        if self._shared is None:
            return sorted(self._in_memory)
        return sorted(path.name for path in self._own.iterdir() if not path.name.startswith("."))

    def text(self, job_id: str) -> str:
        """What was noted about a job of `noted`."""
        return self._in_memory[job_id][1] if self._shared is None else (self._own / job_id).read_text("ascii")

    def age_s(self, job_id: str) -> float:
        """How long ago a job of `noted` was noted, by the clock on the wall."""
        at = self._in_memory[job_id][0] if self._shared is None else (self._own / job_id).stat().st_mtime
        return time.time() - at

    def adopt(self) -> list[str]:
        """Take over the notes of processes that have ended; of which jobs they are."""
        adopted: list[str] = []
        for folder in [] if self._shared is None else sorted(self._shared.iterdir()):
            if folder == self._own or folder.name.startswith("."):
                continue
            with contextlib.suppress(OSError), _locked(folder / _LOCK):  # it lives, or another has taken them over
                for note in folder.iterdir():
                    if not note.name.startswith("."):
                        note.rename(self._own / note.name)
                        adopted.append(note.name)
                _remove(folder)
        return sorted(adopted)


def _remove(folder: Path) -> None:
    (folder / _LOCK).unlink(missing_ok=True)
    folder.rmdir()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock at `path`, which ends with the process. Raises OSError where another has it, or there is none."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
