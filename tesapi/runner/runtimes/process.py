"""A container that is a process of this machine, started by a program."""

from __future__ import annotations

import os
import subprocess
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from ..job import Refused
from .base import End, Room


def spawn(
    argv: List[str],
    room: Room,
    environment: Dict[str, str],
    inherited: Sequence[int] = (),
    before_exec: Optional[Callable[[], None]] = None,
) -> subprocess.Popen[bytes]:
    """Start `argv` on the step's streams, and in the child call `before_exec` first. Raises Refused.

    It is started by the main thread: a sandbox that dies with its parent dies with the *thread* that started it.
    """
    try:
        return subprocess.Popen(
            argv,
            stdin=room.stdin,
            stdout=room.stdout,
            stderr=room.stderr,
            cwd="/",
            env=environment,
            pass_fds=inherited,
            preexec_fn=before_exec,  # safe, since the runner has no threads while it starts a step
        )
    except (OSError, subprocess.SubprocessError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        raise Refused(f"{argv[0]} cannot be started: {why}.") from error


class ProcessContainer:
    """`start` gives the process, `read_end` says what its return code means."""

    def __init__(
        self, image_used: str, start: Callable[[], subprocess.Popen[bytes]], read_end: Callable[[int], End]
    ) -> None:
        self.image_used = image_used
        self._start = start
        self._read_end = read_end
        self._process: Optional[subprocess.Popen[bytes]] = None

    def start(self) -> None:
        self._process = self._start()

    def descriptors(self) -> Tuple[List[int], List[int]]:
        return [], []  # the end of a child wakes whoever waits

    def poll(self) -> Optional[End]:
        if self._process is None or self._process.poll() is None:
            return None
        return self._read_end(self._process.returncode)


def unnamed(path: str, data: bytes) -> int:
    """A descriptor that reads `data`, and that nothing else leads to."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(path)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
