"""Jobs on a Pulsar over its message queue.

A set-up message carries the runner and the job's document as texts; what the runner reported comes back with Pulsar's
last word on the job, as its standard output. No file of the job can be read meanwhile, so that before the end there is
only Pulsar's word that it runs. Where Pulsar's last word lacks the runner's, a sweep, which is a job of our own beside
it, waits for whatever is left of the job and brings its report.

Any message may be missing, repeated, late or forged. So each is sent again until it is answered, Pulsar runs a job
once however often it is sent, and what an update says counts only as far as the runner's own report bears it out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import shlex
import time
import uuid
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from tesapi import __version__
from tesapi.backends.base import Capacity, Condition, LogTails, Need, images_of
from tesapi.backends.health import Health, Standing
from tesapi.backends.helper_notes import HelperNotes
from tesapi.backends.pulsar_jobs import (
    JOB_ID,
    ProbeNote,
    PulsarOptions,
    ended,
    probe_level,
    read_report,
    read_update,
    why_not_run,
)
from tesapi.backends.pulsar_queues import LARGEST_MESSAGE_BYTES, BrokerAddress, PulsarQueues, Update
from tesapi.backends.pulsar_wire import JobStatus
from tesapi.backends.rounds import Rounds
from tesapi.errors import BackendUnavailable, JobLost
from tesapi.jobs.bundle import runner_text
from tesapi.jobs.plan import Job
from tesapi.tes.events import Handle, JobEnded, JobSeen, Outcome, RunnerEvent, RunnerLine

_log = logging.getLogger(__name__)

_PLACE = "__PULSAR_JOB_DIRECTORY__"
_LOOKS_AT_ONCE = 16
_FIRST_ASK_S = 3.0
_SLOWEST_ASK_S = 60.0
_FIRST_CALM_ASK_S = 30.0
_SLOWEST_CALM_ASK_S = 900.0
_CALM_ASKS_PER_S = 2.0  # after jobs that are known to run, all together
_ASKS_PER_S = 50.0  # where many have to be asked after at once
_MISSED_EVERY_S = 60.0
_FIRST_KILL_S = 0.2
_SLOWEST_KILL_S = 5.0
_KILL_TO_STATUS_S = 0.1
_SEND_AGAIN_S = 10.0
_ATTACH_EVERY_S = 900.0
_UNANSWERED = 6
_UNANSWERED_S = 300.0
_PARKED_S = 30.0
_MOST_PARKED = 50
_REMEMBERED = 10_000
_GATHER_S = 1.0
_TAKE_OVER_EVERY_S = 60.0
_MOST_AT_ONCE = 200
_MANY = 20
_WITHOUT_RUNTIME_S = 60.0
_TRY_AGAIN_S = 2.0
_SEEN = (
    "Pulsar says that the job runs. It was sent over a message queue: what its executors print, and which of them has "
    "ended, is told when the job has ended."
)


@dataclass(frozen=True, slots=True)
class _News:
    """What followers are to hear; when it has been recorded, the updates that told it may be forgotten."""

    events: Sequence[RunnerEvent]
    updates: Sequence[Update] = ()


@dataclass(eq=False, slots=True)
class _Followed:
    """A job that somebody follows, and what is known of it."""

    job_id: str
    since: float
    heard: bool = False
    changed_at: float = 0.0
    word_at: float = 0.0
    asks: int = 0
    asked_at: float | None = None
    attached_at: float = 0.0
    gone_since: float | None = None
    wants: str = ""
    kills: int = 0
    seen: JobSeen | None = None
    over: JobStatus | None = None
    sweeping: bool = False
    events: list[RunnerLine] = field(default_factory=list)
    followers: set[asyncio.Queue[_News | JobLost]] = field(default_factory=set)

    @property
    def ended(self) -> bool:
        """Whether the end has been told."""
        return bool(self.events) and isinstance(self.events[-1], JobEnded)


@dataclass(eq=False, slots=True)
class _Helper:
    """A job of our own that is waited for."""

    message: Mapping[str, Any]
    sent_at: float
    done: asyncio.Future[JobStatus]
    asks: int = 0


class PulsarAmqpBackend:
    """Runs jobs on one manager of one Pulsar, reached through a broker."""

    def __init__(self, address: BrokerAddress, health: Health, capacity: Capacity, options: PulsarOptions) -> None:
        self._name = address.name
        self._health = health
        self._capacity = capacity
        self._options = options
        self._queues = PulsarQueues(address, health, self._take, self._came_back, self._ask_after_all)
        self._rounds = Rounds(self._look, _LOOKS_AT_ONCE)
        self._notes = HelperNotes(options.notes)
        self._cleaning = _Cleaning(self, self._notes)
        self._jobs: dict[str, _Followed] = {}
        self._helpers: dict[str, _Helper] = {}
        self._sent: dict[str, tuple[Job, float]] = {}
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._resumed: set[str] = set()
        self._canceling: dict[str, float] = {}
        self._over: _Remembered = _Remembered()
        self._discarded: _Remembered = _Remembered()
        self._parked: dict[str, list[tuple[float, Update]]] = {}
        about = (__version__, address.shown, address.queue("setup"), options.python, options.runtime)
        self._probe_note = ProbeNote(options.notes, about)
        self._found: Mapping[str, object] | None = None
        self._runtime_sentence = "It has not been found out yet which container runtime works there."
        self._look_for_runtime = asyncio.Event()
        self._missed_at = float("-inf")
        self._children: asyncio.TaskGroup | None = None
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
            stack.enter_context(self._notes)
            self._cleaning.take_over()
            self._children = await stack.enter_async_context(_Children())
            works = (self._queues.run(), self._rounds.run(), self._cleaning.run(), self._unpark(), self._find_runtime())
            for work in works:
                self._begin(work)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        assert self._children is not None  # noqa: S101 - whoever comes here has entered
        self._children.create_task(work)

    # What a destination is.

    def condition(self) -> Condition:
        health, running = self._health, len(self._jobs)
        if health.up and self._found is None:
            return Condition(False, self._runtime_sentence, Standing.STARTING, health.since, running, 0)
        sentence = f"{health.reason} {self._runtime_sentence}" if health.up else health.reason
        return Condition(health.up, sentence, health.standing, health.since, running, 0)

    async def runtime(self) -> Mapping[str, object]:
        if self._found is None:
            raise BackendUnavailable(self._runtime_sentence if self._health.up else self._health.reason)
        return self._found

    def _came_back(self) -> None:
        """Pulsar can be reached, and could not before: it may have lost jobs, and messages may have been lost."""
        self._look_for_runtime.set()
        for job in self._jobs.values():
            if job.seen is not None or job.heard:
                job.wants = job.wants or "attach"
            self._hurry_in_turn(job)
        for job_id in self._helpers:
            self._rounds.hurry(job_id)

    def _hurry_in_turn(self, job: _Followed) -> None:
        """Look at one of many soon, and not at all of them at once."""
        crowd_s = len(self._jobs) / _ASKS_PER_S
        self._rounds.hurry(job.job_id, random.uniform(0, crowd_s) if crowd_s > 1 else 0.0)  # noqa: S311

    async def _find_runtime(self) -> None:
        """Find out with a job of our own which container runtime works there, as soon as Pulsar can be reached."""
        probed = False
        while not probed:
            await self._look_for_runtime.wait()
            self._look_for_runtime.clear()
            given = json.dumps(self._options.runtime)
            try:
                status = await self._run_helper("probe", self._command("--probe", "given.json"), {"given.json": given})
                answer = _last_line(self._name, status)
            except BackendUnavailable as error:
                sentence = f"It could not be found out which container runtime works: {error}"
                if self._found is None:
                    self._runtime_sentence = sentence
                _log.warning("%s: %s", self._name, sentence)
            else:
                self._take_answer(answer)
                self._probe_note.write(answer)
                probed = self._found is not None
                _log.log(probe_level(answer), "%s: %s", self._name, self._runtime_sentence)
            if not probed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_WITHOUT_RUNTIME_S):
                        await self._look_for_runtime.wait()
                self._look_for_runtime.set()

    def _take_answer(self, answer: Mapping[str, object]) -> None:
        found = answer.get("found")
        self._found = found if isinstance(found, Mapping) else None
        self._runtime_sentence = str(answer.get("sentence"))

    def _require_up(self) -> None:
        if self._health.standing in (Standing.DOWN, Standing.MISCONFIGURED):
            raise BackendUnavailable(self._health.reason)

    # A job's way there.

    def address(self, job_id: str) -> Handle:
        return {"job_id": job_id}

    async def prepare(self, job: Job) -> Handle:
        self._require_up()
        return self.address(job.job_id)

    async def start(self, handle: Handle, job: Job) -> None:
        job_id = handle["job_id"]
        if job_id in self._discarded:
            raise JobLost(f"The job {job_id} was removed from {self._name}.")
        if len(job.document) + len(job.runner) > LARGEST_MESSAGE_BYTES:
            raise JobLost(
                f"The job was never sent: its document takes {len(job.document) >> 20} MiB, which is too much for a "
                f"message to {self._name}; put the contents of inputs into files."
            )
        async with self._locks.setdefault(job_id, asyncio.Lock()):
            if job_id not in self._sent:
                await self._send(job)
        self._rounds.hurry(job_id, _FIRST_ASK_S)

    async def _send(self, job: Job) -> None:
        files = {"runner.py": job.runner, "job.json": job.document}
        message = _set_up(job.job_id, self._command("", "job.json"), files)
        if job.job_id in self._canceling:
            # Whether an earlier process has sent it cannot be known. A job with this mark does nothing but report so.
            message["remote_staging"]["setup"].append(_file("jobdir", "cancelled", "false"))
        await self._queues.publish("setup", message)
        self._sent[job.job_id] = (job, time.monotonic())

    async def resume(self, handle: Handle, need: Need) -> None:
        self._resumed.add(handle["job_id"])

    def _command(self, option: str, file: str, place: str = _PLACE) -> str:
        """A command line for the runner. In quotation marks: what stands for the folder may have blanks in it."""
        words = [shlex.quote(self._options.python), "-I", "-S", "-X", "utf8", f'"{_PLACE}/inputs/runner.py"']
        return " ".join([*words, *([option] if option else []), f'"{place}/inputs/{file}"'])

    async def _run_helper(self, purpose: str, command: str, files: Mapping[str, str]) -> JobStatus:
        """Run the runner for something else than a job; what becomes of it. Raises BackendUnavailable."""
        job_id = f"tesapi-{purpose}-{uuid.uuid4()}"
        message = _set_up(job_id, command, {"runner.py": runner_text(__version__), **files})
        helper = _Helper(message, time.monotonic(), asyncio.get_running_loop().create_future())
        self._helpers[job_id] = helper
        self._notes.note(job_id)
        try:
            await self._queues.publish("setup", message)
            self._rounds.hurry(job_id, _FIRST_ASK_S)
            return await helper.done
        finally:
            del self._helpers[job_id]
            self._over.add(job_id)
            self._cleaning.take_along(job_id)

    # Following it.

    async def follow(self, handle: Handle) -> AsyncIterator[Sequence[RunnerEvent]]:
        job_id = handle["job_id"]
        if job_id in self._discarded:
            raise JobLost(f"The job {job_id} was removed from {self._name}, and with it how it ended.")
        job = self._jobs.get(job_id)
        if job is None:
            job = self._jobs[job_id] = _Followed(job_id, since=time.monotonic(), heard=job_id in self._resumed)
        news: asyncio.Queue[_News | JobLost] = asyncio.Queue()
        job.followers.add(news)
        if job.seen is not None:
            news.put_nowait(_News([job.seen]))
        if job.events:
            news.put_nowait(_News(list(job.events)))
        for _, update in self._parked.pop(job_id, ()):
            if self._take(update):
                await update.settle()
        fresh = job_id in self._sent and job_id not in self._over and job_id not in self._canceling
        self._rounds.hurry(job_id, _FIRST_ASK_S if fresh else 0.0)
        unrecorded: Sequence[Update] = ()
        try:
            while True:
                item = await news.get()
                if isinstance(item, JobLost):
                    raise item
                unrecorded = item.updates
                yield item.events
                unrecorded = ()  # whoever follows comes back for more when it is recorded
                for update in item.updates:
                    await update.settle()
                if isinstance(item.events[-1], JobEnded):
                    return
        finally:
            job.followers.discard(news)
            self._leave(job, unrecorded, news)

    def _leave(self, job: _Followed, unrecorded: Sequence[Update], news: asyncio.Queue[_News | JobLost]) -> None:
        """Somebody does not follow the job any more. What was not recorded is for whoever follows it next."""
        left = list(unrecorded)
        while not news.empty():
            item = news.get_nowait()
            left += item.updates if isinstance(item, _News) else ()
        if not job.followers:
            if self._jobs.get(job.job_id) is job:
                del self._jobs[job.job_id]
            if job.ended:
                self._over.add(job.job_id)
        deadline = time.monotonic() + _PARKED_S
        for update in left:
            self._parked.setdefault(job.job_id, []).append((deadline, update))

    async def tails(self, handle: Handle) -> LogTails | None:
        return None

    # What Pulsar says.

    def _take(self, update: Update) -> bool:
        """Take an update in; whether it is settled thereby."""
        try:
            job_id, status = read_update(update.answer)
        except ValueError as error:
            self._queues.complain(f"update {error}", "an update was thrown away: %s", error)
            return True
        helper, job = self._helpers.get(job_id), self._jobs.get(job_id)
        if helper is not None:
            self._take_of_helper(job_id, helper, status)
            return True
        if job is not None:
            return self._take_of_job(job, status, update)
        if job_id in self._over or job_id in self._discarded or update.copy:
            return True
        if len(self._parked) >= _MOST_PARKED:  # or there would be no room for what is waited for
            return True
        # Somebody may follow it soon, as after a restart.
        self._parked.setdefault(job_id, []).append((time.monotonic() + _PARKED_S, update))
        return False

    def _take_of_helper(self, job_id: str, helper: _Helper, status: JobStatus) -> None:
        if status.over and status.status != "lost":
            if not helper.done.done():
                helper.done.set_result(status)
        elif status.status == "lost" and time.monotonic() - helper.sent_at > _SEND_AGAIN_S:
            helper.sent_at = float("-inf")  # `_look` sends it again
            self._rounds.hurry(job_id)

    def _take_of_job(self, job: _Followed, status: JobStatus, update: Update) -> bool:
        now = time.monotonic()
        if status.over and job.asked_at is not None and job.seen is not None:
            self._may_have_missed_others(job, now)
        job.asked_at, job.word_at = None, now
        if job.ended or job.sweeping:
            return True
        if status.gone:
            self._is_gone(job, now)
            return True
        job.heard, job.gone_since = True, None
        if not status.over:
            return self._runs(job, status, update)
        report = read_report(status.stdout)
        if report and isinstance(report[-1], JobEnded):
            self._tell(job, report, [update])
            return False
        if status.status == "lost":
            # Pulsar was restarted while it ran. The same command attaches to the runner that lives, or asks after it.
            if now - job.attached_at > _SEND_AGAIN_S:
                job.wants = "attach"
                self._rounds.hurry(job.job_id)
            return True
        job.over = status  # which is not kept from being forgotten: whoever follows the job later is told the same
        self._start_sweep(job)
        return True

    def _may_have_missed_others(self, answered: _Followed, now: float) -> None:
        """An end that was told because it was asked for: the update may have been lost, and with it those of others."""
        if answered.job_id in self._canceling or now - self._missed_at < _MISSED_EVERY_S:
            return
        self._missed_at = now
        self._ask_after_all()

    def _ask_after_all(self) -> None:
        """Updates may have been lost."""
        for job in self._jobs.values():
            if not job.ended:
                job.word_at = float("-inf")
                self._hurry_in_turn(job)

    def _runs(self, job: _Followed, status: JobStatus, update: Update) -> bool:
        if status.status != "running" or job.seen is not None:
            return True
        job.seen = JobSeen(datetime.now(UTC), _SEEN)
        job.changed_at = time.monotonic()
        self._put(job, _News([job.seen], [update]))
        return False

    def _is_gone(self, job: _Followed, now: float) -> None:
        """Pulsar has no folder of the job: its set-up message has not been read yet, or is lost, or the folder is."""
        sent = self._sent.get(job.job_id)
        if sent is not None and not job.heard:
            if now - sent[1] > _SEND_AGAIN_S:
                job.wants = "setup"
                self._rounds.hurry(job.job_id)
            return
        if job.gone_since is None:
            job.gone_since = now
            self._rounds.hurry(job.job_id, _FIRST_ASK_S)
        if now - job.gone_since >= self._options.gone_s:
            lost = JobLost(f"{self._name} has no trace of the job {job.job_id} any more, and so of how it ended.")
            for news in job.followers:
                news.put_nowait(lost)

    def _tell(self, job: _Followed, report: Sequence[RunnerLine], updates: Sequence[Update]) -> None:
        """The job has ended; this is its whole report, or stands for it."""
        lines = list(report)
        if self._outlived(job):
            lines[-1] = ended(lines[-1].seq, Outcome.SYSTEM_ERROR, self._options.limit_sentence)
        job.events = lines
        self._put(job, _News(lines, updates))

    def _put(self, job: _Followed, news: _News) -> None:
        for number, follower in enumerate(job.followers):
            follower.put_nowait(news if number == 0 else _News(news.events))

    def _outlived(self, job: _Followed) -> bool:
        longest_s = self._options.longest_s
        return longest_s is not None and time.monotonic() - job.since > longest_s

    # Updates that nobody waits for here.

    async def _unpark(self) -> None:
        """Forget what nobody has come for: whoever follows the job later asks Pulsar."""
        while True:
            await asyncio.sleep(_PARKED_S / 5)
            now = time.monotonic()
            for job_id, parked in list(self._parked.items()):
                if parked[-1][0] < now:
                    del self._parked[job_id]
                    if self._queues.alone:
                        text = "an update on a job that nobody follows (%s) was thrown away"
                        self._queues.complain("unknown", text, job_id)
                    for _, update in parked:
                        await update.settle()

    # Looking after what is under way.

    async def _look(self, job_id: str) -> float | None:
        job, helper = self._jobs.get(job_id), self._helpers.get(job_id)
        try:
            if helper is not None:
                return await self._look_after_helper(job_id, helper)
            if job is not None and not job.ended:
                return await self._look_after_job(job)
        except BackendUnavailable:
            return _TRY_AGAIN_S
        return None

    async def _look_after_helper(self, job_id: str, helper: _Helper) -> float:
        if not self._health.up:
            return _TRY_AGAIN_S
        if helper.sent_at == float("-inf"):
            await self._queues.publish("setup", helper.message)
            helper.sent_at = time.monotonic()
        await self._queues.publish("status", {"request": "status", "job_id": job_id})
        helper.asks += 1
        return min(_FIRST_ASK_S * 1.5**helper.asks, _SLOWEST_ASK_S)

    async def _look_after_job(self, job: _Followed) -> float | None:
        if not self._health.up:
            return _SLOWEST_ASK_S  # messages would only wait, and be answered all at once
        now = time.monotonic()
        if self._outlived(job):
            self._canceling.setdefault(job.job_id, now)
        if job.sweeping:  # which tells the rest; but what it waits for may still live
            return await self._kill(job) if job.job_id in self._canceling else None
        if job.heard and now - max(job.attached_at, job.since) > max(_ATTACH_EVERY_S, self._crowd_s):
            job.wants = job.wants or "attach"
        rest_s = self._rest_s(job, now)
        if rest_s > 0:
            return rest_s
        await self._send_what_it_wants(job)
        if job.job_id in self._canceling:
            await self._kill(job)
            await asyncio.sleep(_KILL_TO_STATUS_S)  # they are read from different queues
        await self._queues.publish("status", {"request": "status", "job_id": job.job_id})
        job.asks = job.asks + 1 if job.asked_at is not None else 0
        job.asked_at = job.asked_at or now
        if job.seen is not None and job.asks > _UNANSWERED and now - job.asked_at > _UNANSWERED_S:
            self._start_sweep(job)  # a byte in a stream that is no text keeps Pulsar from saying anything of the job
            return None
        return self._interval_s(job)

    @property
    def _crowd_s(self) -> float:
        """How long it takes to ask after all jobs calmly."""
        return len(self._jobs) / _CALM_ASKS_PER_S

    def _rest_s(self, job: _Followed, now: float) -> float:
        """How long a job needs not be asked after: one that is known to run tells its end by itself."""
        if job.seen is None or job.wants or job.job_id in self._canceling or job.gone_since is not None:
            return 0.0
        if job.asked_at is not None:  # and has not answered
            return 0.0
        quiet_s = job.word_at - max(job.changed_at, job.since)
        calm_s = max(min(max(quiet_s, _FIRST_CALM_ASK_S), _SLOWEST_CALM_ASK_S), self._crowd_s)
        return job.word_at + calm_s - now

    async def _kill(self, job: _Followed) -> float:
        """Have Pulsar kill the job, if it has it by now; after how long to do so again."""
        await self._queues.publish("kill", {"job_id": job.job_id})
        job.kills += 1
        return min(_FIRST_KILL_S * 1.5**job.kills, _SLOWEST_KILL_S)

    def _interval_s(self, job: _Followed) -> float:
        if job.job_id in self._canceling:
            return min(_FIRST_KILL_S * 1.5**job.kills, _SLOWEST_KILL_S)
        if job.gone_since is not None:
            return _FIRST_ASK_S
        quiet = time.monotonic() - max(job.changed_at, job.since)  # what Pulsar says again is no change
        interval_s = min(max(_FIRST_ASK_S, quiet * 0.3), _SLOWEST_ASK_S)
        return max(interval_s, self._crowd_s) if job.heard and job.asked_at is None else interval_s

    async def _send_what_it_wants(self, job: _Followed) -> None:
        wants, job.wants = job.wants, ""
        try:
            if wants == "attach":
                job.attached_at = job.changed_at = time.monotonic()
            if wants == "attach" and (job.seen is not None or job.job_id not in self._sent):
                # Its files are there. Pulsar ignores the message as long as it knows the job itself.
                await self._queues.publish("setup", _set_up(job.job_id, self._command("", "job.json"), {}))
            elif wants and job.job_id in self._sent:
                await self._send(self._sent[job.job_id][0])
        except BackendUnavailable:
            job.wants = wants
            raise

    def _start_sweep(self, job: _Followed) -> None:
        job.sweeping = True
        self._begin(self._sweep(job))

    async def _sweep(self, job: _Followed) -> None:
        """Have someone look after a job whose runner has not told the end, and tell it."""
        command = self._command("--sweep", "job.json", place=f"{_PLACE}/../{job.job_id}")
        while True:
            try:
                status = await self._run_helper("sweep", command, {})
                break
            except BackendUnavailable as error:
                _log.info("%s: looking after %s failed, and is tried again: %s", self._name, job.job_id, error)
                await asyncio.sleep(_TRY_AGAIN_S)
        report = read_report(status.stdout)
        if report and isinstance(report[-1], JobEnded):
            self._tell(job, report, ())
            return
        told = read_report(job.over.stdout) if job.over is not None else []
        told = report if len(report) > len(told) else told
        self._tell(job, [*told, self._end_without_report(job, len(told), status)], ())

    def _end_without_report(self, job: _Followed, told: int, sweep: JobStatus) -> JobEnded:
        over = job.over or sweep
        if told or over.stdout or sweep.stdout:
            reason = (
                f"{self._name} does not give the end of the job's report; whether anything of it runs is not known."
            )
            return ended(told + 1, Outcome.SYSTEM_ERROR, reason)
        if over.status == "cancelled":
            return ended(1, Outcome.CANCELED, None)
        return ended(1, Outcome.SYSTEM_ERROR, why_not_run(self._name, over))

    # Its end.

    async def cancel(self, handle: Handle) -> None:
        job_id = handle["job_id"]
        if job_id in self._over or job_id in self._discarded:
            return
        if job_id not in self._canceling:
            self._canceling[job_id] = time.monotonic()
            if job_id in self._jobs:
                self._rounds.hurry(job_id)  # from now on it is killed until Pulsar says that it is over
        self._require_up()

    async def discard(self, handle: Handle) -> None:
        job_id = handle["job_id"]
        if job_id not in self._discarded:
            await self._cleaning.remove(job_id)
            self._discarded.add(job_id)
        self._sent.pop(job_id, None)
        self._resumed.discard(job_id)
        self._canceling.pop(job_id, None)

    async def clean(self, job_ids: Sequence[str], done: asyncio.Future[None]) -> None:
        """Have the folders of jobs removed, by a job; `done` is set when the broker has the message."""
        paths = " ".join(f"./{job_id}" for job_id in job_ids)
        # A task may have closed folders of its own. No file is named in the message: the runner is not needed.
        command = f"cd ../.. && {{ rm -rf {paths} || {{ chmod -R u+rwX {paths}; rm -rf {paths}; }}; }} 2>/dev/null"
        janitor = f"tesapi-janitor-{uuid.uuid4()}"
        message = _set_up(janitor, command, {})
        helper = _Helper(message, time.monotonic(), asyncio.get_running_loop().create_future())
        self._helpers[janitor] = helper
        self._notes.note(janitor)
        try:
            try:
                for left in self._cleaning.left_to_us(job_ids):  # it may still wait in the queue of a batch system
                    await self._queues.publish("kill", {"job_id": left})
                await self._queues.publish("setup", message)
            except BackendUnavailable as error:
                if not done.done():
                    done.set_exception(error)
                return
            if not done.done():
                done.set_result(None)
            self._rounds.hurry(janitor, _FIRST_ASK_S)
            status = await helper.done
        finally:
            del self._helpers[janitor]
            self._over.add(janitor)
        self._cleaning.take_along(janitor)
        if status.returncode == 0:
            self._cleaning.forget(job_ids)
        else:
            _log.warning("%s: the folders of %d jobs were not removed: %s", self._name, len(job_ids), status.status)

    def begin_cleaning(self, job_ids: Sequence[str]) -> asyncio.Future[None]:
        """Start to `clean`."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._begin(self.clean(job_ids, done))
        return done


class _Cleaning:
    """Gathers the folders that are to be removed: Pulsar has no message for that, so that each time takes a job."""

    def __init__(self, backend: PulsarAmqpBackend, notes: HelperNotes) -> None:
        self._backend = backend
        self._notes = notes
        self._wanted: dict[str, list[asyncio.Future[None]]] = {}
        self._others: list[str] = []
        self._left_to_us: set[str] = set()
        self._wake = asyncio.Event()

    def take_over(self) -> None:
        """Take over what processes that have ended had not seen removed."""
        adopted = [job_id for job_id in self._notes.adopt() if JOB_ID.fullmatch(job_id)]
        self._left_to_us.update(job_id for job_id in adopted if job_id.startswith("tesapi-"))
        self._others += adopted
        if adopted:
            self._wake.set()

    def left_to_us(self, job_ids: Sequence[str]) -> list[str]:
        """Those that an earlier process had run for itself, and did not see end."""
        return [job_id for job_id in job_ids if job_id in self._left_to_us]

    def forget(self, job_ids: Sequence[str]) -> None:
        """Nothing of these jobs is there any more."""
        for job_id in job_ids:
            self._notes.forget(job_id)
        self._left_to_us.difference_update(job_ids)

    async def remove(self, job_id: str) -> None:
        """Have a job's folder removed; returns when that will not be forgotten any more. Raises BackendUnavailable."""
        if self._notes.durable:
            self._notes.note(job_id)
            self._others.append(job_id)
            self._wake.set()
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._wanted.setdefault(job_id, []).append(done)
        self._wake.set()
        await done

    def take_along(self, job_id: str) -> None:
        """Remove the folder of a job of our own the next time that folders are removed."""
        self._others.append(job_id)
        if len(self._others) >= _MANY:
            self._wake.set()

    async def run(self) -> None:
        """Do what is asked for until canceled."""
        while True:
            while not self._wake.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_TAKE_OVER_EVERY_S):
                        await self._wake.wait()
                self.take_over()
            await asyncio.sleep(_GATHER_S)
            self._wake.clear()
            wanted, self._wanted = self._wanted, {}
            others, self._others = self._others, []
            job_ids = [job_id for job_id in (*wanted, *others) if JOB_ID.fullmatch(job_id)]
            batches = [job_ids[start : start + _MOST_AT_ONCE] for start in range(0, len(job_ids), _MOST_AT_ONCE)]
            failure: BackendUnavailable | None = None
            for batch in batches:
                try:
                    await self._backend.begin_cleaning(batch)
                except BackendUnavailable as error:
                    failure = error
                    self._others += [job_id for job_id in batch if job_id in others]
            for future in (future for futures in wanted.values() for future in futures if not future.done()):
                if failure is None:
                    future.set_result(None)
                else:
                    future.set_exception(failure)
            if failure is not None and self._others:
                await asyncio.sleep(_TRY_AGAIN_S)
                self._wake.set()


class _Remembered:
    """A set that forgets the oldest when it has grown too large."""

    def __init__(self) -> None:
        self._items: OrderedDict[str, None] = OrderedDict()

    def add(self, item: str) -> None:
        self._items[item] = None
        self._items.move_to_end(item)
        if len(self._items) > _REMEMBERED:
            self._items.popitem(last=False)

    def __contains__(self, item: object) -> bool:
        return item in self._items


class _Children(asyncio.TaskGroup):
    """Children that are canceled when their parent leaves."""

    def __init__(self) -> None:
        super().__init__()
        self._begun: set[asyncio.Task[None]] = set()

    def create_task(self, coro: Any, **keywords: Any) -> asyncio.Task[Any]:
        child = super().create_task(coro, **keywords)
        self._begun.add(child)
        child.add_done_callback(self._begun.discard)
        return child

    async def __aexit__(self, *how: Any) -> None:
        for child in list(self._begun):
            child.cancel()
        await super().__aexit__(*how)


def _set_up(job_id: str, command: str, files: Mapping[str, str]) -> dict[str, Any]:
    """The message that has a job run, with `files` in its `inputs`."""
    return {
        "job_id": job_id,
        "command_line": command,
        "setup_params": {"job_id": job_id},
        "remote_staging": {"setup": [_file("input", name, text) for name, text in files.items()]},
        "env": [],
        "submit_params": {},
        "dependencies_description": None,
    }


def _file(kind: str, name: str, text: str) -> dict[str, Any]:
    return {"name": name, "type": kind, "action": {"action_type": "message", "contents": text}}


def _last_line(name: str, status: JobStatus) -> Mapping[str, Any]:
    """The line of JSON that a helper printed. Raises BackendUnavailable where there is none."""
    try:
        answer = json.loads(status.stdout.splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise BackendUnavailable(why_not_run(name, status)) from error
    if not isinstance(answer, dict):
        raise BackendUnavailable(why_not_run(name, status))
    return answer
