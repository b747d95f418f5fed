"""One executor: its streams, its sandbox, its end."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from typing import NamedTuple, Tuple

from .guard import Stop, Stopped
from .job import Job, Places, Refused, Step
from .mounts import DISCARD, Layout, Namespace, make_mount_points
from .report import Report, tail
from .runtimes.base import Container, End, Room, Runtime

_TAILS_INTERVAL_S = 1.0
_KILLED = 137
_UNNAMED_BYTES = 16 << 20
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # FALLOC_FL_…


class Streams(NamedTuple):
    """Paths outside the container: of standard input (or /dev/null), and of the files that take the output.

    Of `unnamed` ones, which the task did not ask for, only the ends are of use.
    """

    stdin: str
    stdout: str
    stderr: str
    unnamed: Tuple[bool, bool]


def run_step(step: Step, job: Job, places: Places, runtime: Runtime, layout: Layout, stop: Stop, report: Report) -> End:
    """Run `step` to its end and report it; how it ended.

    Raises Stopped when the job is to stop, Refused where the step cannot be started: nothing of it runs then.
    """
    scratch = os.path.join(places.work, "exec", str(step.number))
    os.makedirs(scratch)
    make_mount_points(layout)
    streams = _streams(step, scratch, Namespace(layout.mounts))
    tail_bytes = max(512, job.tail_bytes // (2 * len(job.steps)))
    stop.check()
    with contextlib.ExitStack() as stack:
        room = _room(job, layout, scratch, streams, stop, stack)
        removal = stack.enter_context(contextlib.ExitStack())
        removal.callback(runtime.remove)
        container = runtime.container(step, room)
        stop.check()
        report.write("executor_started", index=step.number, image_used=container.image_used)
        try:
            container.start()
            end = _wait(container, step, room, streams, tail_bytes, places, stop)
            runtime.remove()  # also what the program left in the background
            removal.pop_all()  # once is enough where it succeeds
        except (Stopped, Refused, OSError):
            runtime.remove()
            _report_end(report, step, _KILLED, room, tail_bytes)
            raise
        _report_end(report, step, end.exit_code, room, tail_bytes)
    if end.failure is not None:
        raise Refused(end.failure)
    return end


def _report_end(report: Report, step: Step, exit_code: int, room: Room, tail_bytes: int) -> None:
    stdout, stderr = tail(room.stdout, tail_bytes), tail(room.stderr, tail_bytes)
    report.write("executor_ended", index=step.number, exit_code=exit_code, stdout=stdout, stderr=stderr)


def _room(job: Job, layout: Layout, scratch: str, streams: Streams, stop: Stop, stack: contextlib.ExitStack) -> Room:
    stdin = _open(streams.stdin, os.O_RDONLY)
    stack.callback(os.close, stdin)
    outward = []
    for path in (streams.stdout, streams.stderr):
        outward.append(_open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))
        stack.callback(os.close, outward[-1])
    return Room(
        mounts=layout.mounts,
        limits=job.limits,
        scratch=scratch,
        stdin=stdin,
        stdout=outward[0],
        stderr=outward[1],
        has_stdin=streams.stdin != os.devnull,
        at_top=layout.at_top,
        check=stop.check,
    )


def _wait(
    container: Container, step: Step, room: Room, streams: Streams, tail_bytes: int, places: Places, stop: Stop
) -> End:
    sizes: Tuple[int, int] = (0, 0)
    due = time.monotonic() + _TAILS_INTERVAL_S
    while True:
        end = container.poll()
        if end is not None:
            return end
        stop.wait(_TAILS_INTERVAL_S, *container.descriptors())
        if time.monotonic() >= due:
            due = time.monotonic() + _TAILS_INTERVAL_S
            now = (os.fstat(room.stdout).st_size, os.fstat(room.stderr).st_size)
            if now != sizes:
                for descriptor, size, unnamed in zip((room.stdout, room.stderr), now, streams.unnamed):
                    if unnamed and size > _UNNAMED_BYTES:
                        _forget_head(descriptor, size - _UNNAMED_BYTES)
                sizes = now
                _write_tails(places.tails, step.number, room, tail_bytes)


def _forget_head(descriptor: int, size: int) -> None:
    """Give the first `size` bytes of a file back to the disk, where the file system can; its length stays.

    Not by truncating it, for the program goes on writing meanwhile. Source: fallocate(2).
    """
    import ctypes  # only for a program that prints very much

    fallocate = ctypes.CDLL(None).fallocate
    fallocate(descriptor, _KEEP_SIZE | _PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(size))


def _write_tails(path: str, index: int, room: Room, tail_bytes: int) -> None:
    """The streams so far, for whoever looks while the step runs."""
    tails = {"index": index, "stdout": tail(room.stdout, tail_bytes), "stderr": tail(room.stderr, tail_bytes)}
    try:
        with open(path + ".new", "w", encoding="ascii") as file:
            json.dump(tails, file)
        os.replace(path + ".new", path)
    except OSError:
        return  # a convenience; a full disk will be told by what needs it


def _streams(step: Step, scratch: str, namespace: Namespace) -> Streams:
    def file_for(declared: str, name: str) -> str:
        return namespace.resolve(declared) if declared not in ("", DISCARD) else os.path.join(scratch, name)

    stdin = namespace.resolve(step.stdin) if step.stdin not in ("", DISCARD) else os.devnull
    unnamed = tuple(declared in ("", DISCARD) for declared in (step.stdout, step.stderr))
    return Streams(stdin, file_for(step.stdout, "stdout"), file_for(step.stderr, "stderr"), (unnamed[0], unnamed[1]))


def _open(path: str, flags: int) -> int:
    # Not through a link (`resolve` followed them all), and never waiting for the other end of a FIFO.
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    mode = os.fstat(descriptor).st_mode
    if path != os.devnull and not stat.S_ISREG(mode):
        os.close(descriptor)
        raise Refused(f"{path} is to take or give a stream, and is not a regular file.")
    os.set_blocking(descriptor, True)
    return descriptor
