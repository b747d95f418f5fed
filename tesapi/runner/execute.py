"""One executor: its streams, its sandbox, its end."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import time
from typing import List, NamedTuple, Tuple

from .guard import Stop, Stopped, sweep
from .job import Job, Places, Refused, Step
from .mounts import DISCARD, Mount, Namespace
from .report import Report, tail
from .runtimes.base import ARGUMENTS_FD, STATUS_FD, Runtime

_TAILS_INTERVAL_S = 1.0
_STATUS_BYTES = 64 << 10


class Streams(NamedTuple):
    """Paths outside the container: of standard input (or /dev/null), and of the files that take the output."""

    stdin: str
    stdout: str
    stderr: str


def run_step(
    step: Step, job: Job, places: Places, runtime: Runtime, mounts: List[Mount], stop: Stop, report: Report
) -> int:
    """Run `step` to its end and report it; its exit code.

    Raises Stopped when the job is to stop, Refused where the step cannot be started: nothing of it runs then.
    """
    scratch = os.path.join(places.work, "exec", str(step.number))
    os.makedirs(scratch)
    streams = _streams(step, scratch, Namespace(mounts))
    launch = runtime.launch(step, mounts, scratch)
    tail_bytes = max(512, job.tail_bytes // (2 * len(job.steps)))
    stop.check()
    report.write("executor_started", index=step.number, image_used=launch.image_used)
    process, status_reader = _start(launch.argv, launch.arguments, streams, scratch)
    try:
        _wait(process, step, streams, tail_bytes, places, stop)
    except Stopped:
        process.kill()
        process.wait()
        sweep(runtime.marks(job.job_id))
        _report_end(report, step, 137, streams, tail_bytes)
        raise
    finally:
        status = _read_all(status_reader)
    # Whatever the program left in the background has ended with its sandbox; seen, not assumed.
    sweep(runtime.marks(job.job_id))
    end = runtime.read_end(process.returncode, status, tail(streams.stderr, 4096))
    _report_end(report, step, end.exit_code, streams, tail_bytes)
    if end.failure is not None:
        raise Refused(end.failure)
    return end.exit_code


def _report_end(report: Report, step: Step, exit_code: int, streams: Streams, tail_bytes: int) -> None:
    stdout, stderr = tail(streams.stdout, tail_bytes), tail(streams.stderr, tail_bytes)
    report.write("executor_ended", index=step.number, exit_code=exit_code, stdout=stdout, stderr=stderr)


def _start(argv: List[str], arguments: bytes, streams: Streams, scratch: str) -> Tuple[subprocess.Popen[bytes], int]:
    """The process, and where its words at STATUS_FD can be read.

    It is started by the main thread: a sandbox that dies with its parent dies with the *thread* that started it.
    """
    given = _unnamed(os.path.join(scratch, "arguments"), arguments)
    reader, writer = os.pipe()
    opened = [given, writer]
    try:
        os.dup2(given, ARGUMENTS_FD)
        os.dup2(writer, STATUS_FD)
        opened += [ARGUMENTS_FD, STATUS_FD]
        stdin = _open(streams.stdin, os.O_RDONLY)
        opened.append(stdin)
        stdout = _open(streams.stdout, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        opened.append(stdout)
        stderr = _open(streams.stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        opened.append(stderr)
        process = subprocess.Popen(
            argv,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd="/",
            env={},
            pass_fds=(ARGUMENTS_FD, STATUS_FD),
        )
    except OSError as error:
        os.close(reader)
        raise Refused(f"{argv[0]} cannot be started: {error.strerror}.") from error
    except BaseException:
        os.close(reader)
        raise
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return process, reader


def _unnamed(path: str, data: bytes) -> int:
    """A descriptor that reads `data`, and that nothing else leads to."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(path)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _wait(
    process: subprocess.Popen[bytes], step: Step, streams: Streams, tail_bytes: int, places: Places, stop: Stop
) -> None:
    sizes: Tuple[int, int] = (0, 0)
    due = time.monotonic() + _TAILS_INTERVAL_S
    while process.poll() is None:
        stop.wait(_TAILS_INTERVAL_S)
        if time.monotonic() >= due:
            due = time.monotonic() + _TAILS_INTERVAL_S
            now = (_size(streams.stdout), _size(streams.stderr))
            if now != sizes:
                sizes = now
                _write_tails(places.tails, step.number, streams, tail_bytes)


def _write_tails(path: str, index: int, streams: Streams, tail_bytes: int) -> None:
    """The streams so far, for whoever looks while the step runs."""
    tails = {"index": index, "stdout": tail(streams.stdout, tail_bytes), "stderr": tail(streams.stderr, tail_bytes)}
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
    return Streams(stdin, file_for(step.stdout, "stdout"), file_for(step.stderr, "stderr"))


def _open(path: str, flags: int) -> int:
    # Not through a link (`resolve` followed them all), and never waiting for the other end of a FIFO.
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    mode = os.fstat(descriptor).st_mode
    if path != os.devnull and not stat.S_ISREG(mode):
        os.close(descriptor)
        raise Refused(f"{path} is to take or give a stream, and is not a regular file.")
    os.set_blocking(descriptor, True)
    return descriptor


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _read_all(descriptor: int) -> bytes:
    """What has been written to a pipe whose other end is closed, or is held open by something that lives on."""
    os.set_blocking(descriptor, False)
    try:
        return os.read(descriptor, _STATUS_BYTES)
    except BlockingIOError:
        return b""
    finally:
        os.close(descriptor)
