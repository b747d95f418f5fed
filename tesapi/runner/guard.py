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
from typing import Any, Dict, List, Optional, Sequence

from . import leftovers, mounts
from .job import Places, Refused, read
from .processes import boot_id, start_time
from .report import Report, echo
from .runtimes.base import Note, Runtime, make

_MARKER_INTERVAL_S = 0.25
_BEAT_S = 5.0
_KILLED = 137


class Stopped(Exception):
    """The job is to stop: its user canceled it, or the batch system or an operator sent a signal."""


class Stop:
    """Requests to stop: SIGTERM, SIGINT, and the marker file that a backend (or Pulsar) makes in the job's folder."""

    def __init__(self, marker: str, lock: str) -> None:
        self._marker = marker
        self._lock = lock
        self._looked = 0.0
        self._beaten = time.monotonic()
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
        if now - self._beaten > _BEAT_S:
            self._beaten = now
            beat(self._lock)
        if self._signal is not None or self.canceled or not os.path.isdir(os.path.dirname(self._marker)):
            raise Stopped

    def wait(self, timeout_s: float, readers: Sequence[int] = (), writers: Sequence[int] = ()) -> None:
        """Sleep until a signal comes (a child's end is one) or a descriptor is ready, at most `timeout_s`; `check`."""
        select.select([self._reader, *readers], writers, [], min(timeout_s, _MARKER_INTERVAL_S))
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


def beat(lock: str) -> None:
    """Show that the job's runner lives to whoever sees its files, and not its processes, from another machine."""
    try:
        os.utime(lock)
    except OSError:
        return  # its place was removed, which `check` tells


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
    return {"host": os.uname().nodename, "boot_id": boot_id(), "pid": pid, "start_time": start_time(pid)}


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
    return pid if who["boot_id"] == boot_id() and start_time(pid) == who["start_time"] else None


class Watchdog:
    """A process that outlives the runner, and then removes its containers and reports what happened.

    Pulsar kills the whole tree of parents and children at once; a process forked twice is not in that tree any more.
    """

    def __init__(self, places: Places, runtime: Runtime, lock: int) -> None:
        reader, self._writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setsid()
                if os.fork():
                    os._exit(0)
                os.close(self._writer)
                _watch(places, runtime, reader, lock)
            finally:
                os._exit(0)
        os.close(reader)
        os.waitpid(child, 0)

    def dismiss(self) -> None:
        """The runner has come to its end by itself."""
        os.write(self._writer, b"done")
        os.close(self._writer)


def _watch(places: Places, runtime: Runtime, reader: int, lock: int) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the runner obeys them, and is watched
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    if os.read(reader, 4) != b"done":
        finish_for_the_dead(places, runtime, Report(places.report))
    os.close(lock)


def finish_for_the_dead(places: Places, runtime: Optional[Runtime], report: Report) -> None:
    """Remove what a runner that is gone has left running, and report its end. The caller holds the job's lock.

    There is no `runtime` where the job never had one, so that nothing of it was started. What an engine of another
    machine runs cannot be seen from here, and is not claimed to have ended.
    """
    if runtime is not None:
        runtime.remove()
    if report.ended:
        return
    elsewhere = _where(places) if runtime is not None and runtime.outlives else None
    if elsewhere is not None and _running_executor(report) is not None:
        report.write(
            "ended",
            outcome="system_error",
            reason=f"The job's runner on {elsewhere} is gone, and a container of it (label tesapi.job="
            f"{os.path.basename(places.directory)}) may still run there: from another machine that cannot be seen.",
        )
        report.sync()
        return
    if runtime is not None and runtime.foreign_users and elsewhere is None:
        _open_leftovers(places, report)
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


def _open_leftovers(places: Places, report: Report) -> None:
    try:
        job = read(places.document)
        leftovers.open_up(job, mounts.plan(job, places.work), places.work, report.note)
    except Refused:
        return  # such a job never ran


def _who_started(places: Places) -> Optional[Dict[str, Any]]:
    try:
        with open(places.started, encoding="ascii") as file:
            who: Dict[str, Any] = json.load(file)
            return who
    except (OSError, ValueError):
        return None


def _where(places: Places) -> Optional[str]:
    """The machine that the job was started on, where that is not this one."""
    who = _who_started(places)
    return None if who is None or who["host"] == os.uname().nodename else str(who["host"])


def _how_it_died(places: Places) -> str:
    who = _who_started(places)
    if who is None:
        return "The job's runner died at its start,"
    if _where(places) is not None:
        return f"The job's runner on {who['host']} (process {who['pid']}) is gone: it ended"
    if who["boot_id"] != boot_id():
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


def runtime_of(places: Places, note: Note) -> Optional[Runtime]:
    """The runtime of a job that somebody else began; None where it never had one."""
    try:
        job = read(places.document)
        return make(job.runtime, job.owner, note)
    except Refused:
        return None


def sweep_others(settings: Dict[str, Any], runtime: Runtime, note: Note) -> None:
    """Remove the containers of dead jobs that lie beside this one, and report those jobs' ends.

    A cgroup kill, as of Slurm, takes a runner together with its watchdog, and leaves the containers of an engine.
    """
    for owner in runtime.others():
        places = Places(os.path.join(os.path.dirname(os.path.dirname(owner.lock)), "inputs", "job.json"))
        try:
            lock = take_lock(places.lock)
        except FileNotFoundError:  # the job was discarded, so that nobody waits for a word on it
            make(settings, owner, note).remove()
            continue
        if lock is not None:
            finish_for_the_dead(places, make(settings, owner, note), Report(places.report, silent=True))
            os.close(lock)


def roll_call(calls: Sequence[Dict[str, Any]], note: Note) -> List[Dict[str, Any]]:
    """Ask after jobs whose runners may have died: of each, whether it `lives`. The dead ones' ends are reported.

    Each call has the path of a `document`, and says whether the job is `over` for whoever started it: one that is not,
    and has not begun, may begin yet. A job of another machine counts as dead only if it is over, and nothing moves.
    """
    answers = []
    for call in calls:
        try:
            lives = _lives(Places(call["document"]), bool(call["over"]), note)
        except FileNotFoundError:
            lives = False  # its place is gone
        except Refused:
            lives = True  # what cannot be told is not called dead
        answers.append({"document": call["document"], "lives": lives})
    return answers


def _lives(places: Places, over: bool, note: Note) -> bool:
    begun = os.path.exists(places.started)
    if not begun and not over:
        return True
    if begun and _where(places) is not None and (not over or _moves(places.lock)):
        return True
    os.stat(places.directory)
    os.makedirs(places.metadata, exist_ok=True)
    lock = take_lock(places.lock)
    if lock is None:
        return True
    try:
        finish_for_the_dead(places, runtime_of(places, note), Report(places.report, silent=True))
    finally:
        os.close(lock)
    return False


def _moves(lock: str) -> bool:
    """Whether a runner on another machine shows that it lives; network file systems may tell a minute late."""
    before = os.stat(lock).st_mtime_ns
    deadline = time.monotonic() + 60 + 3 * _BEAT_S
    while time.monotonic() < deadline:
        time.sleep(1)
        if os.stat(lock).st_mtime_ns != before:
            return True
    return False


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
