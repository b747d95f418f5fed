"""Jobs on a Pulsar over REST.

The job's place is Pulsar's job folder: the runner and its document in `inputs/`, its report in `metadata/`. What is
true of a job is what its report says. Pulsar's own status tells that the runner has ended, or never began; after a
restart of Pulsar it says `running` for ever, and nobody minds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from tesapi import __version__
from tesapi.backends.base import Capacity, Condition, LogTails, Need, images_of
from tesapi.backends.health import Health, Standing
from tesapi.backends.pulsar_helpers import NOT_BEGUN, Helpers, HelperSilent, RollCalls
from tesapi.backends.pulsar_jobs import ProbeNote, PulsarOptions, ended, probe_level, why_not_run
from tesapi.backends.pulsar_wire import (
    CONNECTIONS,
    JobStatus,
    NotLetIn,
    PulsarRefused,
    PulsarServer,
    shown_url,
    too_old,
)
from tesapi.backends.rounds import Rounds
from tesapi.errors import BackendUnavailable, JobLost
from tesapi.jobs.plan import Job
from tesapi.tes.events import Handle, JobEnded, Outcome, RunnerEvent, parse_line

_log = logging.getLogger(__name__)

_FIRST_LOOK_S = 0.03
_LOOKS_PER_S = 100.0  # at jobs that were started just now, all together
_CALM_LOOKS_PER_S = 20.0  # at all others
_YOUNG_S = 1.0
_FIRST_LOOK_BESIDE_UPDATES_S = 1.0
_CALM_LOOK_BESIDE_UPDATES_S = 30.0
_SLOWEST_LOOK_BESIDE_UPDATES_S = 900.0
_LOOKS_BESIDE_UPDATES_PER_S = 2.0
_STATUS_EVERY = 8
_WATCHED_S = 10.0
_WATCHED_LOOK_S = 1.0
_TAILS_AGE_S = 2.0
_CANCEL_LOOK_S = 0.3
_KILL_AFTER_S = 10.0
_OVER_GRACE_S = 1.0
_WATCHDOG_S = 10.0
_ASK_AFTER_S = 900.0
_AFTER_END_S = 5.0
_REMOVAL_S = 10.0
_LAUNCH_S = 0.5
_HEALTHY_S = 15.0
_LOST_AFTER_S = 30.0
_WAITS_LONG_S = 3600.0
_PROBE_AGAIN_S = 60.0
_CALL_AGAIN_S = 30.0


@dataclass(eq=False, slots=True)
class _Followed:
    """A job that somebody follows, and what is known of it."""

    job_id: str
    document: str
    since: float
    quiet_since: float
    followers: set[asyncio.Queue[Sequence[RunnerEvent] | JobLost]] = field(default_factory=set)
    events: list[RunnerEvent] = field(default_factory=list)
    parsed: int = 0
    looks: int = 0
    runs: bool = False
    outages: int = 0
    again: bool = False
    passed_since: float | None = None
    watched_until: float = 0.0
    over_since: float | None = None
    gone_since: float | None = None
    called: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether the end has been told."""
        return bool(self.events) and isinstance(self.events[-1], JobEnded)


class Updates(Protocol):
    """Where Pulsar tells by itself how its jobs are, so that they need not be polled while it is `hearing`."""

    @property
    def hearing(self) -> bool: ...

    @property
    def sentence(self) -> str: ...

    async def run(self, hear: Callable[[str, JobStatus], None], catch_up: Callable[[], None]) -> None: ...


class PulsarRestBackend:
    """Runs jobs on one manager of one Pulsar; with `updates`, they are polled only while those do not come."""

    def __init__(
        self,
        server: PulsarServer,
        health: Health,
        capacity: Capacity,
        options: PulsarOptions,
        updates: Updates | None = None,
    ) -> None:
        self._server = server
        self._health = health
        self._updates = updates
        self._capacity = capacity
        self._options = options
        self._rounds = Rounds(self._look, CONNECTIONS)
        self._helpers = Helpers(server, health, options)
        self._calls = RollCalls(self._helpers, self._came_of_roll_call)
        self._jobs: dict[str, _Followed] = {}
        self._canceling: dict[str, float] = {}
        self._set_up: set[str] = set()
        self._submitted: dict[str, tuple[float, int]] = {}  # when, and after how many outages
        self._begun_until = float("-inf")  # what was submitted until then has left Pulsar's queue, or was lost
        self._in_a_batch_system = False
        self._tails: dict[str, tuple[float, LogTails | None]] = {}
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        about = (__version__, shown_url(server.address.url), server.address.manager, options.python, options.runtime)
        self._probe_note = ProbeNote(options.notes, about)
        self._probed = False
        self._told = Standing.STARTING
        self._found: Mapping[str, object] | None = None
        self._runtime_sentence = "It has not been found out yet which container runtime works there."
        self._stack = contextlib.AsyncExitStack()

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    @property
    def images(self) -> Sequence[str] | None:
        return images_of(self._found)

    async def __aenter__(self) -> Self:
        if (answer := self._probe_note.read()) is not None:
            self._take_answer(answer)
            self._runtime_sentence += " So it was when this was last asked; it is being asked again."
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(self._helpers)
            await stack.enter_async_context(self._server)
            children = await stack.enter_async_context(asyncio.TaskGroup())
            self._children = children
            works = [self._rounds.run(), self._calls.run(), self._watch_health()]
            if self._updates is not None:
                works.append(self._updates.run(self._hear, self._catch_up))
            for work in works:
                stack.callback(children.create_task(work).cancel)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    # What a destination is.

    def condition(self) -> Condition:
        health, running = self._health, len(self._jobs)
        if health.up and self._found is None:
            return Condition(False, self._runtime_sentence, Standing.STARTING, health.since, running, 0)
        sentence = f"{health.reason} {self._runtime_sentence}" if health.up else health.reason
        if health.up and self._updates is not None:
            sentence = f"{sentence} {self._updates.sentence}"
        return Condition(health.up, sentence, health.standing, health.since, running, 0)

    async def runtime(self) -> Mapping[str, object]:
        if self._found is None:
            raise BackendUnavailable(self._runtime_sentence if self._health.up else self._health.reason)
        return self._found

    async def _watch_health(self) -> None:
        """Ask Pulsar how it is, now and then, and more often while it does not answer."""
        failures, probed = 0, float("-inf")
        while True:
            came_back = await self._ask_how_it_is()
            if self._health.up:
                with contextlib.suppress(BackendUnavailable):
                    await self._helpers.remove_forgotten()
            if came_back and self._health.outages:
                self._call([job for job in self._jobs.values() if job.events], over=False)
            wanted = self._health.up and not self._probed and time.monotonic() - probed > _PROBE_AGAIN_S
            if wanted and await self._probe():
                probed = time.monotonic()
            failures = 0 if self._health.up else failures + 1
            delay_s = _HEALTHY_S if self._health.up else min(0.5 * 2.0 ** min(failures, 10), 10.0)
            if self._health.up and self._found is None:
                delay_s = 2.0
            await asyncio.sleep(delay_s * random.uniform(0.8, 1.0))  # noqa: S311

    async def _ask_how_it_is(self) -> bool:
        """Whether it is up just now and was not before."""
        before, name = self._health.up, self._server.address.name
        try:
            version = await self._server.version()
        except NotLetIn as error:
            self._health.stand(Standing.MISCONFIGURED, str(error))
        except PulsarRefused as error:
            manager = self._server.address.manager
            reason = f"{name} has no manager {manager!r}, or is no Pulsar" if manager else f"{name} is no Pulsar"
            self._health.stand(Standing.MISCONFIGURED, f"{reason}: {error}.")
        except BackendUnavailable as error:
            self._health.stand(Standing.DOWN, str(error))
        else:
            if too_old(version):
                self._health.stand(Standing.MISCONFIGURED, f"{name} is a Pulsar {version}; 0.15 is the oldest.")
            else:
                self._health.stand(Standing.UP, f"Pulsar {version} answers.")
        if self._health.standing is not self._told:  # it may also have been found down by a job's request
            self._told = self._health.standing
            _log.log(logging.INFO if self._health.up else logging.WARNING, "%s: %s", name, self._health.reason)
        return self._health.up and not before

    async def _probe(self) -> bool:
        """Find out with a job of our own which container runtime works there; whether that job came to an end."""
        name = self._server.address.name
        try:
            answer: Mapping[str, object] = await self._helpers.run("probe", "--probe", self._options.runtime)
        except PulsarRefused as error:
            sentence = (
                f"{name} refuses a job of ours ({error}); with tool_config_files in its app.yml a Pulsar runs "
                "nothing but Galaxy's tools."
            )
            answer = {"found": None, "sentence": sentence}
        except BackendUnavailable as error:
            sentence = f"It could not be found out which container runtime works: {error}"
            if self._found is None:
                self._runtime_sentence = sentence
            _log.warning("%s: %s", name, sentence)
            return isinstance(error, HelperSilent)
        self._take_answer(answer)
        self._probed = self._found is not None
        self._probe_note.write(answer)
        _log.log(probe_level(answer), "%s: %s", name, self._runtime_sentence)
        return True

    def _take_answer(self, answer: Mapping[str, object]) -> None:
        found = answer.get("found")
        self._found = found if isinstance(found, Mapping) else None
        self._runtime_sentence = str(answer.get("sentence"))
        self._in_a_batch_system = bool(answer.get("batch"))

    # A job's way there.

    def address(self, job_id: str) -> Handle:
        return {"job_id": job_id, "directory": ""}  # with `assign_ids: uuid` it has another id, which nobody knows

    async def prepare(self, job: Job) -> Handle:
        self._require_up()
        try:
            place = await self._server.set_up(job.job_id)
        except PulsarRefused as error:
            raise BackendUnavailable(f"{self._server.address.name} does not set jobs up: {error}.") from error
        self._set_up.add(place.job_id)
        return {"job_id": place.job_id, "directory": place.directory}

    async def start(self, handle: Handle, job: Job) -> None:
        self._require_up()
        job_id = handle["job_id"]
        lock = self._locks.setdefault(job_id, asyncio.Lock())
        async with lock:
            if job_id in self._canceling or (job_id not in self._set_up and await self._was_submitted(job_id)):
                return
            try:
                files = {"runner.py": job.runner, "job.json": job.document}
                uploads = [self._server.upload(job_id, "input", n, text.encode("ascii")) for n, text in files.items()]
                await asyncio.gather(*uploads)
                self._set_up.discard(job_id)  # if no answer comes, Pulsar is to be asked what has become of it
                if job_id in self._canceling:
                    return
                self._submitted[job_id] = (time.monotonic(), self._health.outages)
                await self._server.submit(job_id, self._helpers.command(handle["directory"], "job.json"))
            except PulsarRefused as error:
                raise BackendUnavailable(f"{self._server.address.name} does not take the job: {error}.") from error
        self._rounds.hurry(job_id, self._first_look_s())

    async def _was_submitted(self, job_id: str) -> bool:
        status = await self._server.status_if_told(job_id)
        if status is not None and status.gone:
            raise JobLost(f"{self._server.address.name} has no trace of the job {job_id}, and so of how it ended.")
        return status is None or status.status != "preprocessing"

    async def resume(self, handle: Handle, need: Need) -> None:
        return

    def _require_up(self) -> None:
        if self._health.standing in (Standing.DOWN, Standing.MISCONFIGURED):
            raise BackendUnavailable(self._health.reason)

    # Following it.

    async def follow(self, handle: Handle) -> AsyncIterator[Sequence[RunnerEvent]]:
        job_id = handle["job_id"]
        job = self._jobs.get(job_id)
        if job is None:
            now = time.monotonic()
            document = f"{handle['directory']}/inputs/job.json"
            job = self._jobs[job_id] = _Followed(
                job_id, document, since=now, quiet_since=now, outages=self._health.outages
            )
        news: asyncio.Queue[Sequence[RunnerEvent] | JobLost] = asyncio.Queue()
        job.followers.add(news)
        if job.events:
            news.put_nowait(list(job.events))
        self._rounds.hurry(job_id, self._first_look_s())
        try:
            while True:
                events = await news.get()
                if isinstance(events, JobLost):
                    raise events
                yield events
                if isinstance(events[-1], JobEnded):
                    return
        finally:
            job.followers.discard(news)
            if not job.followers and self._jobs.get(job_id) is job:
                del self._jobs[job_id]

    def _hear(self, job_id: str, status: JobStatus) -> None:
        """Pulsar says by itself that something has become of a job: look at it."""
        job = self._jobs.get(job_id)
        if job is not None and not job.ended:
            job.looks = -1  # at its status and at its report
            self._rounds.hurry(job_id)

    def _catch_up(self) -> None:
        """Updates come again, and some may have been missed."""
        for job_id, job in self._jobs.items():
            job.looks = -1  # at its status and at its report
            self._rounds.hurry(job_id, random.uniform(0, len(self._jobs) / _CALM_LOOKS_PER_S))  # noqa: S311

    @property
    def _hearing(self) -> bool:
        return self._updates is not None and self._updates.hearing

    def _first_look_s(self) -> float:
        if self._hearing:
            return _FIRST_LOOK_BESIDE_UPDATES_S
        young = sum(1 for job in self._jobs.values() if time.monotonic() - job.quiet_since < _YOUNG_S)
        return max(_FIRST_LOOK_S, young / _LOOKS_PER_S)

    def _interval_s(self, job: _Followed) -> float:
        """How long to leave a job alone: shorter while things happen to it, longer in a crowd."""
        now = time.monotonic()
        quiet = now - job.quiet_since
        if job.job_id in self._canceling or job.over_since is not None:
            return max(_CANCEL_LOOK_S, len(self._canceling) / _LOOKS_PER_S)
        if self._hearing:
            # What begins and what ends is told; until the runner has told something itself there is more to come.
            first, per_s = _FIRST_LOOK_BESIDE_UPDATES_S, _CALM_LOOKS_PER_S
            if job.events:
                first, per_s = _CALM_LOOK_BESIDE_UPDATES_S, _LOOKS_BESIDE_UPDATES_PER_S
            calm = max(min(max(quiet, first), _SLOWEST_LOOK_BESIDE_UPDATES_S), len(self._jobs) / per_s)
            return min(calm, _WATCHED_LOOK_S) if now < job.watched_until else calm
        if quiet < _YOUNG_S:
            return max(self._first_look_s(), quiet * 0.1)
        calm = max(min(quiet * 0.1, self._options.poll_interval_s), len(self._jobs) / _CALM_LOOKS_PER_S)
        return min(calm, _WATCHED_LOOK_S) if now < job.watched_until else calm

    async def _look(self, job_id: str) -> float | None:
        job = self._jobs.get(job_id)
        if job is None:
            return None
        if not self._health.up:
            await self._health.wait_until_up()
        job.looks += 1
        try:
            await self._get_news(job)
        except BackendUnavailable:
            return 1.0
        except ValueError as error:
            self._give_up(job, f"The report of the job {job_id} cannot be read: {error}")
        return None if job.ended or self._jobs.get(job_id) is not job else self._interval_s(job)

    async def _get_news(self, job: _Followed) -> None:
        now = time.monotonic()
        status: JobStatus | None = None
        report: bytes | None = None
        # A job that has not begun has no report, which Pulsar would complain of in its log, with each question.
        if (
            not job.runs
            or job.over_since is not None
            or job.looks % _STATUS_EVERY == 0
            or self._hearing  # and so looks seldom
            or job.job_id in self._canceling
        ):
            status = await self._server.status_if_told(job.job_id)
            if status is not None and status.gone:
                self._is_gone(job)
                return
            job.gone_since = None
            if not job.runs and (status is None or status.status not in NOT_BEGUN):
                job.runs = True
                self._begun_until = max(self._begun_until, self._submitted_at(job.job_id))
            if status is not None and status.over:
                job.over_since = job.over_since or now
                report = _whole(status.stdout)
        if report is None and (job.runs or job.looks % _STATUS_EVERY == 0):
            report = await self._server.metadata(job.job_id, "report.jsonl")
        if report is not None:
            self._take(job, report)
        if not job.ended:
            await self._without_an_end(job, status)

    def _take(self, job: _Followed, report: bytes) -> None:
        """Tell the followers what is new in the report."""
        whole = report[: report.rfind(b"\n") + 1]
        if len(whole) <= job.parsed:
            return
        events: list[RunnerEvent] = [parse_line(line) for line in whole[job.parsed :].splitlines()]
        job.parsed = len(whole)
        self._tell(job, events)

    def _tell(self, job: _Followed, events: list[RunnerEvent]) -> None:
        if isinstance(events[-1], JobEnded) and self._outlived(job):
            events[-1] = ended(events[-1].seq, Outcome.SYSTEM_ERROR, self._options.limit_sentence)
        job.events += events
        job.quiet_since = time.monotonic()
        for news in job.followers:
            news.put_nowait(events)

    def _is_gone(self, job: _Followed) -> None:
        """Pulsar sees no folder of the job. A file system that is away may come back."""
        job.gone_since = job.gone_since or time.monotonic()
        if time.monotonic() - job.gone_since >= self._options.gone_s:
            name = self._server.address.name
            self._give_up(job, f"{name} has no trace of the job {job.job_id} any more, and so of how it ended.")

    def _give_up(self, job: _Followed, sentence: str) -> None:
        for news in job.followers:
            news.put_nowait(JobLost(sentence))
        if self._jobs.get(job.job_id) is job:
            del self._jobs[job.job_id]

    async def _without_an_end(self, job: _Followed, status: JobStatus | None) -> None:
        """The report does not tell the end: find out whether anybody is left who will."""
        now = time.monotonic()
        if self._outlived(job):
            await self.cancel({"job_id": job.job_id})
        canceling = self._canceling.get(job.job_id)
        over_for = 0.0 if job.over_since is None else now - job.over_since
        silent = not job.events and (canceling is not None or over_for > _OVER_GRACE_S)
        if silent and await self._server.metadata(job.job_id, "started") is None:
            # A runner that begins from now on finds the mark of the cancel, which was made before: see `cancel`.
            self._tell(job, [self._never_begun(canceling is not None, status)])
            return
        waits = status is not None and status.status in NOT_BEGUN and not job.events and canceling is None
        waits = waits and not self._in_a_batch_system  # there it may wait for days, and Pulsar finds it again
        lost = self._health.outages != job.outages and now - job.since > _LOST_AFTER_S
        if waits and not job.again and (lost or self._was_passed_by(job, now) or now - job.since > _WAITS_LONG_S):
            job.again = True
            self._start_again(job)
        hopeless = over_for > _WATCHDOG_S or (canceling is not None and now - canceling > 2 * _KILL_AFTER_S)
        if hopeless and now - job.called > _CALL_AGAIN_S:
            self._call([job], over=True)
        elif now - max(job.quiet_since, job.called) > _ASK_AFTER_S:
            self._call([job], over=False)

    def _start_again(self, job: _Followed) -> None:
        directory = job.document.removesuffix("/inputs/job.json")
        again = self._helpers.start_again(
            job.job_id, directory, lambda: self._jobs.get(job.job_id) is job, lambda: job.ended
        )
        self._children.create_task(again, name=f"again {job.job_id}")

    def _call(self, jobs: Sequence[_Followed], *, over: bool) -> None:
        """Have someone look after `jobs`; `over` says that Pulsar has done with them."""
        for job in jobs:
            job.called = time.monotonic()
        self._calls.ask((job.document for job in jobs), over=over)

    def _came_of_roll_call(self, document: str) -> None:
        for job in self._jobs.values():
            if job.document == document:
                self._rounds.hurry(job.job_id)

    def _was_passed_by(self, job: _Followed, now: float) -> bool:
        """Whether others have begun for a while that came after it into the queue, which Pulsar takes in turn.

        What an earlier process submitted was submitted before all that this one has.
        """
        if max(self._begun_until, self._helpers.begun_until) > self._submitted_at(job.job_id):
            job.passed_since = job.passed_since or now
        return job.passed_since is not None and now - job.passed_since > _LOST_AFTER_S

    def _submitted_at(self, job_id: str) -> float:
        return self._submitted[job_id][0] if job_id in self._submitted else float("-inf")

    def _never_begun(self, canceled: bool, status: JobStatus | None) -> JobEnded:
        if canceled or (status is not None and status.status == "cancelled"):
            return ended(1, Outcome.CANCELED, None)
        name = self._server.address.name
        reason = f"{name} cannot say how the job ended." if status is None else why_not_run(name, status)
        return ended(1, Outcome.SYSTEM_ERROR, reason)

    def _outlived(self, job: _Followed) -> bool:
        polls = self._options.max_polls
        return polls is not None and time.monotonic() - job.since > polls * self._options.poll_interval_s

    async def tails(self, handle: Handle) -> LogTails | None:
        job_id, now = handle["job_id"], time.monotonic()
        asked, tails = self._tails.get(job_id, (float("-inf"), None))
        if now - asked < _TAILS_AGE_S:
            return tails
        self._require_up()
        text = await self._server.metadata(job_id, "tails.json")
        if text is not None:
            document = json.loads(text)
            tails = LogTails(document["index"], document["stdout"], document["stderr"])
        for old in [old for old, (at, _) in self._tails.items() if now - at > _TAILS_AGE_S]:
            del self._tails[old]
        self._tails[job_id] = (now, tails)
        job = self._jobs.get(job_id)
        if job is not None:
            job.watched_until = now + _WATCHED_S
            self._rounds.hurry(job_id, _WATCHED_LOOK_S)
        return tails

    # Its end.

    async def cancel(self, handle: Handle) -> None:
        self._require_up()
        job_id, now = handle["job_id"], time.monotonic()
        since = self._canceling.setdefault(job_id, now)
        try:
            if not await self._mark(job_id):
                return
            begun = await self._server.metadata(job_id, "started") is not None
            if not begun or now - since > _KILL_AFTER_S:
                # Out of a batch system's queue; or because the runner does not obey. Pulsar kills at once, and what
                # the runner leaves is removed by its watchdog.
                await self._server.cancel(job_id)
        except PulsarRefused as error:
            raise BackendUnavailable(f"{self._server.address.name} does not cancel the job: {error}.") from error
        self._rounds.hurry(job_id)

    async def _mark(self, job_id: str) -> bool:
        """Leave the mark that the runner looks for; whether there is a job to be marked.

        Pulsar makes the same file, with `true` in it; if that were there already, it would kill nothing any more.
        """
        try:
            await self._server.upload(job_id, "jobdir", "cancelled", b"false")
        except (BackendUnavailable, PulsarRefused):
            # An error of its file system looks as if it had gone down.
            status = await self._server.status_if_told(job_id)
            if status is not None and status.gone:
                return False
            raise
        return True

    async def discard(self, handle: Handle) -> None:
        self._require_up()
        job_id = handle["job_id"]
        deadline, delay_s = time.monotonic() + _AFTER_END_S, 0.05
        # A Pulsar that was restarted while it put a job away does so once more, and may be in the midst of it.
        undisturbed = job_id in self._submitted and self._submitted[job_id][1] == self._health.outages
        sure = undisturbed and job_id not in self._canceling
        try:
            while (status := await self._server.status_if_told(job_id)) is not None:
                if status.over or status.status == "preprocessing" or time.monotonic() > deadline:
                    break
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 1.5, 0.5)
            if status is None or not (status.over or status.status == "preprocessing"):
                # Pulsar was restarted while it ran, and would keep it for ever. It forgets a job with this mark, and
                # does not kill what may be another process under the old number by now.
                sure = False
                with contextlib.suppress(PulsarRefused):
                    await self._server.upload(job_id, "jobdir", "cancelled", b"true")
                await self._server.status_if_told(job_id)
            await self._server.delete(job_id)
            if not sure:
                await self._see_it_gone(job_id)
        except PulsarRefused as error:
            raise BackendUnavailable(f"{self._server.address.name} does not remove the job: {error}.") from error
        self._canceling.pop(job_id, None)
        self._submitted.pop(job_id, None)
        self._set_up.discard(job_id)

    async def _see_it_gone(self, job_id: str) -> None:
        """See that a job's folder is gone: one that was canceled while Pulsar launched it may make files for a moment.

        Pulsar says OK also where it could not remove it.
        """
        deadline, delay_s = time.monotonic() + _REMOVAL_S, _LAUNCH_S
        while time.monotonic() < deadline:
            await asyncio.sleep(delay_s)
            status = await self._server.status_if_told(job_id)
            if status is not None and status.gone:
                return
            await self._server.delete(job_id)
            delay_s = min(delay_s * 2, 2.0)
        name = self._server.address.name
        _log.warning("%s could not remove the folder of %s; its own log says why.", name, job_id)


def _whole(stdout: str) -> bytes | None:
    """The report as the runner printed it, if it is all there: Pulsar cuts long ones in the middle."""
    data = stdout.encode("utf-8")
    lines = data.splitlines()
    if not lines or not data.endswith(b"\n"):
        return None
    try:
        first, last = parse_line(lines[0]), parse_line(lines[-1])
    except ValueError:
        return None
    return data if first.seq == 1 and last.seq == len(lines) and isinstance(last, JobEnded) else None
