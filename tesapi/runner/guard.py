"""What keeps a job true when its runner, or its user, ends it: stop requests, the lock, the watchdog, the sweep."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import signal
import time
from types import FrameType
from typing import Any, Dict, List, Optional, Tuple

from .job import Places, Refused
from .report import Report, echo

_MARKER_INTERVAL_S = 0.25
_SWEEP_INTERVAL_S = 0.05
_KILLED = 137


class Stopped(Exception):
    """The job is to stop: its user canceled it, or the batch system or an operator sent a signal."""


class Stop:
    """Requests to stop: SIGTERM, SIGINT, and the marker file that a backend (or Pulsar) makes in the job's folder."""

    def __init__(self, marker: str) -> None:
        self._marker = marker
        self._looked = 0.0
        self._signal: Optional[int] = None
        self._reader, self._writer = os.pipe()
        for end in (self._reader, self._writer):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # only to wake `wait`

    def _note(self, number: int, frame: Optional[FrameType]) -> None:
        self._signal = number

    @property
    def canceled(self) -> bool:
        """Whether the marker is there."""
        return os.path.exists(self._marker)

    @property
    def reason(self) -> Optional[str]:
        """Why the job is to stop, if nobody canceled it."""
        if self.canceled:
            return None
        if self._signal is None:
            return "The job's place was removed while it ran."
        return f"The runner was told to stop by {signal.Signals(self._signal).name}."

    def check(self) -> None:
        """Raise Stopped if the job is to stop. Cheap enough to be called for every chunk of a file."""
        now = time.monotonic()
        if self._signal is None and now - self._looked < _MARKER_INTERVAL_S:
            return
        self._looked = now
        if self._signal is not None or self.canceled or not os.path.isdir(os.path.dirname(self._marker)):
            raise Stopped

    def wait(self, timeout_s: float) -> None:
        """Sleep until a signal comes (a child's end is one), at most `timeout_s`; then `check`."""
        select.select([self._reader], [], [], min(timeout_s, _MARKER_INTERVAL_S))
        try:
            os.read(self._reader, 4096)
        except BlockingIOError:
            pass
        self.check()


def take_lock(path: str, *, wait: bool = False) -> Optional[int]:
    """Lock the job; its descriptor, or None where somebody else holds it. Raises Refused where locks do not work.

    The lock is held as long as any copy of the descriptor is open: the watchdog keeps its own until it is done.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return None
        raise Refused(f"The file system of {path} has no locks ({error.strerror}); jobs need one that has.") from error
    return descriptor


def mark_started(path: str) -> None:
    """Note, durably and once for all, that the job's commands may have run. Raises FileExistsError the second time."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, json.dumps(_whoami()).encode("ascii"))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _whoami() -> Dict[str, Any]:
    pid = os.getpid()
    return {"host": os.uname().nodename, "boot_id": _boot_id(), "pid": pid, "start_time": start_time(pid)}


def start_time(pid: int) -> Optional[int]:
    """When a process started, in clock ticks since boot; None where it is gone. Source: proc(5), field 22 of stat."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def living(path: str) -> Optional[int]:
    """The process that wrote the mark at `path`, where it still lives on this machine.

    A number alone would not tell: the machine may have been restarted, and the number may mean another process.
    """
    try:
        with open(path, encoding="ascii") as file:
            who = json.load(file)
    except (OSError, ValueError):
        return None
    pid = int(who["pid"])
    return pid if who["boot_id"] == _boot_id() and start_time(pid) == who["start_time"] else None


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


class Watchdog:
    """A process that outlives the runner, and then removes its containers and reports what happened.

    Pulsar kills the whole tree of parents and children at once; a process forked twice is not in that tree any more.
    """

    def __init__(self, places: Places, marks: List[str], lock: int) -> None:
        reader, self._writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setsid()
                if os.fork():
                    os._exit(0)
                os.close(self._writer)
                _watch(places, marks, reader, lock)
            finally:
                os._exit(0)
        os.close(reader)
        os.waitpid(child, 0)

    def dismiss(self) -> None:
        """The runner has come to its end by itself."""
        os.write(self._writer, b"done")
        os.close(self._writer)


def _watch(places: Places, marks: List[str], reader: int, lock: int) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the runner obeys them, and is watched
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    if os.read(reader, 4) != b"done":
        finish_for_the_dead(places, marks, Report(places.report))
    os.close(lock)


def finish_for_the_dead(places: Places, marks: List[str], report: Report) -> None:
    """Remove what a runner that is gone has left running, and report its end. The caller holds the job's lock."""
    sweep(marks)
    if report.ended:
        return
    running = _running_executor(report)
    if running is not None:
        tails = _last_tails(places, running)
        report.write("executor_ended", index=running, exit_code=_KILLED, **tails)
    if os.path.exists(places.cancelled):
        report.write("ended", outcome="canceled")
    else:
        doing = "before any executor" if running is None else f"while executor {running} ran"
        report.write(
            "ended", outcome="system_error", reason=f"{_how_it_died(places)} {doing}; nothing of it runs any more."
        )
    report.sync()


def _how_it_died(places: Places) -> str:
    try:
        with open(places.started, encoding="ascii") as file:
            who = json.load(file)
    except (OSError, ValueError):
        return "The job's runner died at its start,"
    if who["boot_id"] != _boot_id():
        return f"The machine {who['host']} went down"
    return f"The job's runner on {who['host']} (process {who['pid']}) was killed"


def _running_executor(report: Report) -> Optional[int]:
    started = [line["index"] for line in report.lines if line["event"] == "executor_started"]
    ended = [line["index"] for line in report.lines if line["event"] == "executor_ended"]
    return started[-1] if len(started) > len(ended) else None


def _last_tails(places: Places, index: int) -> Dict[str, str]:
    try:
        with open(places.tails, encoding="ascii") as file:
            tails = json.load(file)
    except (OSError, ValueError):
        return {}
    return {"stdout": tails["stdout"], "stderr": tails["stderr"]} if tails.get("index") == index else {}


def sweep(marks: List[str]) -> None:
    """Kill every sandbox that shows `marks`, and wait until nothing of it is left.

    Of a sandbox, that ends the first process of its pid namespace; the kernel ends all others in it before that one
    becomes a zombie. A process that is just dying has no arguments any more, so whose sandbox it is cannot be asked:
    each such one is waited for, too.
    """
    while marks:
        found, dying = _sandboxes(marks)
        if not found and not dying:
            return
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(_SWEEP_INTERVAL_S)


def _sandboxes(marks: List[str]) -> Tuple[List[int], List[int]]:
    """Processes of bubblewrap that show `marks`, and those that are dying, whosever they are."""
    wanted = b"\0" + b"\0".join(os.fsencode(mark) for mark in marks) + b"\0"
    found, dying = [], []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                arguments = file.read()
        except OSError:
            continue
        if not arguments:
            if _is_dying_bwrap(int(name)):
                dying.append(int(name))
        # The marks stand before `--`: what the user's own command says does not count.
        elif wanted in arguments.partition(b"\0--\0")[0] + b"\0" and _is_bwrap(arguments):
            found.append(int(name))
    return found, dying


def _is_dying_bwrap(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return False
    name, _, fields = stat.partition(b"(")[2].rpartition(b")")
    return name == b"bwrap" and fields.split()[0] not in (b"Z", b"X")


def _is_bwrap(arguments: bytes) -> bool:
    return os.path.basename(arguments.partition(b"\0")[0]) == b"bwrap"


def attach(places: Places) -> Optional[int]:
    """Say what the living runner says. None when it has told the end; the job's lock if it is gone before that."""
    said = 0
    while True:
        lock = take_lock(places.lock)
        said = _echo_from(places.report, said)
        if lock is not None or _has_ended(places.report):
            return lock
        time.sleep(_MARKER_INTERVAL_S)


def _echo_from(path: str, position: int) -> int:
    try:
        with open(path, "rb") as file:
            file.seek(position)
            data = file.read()
    except OSError:
        return position
    whole = data[: data.rfind(b"\n") + 1]
    echo(whole)
    return position + len(whole)


def _has_ended(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            lines = file.read().splitlines()
    except OSError:
        return False
    return bool(lines) and b'"event": "ended"' in lines[-1]
