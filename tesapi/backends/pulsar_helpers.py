"""Jobs of our own on a Pulsar over REST: probes, roll calls, second starts. None is left, whatever dies meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shlex
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

from tesapi import __version__
from tesapi.backends.health import Health
from tesapi.backends.helper_notes import HelperNotes
from tesapi.backends.pulsar_jobs import PulsarOptions, why_not_run
from tesapi.backends.pulsar_wire import JobStatus, PulsarRefused, PulsarServer
from tesapi.errors import BackendUnavailable
from tesapi.jobs.bundle import runner_text

_log = logging.getLogger(__name__)

NOT_BEGUN = ("preprocessing", "queued")
"""What Pulsar says of a job before it is started."""
RAN = ("complete", "failed")
"""What Pulsar says of a job that came to an end by itself."""

_LOOK_S = 2.0
_RUNS_S = 600.0
_WAITS_S = 3600.0
_SET_UP_AFTER_S = 60.0  # so late may Pulsar still do what it was asked for
_CALL_TOGETHER_S = 1.0


class HelperSilent(BackendUnavailable):
    """A job of our own has ended, and has not said what it was to say. The next one would hardly do better."""


class Helpers:
    """Runs the runner at a Pulsar for something else than a task's job. A context manager.

    Each is noted before it is set up, and looked after until it is seen to be gone.
    """

    def __init__(self, server: PulsarServer, health: Health, options: PulsarOptions) -> None:
        self._server = server
        self._health = health
        self._options = options
        self._notes = HelperNotes(options.notes)
        self._busy: set[str] = set()
        self._there: set[str] = set()  # Pulsar has set them up: when they are gone, they stay so
        self.begun_until = float("-inf")
        """When that one was submitted, by the monotonic clock, that has begun and was submitted last."""

    def __enter__(self) -> Self:
        self._notes.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._notes.__exit__(kind, error, trace)

    async def run(self, purpose: str, option: str, given: object) -> Mapping[str, object]:
        """Run the runner with an option and a document; the line of JSON that it prints.

        Raises BackendUnavailable where there is none, with the reason, and PulsarRefused.
        """
        job_id = self._noted(purpose)
        there, status = "", JobStatus("")
        try:
            place = await self._server.set_up(job_id)
            there = place.job_id
            self._there.add(job_id)
            await self._server.upload(there, "input", "runner.py", runner_text(__version__).encode("ascii"))
            await self._server.upload(there, "input", "given.json", json.dumps(given).encode("ascii"))
            submitted = time.monotonic()
            await self._server.submit(there, self.command(place.directory, option, "given.json"))
            status = await self._end_of(there)
            if status.status in RAN:
                self.begun_until = max(self.begun_until, submitted)
        finally:
            self._busy.discard(job_id)  # what may be left of it now is found by `remove_forgotten`
            if there:
                with contextlib.suppress(BackendUnavailable, PulsarRefused):
                    await asyncio.shield(self._remove(there, over=status.over))
        try:
            answer = json.loads(status.stdout.splitlines()[-1])
        except (ValueError, IndexError):
            answer = None
        if not isinstance(answer, dict):
            # One that was killed, or lost in a restart of Pulsar, may be worth another try at once.
            raise (HelperSilent if status.status in RAN else BackendUnavailable)(
                why_not_run(self._server.address.name, status)
            )
        return answer

    async def start_again(
        self, job_id: str, directory: str, is_followed: Callable[[], bool], has_ended: Callable[[], bool]
    ) -> None:
        """Have the runner of a task's job in `directory` started once more, where Pulsar has lost it before its start.

        It runs once however often it is started, and both tell the same.
        """
        helper = self._noted("again", job_id)
        _log.warning("%s seems to have lost %s before its start; starting it again.", self._server.address.name, job_id)
        over = False
        with contextlib.suppress(BackendUnavailable, PulsarRefused):
            place = await self._server.set_up(helper)
            self._there.add(helper)
            await self._server.submit(place.job_id, self.command(directory, "job.json"))
            while not over and not has_ended() and is_followed():
                await asyncio.sleep(_LOOK_S)
                over = (await self._server.status(place.job_id)).over
        self._busy.discard(helper)
        if over or has_ended():
            with contextlib.suppress(BackendUnavailable, PulsarRefused):
                await self._remove(helper, over=over)

    async def remove_forgotten(self) -> None:
        """Remove what a process has left because it was killed, or we because Pulsar was away; see to the rest.

        Raises BackendUnavailable.
        """
        self._notes.adopt()
        for helper in self._notes.noted():
            if helper not in self._busy:
                status = await self._server.status_if_told(helper)
                if status is not None and status.gone:
                    if helper in self._there or self._notes.age_s(helper) > _SET_UP_AFTER_S:
                        self._notes.forget(helper)
                        self._there.discard(helper)
                    continue
                if (status is None or not status.over) and await self._is_there(self._notes.text(helper)):
                    continue
                with contextlib.suppress(PulsarRefused):
                    await self._remove(helper, over=False)

    def command(self, directory: str, *words: str) -> str:
        """The command line that runs the runner in a job's folder, on an input of it, perhaps after an option."""
        *options, file = words
        inputs = f"{directory}/inputs"
        argv = [self._options.python, "-I", "-S", "-X", "utf8", f"{inputs}/runner.py", *options, f"{inputs}/{file}"]
        return shlex.join(argv)

    def _noted(self, purpose: str, runs: str = "") -> str:
        """The id of a new one. Only when nothing is left of the job that it `runs`, if any, may it be ended."""
        helper = f"tesapi-{purpose}-{uuid.uuid4()}"
        self._busy.add(helper)
        self._notes.note(helper, runs)
        return helper

    async def _end_of(self, job_id: str) -> JobStatus:
        """Wait for it, and not for ever: what ran while Pulsar was restarted may be `running` from then on."""
        outages, since, last, delay_s = self._health.outages, time.monotonic(), "", 0.1
        while not (status := await self._server.status(job_id)).over:
            if status.status != last:
                since, last = time.monotonic(), status.status
            most_s = _WAITS_S if last in NOT_BEGUN else _RUNS_S
            if self._health.outages != outages or time.monotonic() - since > most_s:
                raise BackendUnavailable(f"{self._server.address.name} has lost a job of ours ({last}).")
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 1.5, 5.0)
        return status

    async def _remove(self, job_id: str, *, over: bool) -> None:
        if not over:
            await self._server.cancel(job_id)  # it may wait in the queue of a batch system
            await self._server.status_if_told(job_id)  # whereupon Pulsar forgets it
        await self._server.delete(job_id)

    async def _is_there(self, job_id: str) -> bool:
        """Whether a job has a folder at the Pulsar, or may have."""
        status = await self._server.status_if_told(job_id) if job_id else None
        return bool(job_id) and (status is None or not status.gone)


class RollCalls:
    """Asks after jobs that may have died without a word: one helper at the destination for many of them.

    `came` is called with the path of each job's document when somebody has looked after it: its report may tell the
    end then.
    """

    def __init__(self, helpers: Helpers, came: Callable[[str], None]) -> None:
        self._helpers = helpers
        self._came = came
        self._asked: dict[str, bool] = {}
        self._wake = asyncio.Event()

    def ask(self, documents: Iterable[str], *, over: bool) -> None:
        """Have someone look after the jobs of `documents`; `over` says that Pulsar has done with them."""
        for document in documents:
            self._asked[document] = over or self._asked.get(document, False)
        if self._asked:
            self._wake.set()

    async def run(self) -> None:
        """Do what is asked for until canceled."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(_CALL_TOGETHER_S)
            self._wake.clear()
            asked, self._asked = self._asked, {}
            calls = [{"document": document, "over": over} for document, over in asked.items()]
            try:
                answer = await self._helpers.run("roll-call", "--roll-call", calls)
            except (BackendUnavailable, PulsarRefused) as error:
                _log.warning("Asking after %d jobs failed: %s", len(calls), error)
                continue
            for note in _list(answer.get("notes")):
                _log.info("Asking after jobs: %s", note)
            for document in asked:
                self._came(document)


def _list(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else []
