"""Jobs on this machine: each runner is a process of a session of its own, which outlives the service."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from tesapi.backends.base import Capacity, Condition, LogTails, Need, images_of
from tesapi.backends.runners import Runner, Runners
from tesapi.backends.runtimes import RuntimeProbe
from tesapi.backends.slots import Slots
from tesapi.errors import BackendUnavailable, JobLost
from tesapi.jobs.plan import Job
from tesapi.runner.guard import living
from tesapi.runner.job import Places
from tesapi.tes.events import Handle, JobEnded, OutputStored, RunnerEvent, parse_line

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)

_FIRST_LOOK_S = 0.02
_SLOWEST_LOOK_S = 0.5
_MOST_BYTES = 4 << 20  # of a report at once; a line is never that long
_EXIT_PATIENCE_S = 5.0
_CANCEL_PATIENCE_S = 10.0
_FIRST_RESTART_S = 0.2
_SLOWEST_RESTART_S = 30.0


class LocalBackend:
    """Runs jobs below `directory`, which belongs to one store and to this machine."""

    def __init__(self, directory: Path, capacity: Capacity, probe: RuntimeProbe) -> None:
        self._directory = directory
        self._capacity = capacity
        self._probe = probe
        self._slots = Slots(capacity)
        self._starter = Runners(directory)
        self._runners: dict[str, Runner] = {}
        self._launching: set[str] = set()
        self._canceling: dict[str, float] = {}
        self._since = datetime.now(UTC)
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="local-backend")

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    @property
    def images(self) -> Sequence[str] | None:
        return images_of(self._probe.found)

    async def __aenter__(self) -> Self:
        try:
            await self._in_thread(self._directory.mkdir, 0o700, True, True)
        except OSError as error:
            raise BackendUnavailable(f"{self._directory} cannot be made: {error.strerror}.") from error
        await self._in_thread(self._probe.look)
        self._since = datetime.now(UTC)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=True)
        self._starter.close()
        for runner in self._runners.values():
            runner.leave()

    def condition(self) -> Condition:
        running, waiting, limits = self._slots.running, self._slots.waiting, self._capacity
        if self._probe.found is None:
            return Condition(False, self._probe.sentence, "misconfigured", self._since, running, waiting)
        sentence = (
            f"{self._probe.sentence} {running} jobs run and {waiting} wait; at most "
            f"{limits.max_jobs} jobs, {limits.cpu_cores} CPU cores and {limits.ram_gb:.1f} GB of memory."
        )
        return Condition(True, sentence, "up", self._since, running, waiting)

    async def runtime(self) -> Mapping[str, object]:
        if self._probe.found is None:
            await self._in_thread(self._probe.look)
            self._since = datetime.now(UTC)
        if self._probe.found is None:
            raise BackendUnavailable(self._probe.sentence)
        return self._probe.found

    def address(self, job_id: str) -> Handle:
        return {"directory": str(self._directory / job_id)}

    async def prepare(self, job: Job) -> Handle:
        directory = self._directory / job.job_id
        try:
            await self._in_thread(_make_place, directory, job)
        except OSError as error:
            raise BackendUnavailable(f"The job's place {directory} cannot be made: {error.strerror}.") from error
        return self.address(job.job_id)

    async def start(self, handle: Handle, job: Job) -> None:
        places = self._places(handle)
        need = Need(job.cpu_cores, job.ram_gb)
        if living(places.started) is not None:
            self._slots.occupy(job.job_id, need)
            return
        if _has_ended(places):
            return
        if not Path(places.cancelled).exists():  # finding out that it is canceled takes no room
            await self._slots.take(job.job_id, need)
        await self._launch(places)

    async def resume(self, handle: Handle, need: Need) -> None:
        places = self._places(handle)
        if living(places.started) is not None:
            self._slots.occupy(_job_id(places), need)

    async def follow(self, handle: Handle) -> AsyncIterator[Sequence[RunnerEvent]]:
        places = self._places(handle)
        job_id = _job_id(places)
        position, look_s, restart_s = 0, _FIRST_LOOK_S, _FIRST_RESTART_S
        while True:
            alive = self._runner_lives(places)
            events, position = _read_events(places, position)
            if events:
                # Outputs come one by one, and each look costs a write of all of them: they are let gather.
                gather = all(isinstance(event, OutputStored) for event in events)
                look_s = _SLOWEST_LOOK_S if gather else _FIRST_LOOK_S
                if isinstance(events[-1], JobEnded):
                    self._slots.release(job_id)  # the next job need not wait until this end is stored
                yield events
            if events and isinstance(events[-1], JobEnded):
                await self._see_off(places, job_id)
                return
            if not alive:
                # Its watchdog reports the end; if that is gone too, a second start does.
                await asyncio.sleep(restart_s)
                restart_s = min(restart_s * 2, _SLOWEST_RESTART_S)
                if not _has_more(places, position):
                    await self._launch(places)
                continue
            await self._news(places, look_s)
            look_s = min(look_s * 1.5, _SLOWEST_LOOK_S)

    async def tails(self, handle: Handle) -> LogTails | None:
        try:
            text = await self._in_thread(Path(self._places(handle).tails).read_bytes)
        except (OSError, JobLost):
            return None
        tails = json.loads(text)
        return LogTails(tails["index"], tails["stdout"], tails["stderr"])

    async def cancel(self, handle: Handle) -> None:
        try:
            places = self._places(handle)
            Path(places.cancelled).touch(0o600)  # empty: a name also fits on a disk that is full
        except (JobLost, FileNotFoundError):
            return
        except OSError as error:
            raise BackendUnavailable(f"The job cannot be told to end: {error.strerror}.") from error
        job_id = _job_id(places)
        self._slots.hurry(job_id)
        since = self._canceling.setdefault(job_id, time.monotonic())
        # A runner that does not obey is killed: its watchdog then ends the sandbox, and reports the end.
        patient = time.monotonic() - since < _CANCEL_PATIENCE_S
        _signal(places, signal.SIGTERM if patient else signal.SIGKILL)

    async def discard(self, handle: Handle) -> None:
        job_id = Path(handle["directory"]).name
        self._slots.release(job_id)  # also where the place is gone
        self._canceling.pop(job_id, None)
        with contextlib.suppress(JobLost):
            places = self._places(handle)
            try:
                await self._in_thread(_remove_tree, Path(places.directory))
            except OSError as error:
                raise BackendUnavailable(f"{places.directory} cannot be removed: {error.strerror}.") from error

    def _places(self, handle: Handle) -> Places:
        """The job's places. Raises JobLost where there are none, and for a handle of another store or machine."""
        directory = Path(handle["directory"])
        if directory.parent != self._directory:
            raise JobLost(f"{directory} is not a job's place of this server ({self._directory}).")
        if not directory.is_dir():
            raise JobLost(f"The job's place {directory} is gone, and with it how the job ended.")
        return Places(str(directory / "inputs" / "job.json"))

    async def _launch(self, places: Places) -> None:
        """Start a runner, unless one is known to live or is just being started."""
        if not Path(places.directory).is_dir():
            raise JobLost(f"The job's place {places.directory} is gone, and with it how the job ended.")
        job_id = _job_id(places)
        if job_id in self._launching or self._runner_lives(places):
            return
        self._launching.add(job_id)
        try:
            kind = str((self._probe.found or {}).get("kind", ""))
            self._runners[job_id] = await self._in_thread(self._starter.start, places, kind)
        except OSError as error:
            raise BackendUnavailable(f"The runner cannot be started: {error.strerror}.") from error
        finally:
            self._launching.discard(job_id)

    def _runner_lives(self, places: Places) -> bool:
        """Whether a process that runs the job is known to live; a child that has ended is reaped."""
        runner = self._runners.get(_job_id(places))
        if runner is not None and runner.lives():
            return True
        return living(places.started) is not None

    async def _news(self, places: Places, timeout_s: float) -> None:
        """Wait for the end of the runner's process, at most `timeout_s`."""
        runner = self._runners.get(_job_id(places))
        pid = runner.pid if runner is not None and runner.lives() else living(places.started)
        if pid is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await _exit_of(pid)

    async def _see_off(self, places: Places, job_id: str) -> None:
        """The job has ended: see its runner's process gone."""
        self._canceling.pop(job_id, None)
        runner = self._runners.get(job_id)
        if runner is not None and runner.lives():
            await self._news(places, _EXIT_PATIENCE_S)
        if runner is not None and not runner.lives():
            self._runners.pop(job_id, None)

    async def _in_thread(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: call(*args, **kwargs))


def _job_id(places: Places) -> str:
    return Path(places.directory).name


def _make_place(directory: Path, job: Job) -> None:
    inputs = directory / "inputs"
    directory.mkdir(mode=0o700, exist_ok=True)
    inputs.mkdir(mode=0o700, exist_ok=True)
    files = {"runner.py": job.runner.encode("ascii"), "job.json": job.document.encode("ascii")}
    for name, data in files.items():
        partial = inputs / f"{name}.new"
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
        partial.replace(inputs / name)


def _signal(places: Places, number: signal.Signals) -> None:
    pid = living(places.started)
    # Only to be quicker: the runner looks for the mark itself, also where Python or the kernel has no pidfd.
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.pidfd_open(pid or 0)
        try:
            # Asked again when the descriptor was taken: from then on the number cannot mean another process.
            if pid is not None and living(places.started) == pid:
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)


async def _exit_of(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    except (OSError, AttributeError):  # an older kernel, or a Python built for one: whoever waits looks now and then
        await asyncio.Event().wait()
        return
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(descriptor, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _read_events(places: Places, position: int) -> tuple[list[RunnerEvent], int]:
    """The whole lines behind `position`, and where they end."""
    try:
        with open(places.report, "rb") as file:  # noqa: PTH123 - the runner's places are text
            file.seek(position)
            data = file.read(_MOST_BYTES)
    except FileNotFoundError:
        return [], position
    whole = data[: data.rfind(b"\n") + 1]
    try:
        return [parse_line(line) for line in whole.splitlines()], position + len(whole)
    except ValueError as error:
        raise JobLost(f"The report {places.report} cannot be read: {error}") from error


def _has_ended(places: Places) -> bool:
    position = 0
    with contextlib.suppress(JobLost):  # `follow` tells
        while True:
            events, position = _read_events(places, position)
            if not events:
                break
            if isinstance(events[-1], JobEnded):
                return True
    return False


def _has_more(places: Places, position: int) -> bool:
    try:
        return Path(places.report).stat().st_size > position
    except OSError:
        return False


def _remove_tree(directory: Path) -> None:
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        return
    except (PermissionError, RecursionError):
        # A task may close its own folders, or nest them deeper than Python goes.
        subprocess.run(["/bin/chmod", "-R", "u+rwX", "--", str(directory)], check=False, capture_output=True)
        subprocess.run(["/bin/rm", "-rf", "--", str(directory)], check=False, capture_output=True)
        if directory.exists():
            shutil.rmtree(directory)  # says why not
