"""The report: numbered ASCII JSON lines, one per event, in a file and on standard output, and nothing else there.

A byte that is not UTF-8 on a Pulsar job's stdout makes its status unreadable for ever, so every line is ASCII.
"""

from __future__ import annotations

import errno
import json
import os
import time
from typing import Any, Dict, List, NamedTuple


class Tails(NamedTuple):
    """The ends of an executor's streams, as text."""

    stdout: str
    stderr: str


_RESERVE_BYTES = 512 << 10


class Report:
    """Appends to the report of a job. Only whoever holds the job's lock may make one; one may be `silent`.

    Beside it lies a reserve, so that a job that has filled the disk can still say so.
    """

    def __init__(self, path: str, *, silent: bool = False) -> None:
        self._silent = silent
        self._reserve = path + ".reserve"
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self.lines = _whole_lines(self._fd)

    @property
    def ended(self) -> bool:
        """Whether the last line has been written."""
        return bool(self.lines) and self.lines[-1]["event"] == "ended"

    def write(self, event: str, **fields: Any) -> None:
        """Append one line and echo it."""
        line = {"seq": len(self.lines) + 1, "at": _now(), "event": event}
        line.update((key, value) for key, value in fields.items() if value is not None)
        self.lines.append(line)
        data = (json.dumps(line, ensure_ascii=True) + "\n").encode("ascii")
        try:
            self._append(data)
        except OSError:
            del self.lines[-1]
            raise
        if not self._silent:
            echo(data)

    def reserve(self) -> None:
        """Keep room on the disk for what may have to be told when it is full. Raises OSError."""
        descriptor = os.open(self._reserve, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, _RESERVE_BYTES)
        finally:
            os.close(descriptor)

    def free(self) -> None:
        """Give the reserve back."""
        try:
            os.unlink(self._reserve)
        except FileNotFoundError:
            pass

    def _append(self, data: bytes) -> None:
        """Write all of `data`, or nothing. Raises OSError."""
        before = os.fstat(self._fd).st_size
        for last in (False, True):
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(self._fd, view) :]
                return
            except OSError as error:
                os.ftruncate(self._fd, before)
                if last or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self.free()

    def note(self, text: str) -> None:
        """A sentence for the job's user."""
        self.write("note", text=plain(text))

    def sync(self) -> None:
        """Make what has been written survive a power loss."""
        os.fsync(self._fd)


def echo(data: bytes) -> None:
    """Write to standard output; a reader that has gone away is no concern of the job's."""
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(1, view) :]
    except OSError:
        return


def plain(text: str) -> str:
    """`text` without lone surrogates, which stand for bytes of file names that are not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def tail(descriptor: int, size: int) -> str:
    """The end of an open file as text that takes at most `size` bytes as ASCII JSON.

    Of an open file, because a task may have put a link or a FIFO where it was opened.
    """
    data = os.pread(descriptor, size, max(0, os.fstat(descriptor).st_size - size))
    text = data.decode("utf-8", "replace")
    while text:
        excess = len(json.dumps(text)) - size
        if excess <= 0:
            break
        # A character takes at most 12 bytes (a pair of escapes), so this never cuts too much at once.
        text = text[max(1, excess // 12) :]
    return text


def _now() -> str:
    seconds = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1e6):06d}Z"


def _whole_lines(fd: int) -> List[Dict[str, Any]]:
    """The lines there are. A last one that was cut off when its writer died is removed."""
    data = b""
    while True:
        chunk = os.pread(fd, 1 << 20, len(data))
        if not chunk:
            break
        data += chunk
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.ftruncate(fd, whole)
    return [json.loads(line) for line in data[:whole].splitlines()]
