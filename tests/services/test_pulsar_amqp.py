"""Jobs at a real Pulsar behind a real RabbitMQ: what may come over the queues, and who may go away meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import pathlib
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import aio_pika
import pytest
import trustme

from tesapi.backends import pulsar_amqp, pulsar_queues
from tesapi.backends.base import Capacity
from tesapi.backends.health import Health, Standing
from tesapi.backends.pulsar_amqp import PulsarAmqpBackend
from tesapi.backends.pulsar_jobs import PROBE_NOTE, PulsarOptions
from tesapi.backends.pulsar_queues import BrokerAddress, Update
from tesapi.backends.runtimes import RuntimeOptions
from tesapi.errors import BackendUnavailable, JobLost
from tesapi.jobs.plan import Job
from tesapi.tes.events import ExecutorEnded, Handle, JobEnded, JobNoted, Outcome, RunnerEvent
from tests.backends import end_of, events_of, make_job
from tests.daemon import free_port
from tests.jobs import processes_with, sandboxes, script, step
from tests.proxy import Proxy
from tests.pulsars import Pulsar
from tests.rabbit import Rabbit
from tests.slurm import Slurm

MakePulsar = Callable[..., Pulsar]
ONCE = script("echo ran >> /v/ran; sleep 1; cat /v/ran")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have it noticed soon that Pulsar is down."""
    monkeypatch.setattr(pulsar_queues, "_LOOK_S", 1.0)


@pytest.fixture
def prefix() -> str:
    """Queues of the test's own, at the broker of all."""
    return f"test{uuid.uuid4().hex[:8]}"


@pytest.fixture
def make_pulsar(
    tmp_path: pathlib.Path, pulsar_programs: pathlib.Path, rabbit: Rabbit, prefix: str
) -> Iterator[MakePulsar]:
    """Starts Pulsars behind the broker."""
    with contextlib.ExitStack() as stack:

        def make(name: str = "pulsar", url: str | None = None, **options: object) -> Pulsar:
            managers: Any = options.pop("managers", None)
            environment: Any = options.pop("environment", None)
            app_options = {"amqp_key_prefix": prefix, **options}
            if managers is not None:
                del app_options["amqp_key_prefix"]
            pulsar = Pulsar(
                tmp_path / name,
                pulsar_programs,
                message_queue_url=url or rabbit.url,
                web=False,
                managers=managers,
                app_options=app_options,
                environment=environment,
            )
            return stack.enter_context(pulsar)

        yield make


@pytest.fixture
def address(rabbit: Rabbit, prefix: str) -> BrokerAddress:
    return BrokerAddress("site", rabbit.url, key_prefix=prefix, timeout_s=10)


@pytest.fixture
def options(bubblewrap: Mapping[str, object]) -> PulsarOptions:
    runtime = RuntimeOptions("bubblewrap", images=[("alpine", "host")]).document()
    return PulsarOptions(runtime=runtime, gone_s=0.0)


class Site:
    """A backend, and what tests do with it."""

    def __init__(self, address: BrokerAddress, options: PulsarOptions) -> None:
        self.health = Health()
        self.address = address
        self.backend = PulsarAmqpBackend(address, self.health, Capacity(8), options)

    async def job(self, *steps: dict[str, Any], **fields: Any) -> Job:
        """A job, as soon as it is known which runtime there is."""
        return await make_job(self.backend, *steps, **{"volumes": ["/v"], **fields})

    async def started(self, *steps: dict[str, Any], **fields: Any) -> tuple[Job, Handle]:
        """A job that has been sent."""
        job = await self.job(*steps, **fields)
        return job, await self.start(job)

    async def start(self, job: Job) -> Handle:
        """Prepare and start a job, again until that is confirmed."""
        while True:
            with contextlib.suppress(BackendUnavailable):
                handle = await self.backend.prepare(job)
                await self.backend.start(handle, job)
                return handle
            await asyncio.sleep(0.1)

    async def events(self, handle: Handle) -> list[RunnerEvent]:
        """Everything that is told of a job."""
        return [event async for batch in self.backend.follow(handle) for event in batch]

    async def report(self, handle: Handle) -> list[RunnerEvent]:
        """Everything that a job's runner tells."""
        return await events_of(self.backend, handle)

    async def end(self, handle: Handle) -> JobEnded:
        """How a job ended."""
        return await end_of(self.backend, handle)

    async def is_(self, standing: Standing) -> None:
        """Wait until the destination is so."""
        while self.health.standing is not standing:
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def at(address: BrokerAddress, options: PulsarOptions) -> AsyncIterator[Site]:
    """Whatever can be done with a backend."""
    site = Site(address, options)
    async with site.backend:
        yield site


@pytest.fixture
async def site(make_pulsar: MakePulsar, address: BrokerAddress, options: PulsarOptions) -> AsyncIterator[Site]:
    """A backend, with a Pulsar behind the broker."""
    make_pulsar()
    async with at(address, options) as site:
        yield site


class Mailman:
    """Somebody else who may send messages through the broker."""

    def __init__(self, exchange: aio_pika.abc.AbstractExchange, address: BrokerAddress) -> None:
        self._exchange = exchange
        self._address = address

    async def sends(self, what: str, content: object, content_type: str = "application/json") -> None:
        """Send anything, as JSON unless it is bytes."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        message = aio_pika.Message(body, content_type=content_type, content_encoding="utf-8")
        await self._exchange.publish(message, routing_key=self._address.queue(what))


@pytest.fixture
async def mailman(rabbit: Rabbit, address: BrokerAddress) -> AsyncIterator[Mailman]:
    async with await aio_pika.connect(rabbit.url) as connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange("pulsar", aio_pika.ExchangeType.DIRECT, durable=True)
        yield Mailman(exchange, address)


async def _sandbox(job: Job) -> None:
    while not sandboxes(job.job_id):
        await asyncio.sleep(0.01)


def _printed(report: list[RunnerEvent]) -> list[str]:
    return [event.stdout for event in report if isinstance(event, ExecutorEnded)]


async def _waiting(rabbit: Rabbit, queue: str) -> int:
    return (await asyncio.to_thread(rabbit.queues))[queue]


# What comes over the queues.


async def test_a_job_that_takes_a_while_is_seen_to_run_and_tells_the_rest_at_its_end(site: Site) -> None:
    _, handle = await site.started(ONCE)
    batches = [[event.event for event in batch] async for batch in site.backend.follow(handle)]
    assert batches == [["seen"], ["started", "executor_started", "executor_ended", "ended"]]


async def test_an_update_is_acknowledged_when_it_is_recorded_and_not_before(site: Site, rabbit: Rabbit) -> None:
    queue = site.address.queue("status_update")
    _, handle = await site.started(step("true"))
    followed = site.backend.follow(handle)
    while not isinstance((await anext(followed))[-1], JobEnded):
        pass
    assert await _waiting(rabbit, queue) == 1
    with pytest.raises(StopAsyncIteration):
        await anext(followed)
    while await _waiting(rabbit, queue):
        await asyncio.sleep(0.05)


async def test_an_update_that_could_not_be_recorded_is_told_again(site: Site) -> None:
    _, handle = await site.started(step("true"))
    async with contextlib.aclosing(site.backend.follow(handle)) as followed:  # type: ignore[type-var]
        while not isinstance((last := await anext(followed))[-1], JobEnded):
            pass
    assert await site.report(handle) == list(last)


async def test_each_of_several_processes_hears_of_its_own_jobs(
    site: Site, options: PulsarOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulsar_amqp, "_FIRST_ASK_S", 60.0)  # nobody asks: they wait for what Pulsar says by itself
    monkeypatch.setattr(pulsar_queues, "_LOOK_S", 0.1)
    await site.job(step("true"))
    async with at(site.address, options) as other:
        while other.backend._queues.alone or site.backend._queues.alone:
            await asyncio.sleep(0.05)
        sites = [site, other] * 4
        handles = [(await one.started(step("true")))[1] for one in sites]
        ends = await asyncio.gather(*(one.end(handle) for one, handle in zip(sites, handles, strict=True)))
    assert {end.outcome for end in ends} == {Outcome.COMPLETE}


async def test_nothing_is_asked_while_updates_come(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulsar_amqp, "_FIRST_ASK_S", 20.0)  # a busy machine may not begin with them at once
    await site.job(step("true"))
    before = site.backend._queues.published
    handles = [(await site.started(script(f"sleep {seconds}")))[1] for seconds in (0, 1, 2, 8)]
    ends = await asyncio.gather(*(site.end(handle) for handle in handles))
    assert {end.outcome for end in ends} == {Outcome.COMPLETE}
    assert site.backend._queues.published - before == len(handles)


async def test_where_the_end_of_one_job_was_missed_the_others_are_asked_after(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [await site.started(script(f"echo {number}; sleep 2")) for number in range(3)]
    reports = [asyncio.ensure_future(site.report(handle)) for _, handle in jobs]
    followed = site.backend._jobs
    while not all(job.job_id in followed and followed[job.job_id].seen for job, _ in jobs):
        await asyncio.sleep(0.02)
    missed: list[Update] = []
    with monkeypatch.context() as patch:
        patch.setattr(site.backend._queues, "_take", lambda update: missed.append(update) or True)  # as if purged
        while sum(update.answer["complete"] == "true" for update in missed) < 3:
            await asyncio.sleep(0.02)
    assert not any(report.done() for report in reports)
    first = followed[jobs[0][0].job_id]
    first.word_at = float("-inf")  # its turn has come
    site.backend._rounds.hurry(first.job_id)
    async with asyncio.timeout(pulsar_amqp._FIRST_CALM_ASK_S / 2):
        assert [_printed(report) for report in await asyncio.gather(*reports)] == [["0\n"], ["1\n"], ["2\n"]]


async def test_what_another_process_took_before_both_knew_of_each_other_is_asked_for(
    site: Site, options: PulsarOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [await site.started(script("sleep 8")) for _ in range(6)]
    ends = [asyncio.ensure_future(site.end(handle)) for _, handle in jobs]
    followed = site.backend._jobs
    while not all(job.job_id in followed and followed[job.job_id].seen for job, _ in jobs):
        await asyncio.sleep(0.02)
    monkeypatch.setattr(pulsar_queues, "_LOOK_S", 14.0)
    await asyncio.sleep(1.1)  # the look that it has begun to wait for
    taken: list[Update] = []
    other = Site(site.address, options)
    monkeypatch.setattr(other.backend._queues, "_take", lambda update: taken.append(update) or not update.copy)
    async with other.backend, asyncio.timeout(pulsar_amqp._FIRST_CALM_ASK_S - 5):
        assert {end.outcome for end in await asyncio.gather(*ends)} == {Outcome.COMPLETE}
    assert taken


async def test_bad_messages_change_nothing_and_are_told_once(
    site: Site, mailman: Mailman, rabbit: Rabbit, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulsar_amqp, "_PARKED_S", 0.1)
    job, handle = await site.started(ONCE)
    end = asyncio.ensure_future(site.report(handle))
    await _sandbox(job)
    whole = {"complete": "true", "returncode": 0, "job_stdout": _forged(), "job_stderr": ""}
    messages: list[object] = [
        b"not JSON",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"",
        ["a", "list"],
        "text",
        None,
        {},
        {"job_id": job.job_id},
        {"job_id": job.job_id, "status": None},
        {"job_id": job.job_id, "status": ["complete"]},
        {"job_id": 5, "status": "complete"},
        {"job_id": ["x"], "status": "complete"},
        {"job_id": "../../etc", "status": "complete", **whole},
        {"job_id": "nobody-s", "status": "complete", "job_directory": "/s/nobody-s", **whole},
        {"job_id": job.job_id, "status": "complete", "job_directory": "/s/another-job", **whole},
        {"job_id": job.job_id, "status": "complete", "job_directory": 7, **whole},
        {"job_id": job.job_id, "status": "no such word"},
        {"job_id": job.job_id, "status": "running", "complete": "false"},
        {"job_id": job.job_id, "status": "running", "complete": "false", "job_stdout": 5},
        {"acknowledge_uuid_response": "x"},
    ]
    for message in messages * 3:
        await mailman.sends("status_update", message)
    await mailman.sends("status_update", b"not JSON either", content_type="text/plain")
    assert _printed(await end) == ["ran\n"]
    while await _waiting(rabbit, site.address.queue("status_update")):
        await asyncio.sleep(0.05)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == len(set(said))
    assert 5 <= len(said) <= 10
    assert site.health.up


def _forged() -> str:
    line = {"seq": 1, "at": "2026-01-01T00:00:00Z", "event": "ended", "outcome": "complete"}
    return json.dumps(line) + "\n"


@pytest.mark.parametrize("status", ["failed", "cancelled", "complete", "lost"])
async def test_an_end_that_the_runner_does_not_bear_out_is_not_believed(
    site: Site, mailman: Mailman, status: str
) -> None:
    job, handle = await site.started(ONCE)
    report = asyncio.ensure_future(site.report(handle))
    await _sandbox(job)
    update = {"job_id": job.job_id, "status": status, "complete": "true", "job_directory_contents": ["inputs"]}
    for stdout in ("", "what a runner does not print\n"):
        await mailman.sends("status_update", {**update, "job_stdout": stdout})
    assert _printed(await report) == ["ran\n"]


async def test_a_job_can_be_canceled_also_while_a_sweep_waits_for_it(site: Site, mailman: Mailman) -> None:
    job, handle = await site.started(step("sleep", "1000"))
    end = asyncio.ensure_future(site.end(handle))
    await _sandbox(job)
    await mailman.sends("status_update", {"job_id": job.job_id, "status": "failed", "complete": "true"})
    while not processes_with("--sweep"):
        await asyncio.sleep(0.02)
    await site.backend.cancel(handle)
    assert (await end).outcome is Outcome.CANCELED
    assert sandboxes(job.job_id) == []


async def test_many_jobs_are_canceled_at_once_though_few_updates_are_taken_at_once(
    make_pulsar: MakePulsar, address: BrokerAddress, options: PulsarOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulsar_queues, "_AT_ONCE", 2)
    make_pulsar()
    async with at(address, options) as site:
        jobs = [await site.started(step("sleep", "1000")) for _ in range(8)]
        ends = [asyncio.ensure_future(site.end(handle)) for _, handle in jobs]
        await asyncio.gather(*(_sandbox(job) for job, _ in jobs))
        await asyncio.gather(*(site.backend.cancel(handle) for _, handle in jobs))
        assert {end.outcome for end in await asyncio.gather(*ends)} == {Outcome.CANCELED}
        assert [job.job_id for job, _ in jobs if sandboxes(job.job_id)] == []


async def test_what_comes_late_or_twice_changes_nothing(site: Site, mailman: Mailman) -> None:
    job, handle = await site.started(step("true"))
    report = await site.report(handle)
    for status in ("running", "queued", "lost", "cancelled"):
        await mailman.sends("status_update", {"job_id": job.job_id, "status": status, "complete": "false"})
    assert await site.report(handle) == report


async def test_updates_that_want_an_answer_are_answered(
    make_pulsar: MakePulsar, address: BrokerAddress, options: PulsarOptions
) -> None:
    pulsar = make_pulsar(amqp_acknowledge=True)
    async with at(address, options) as site:
        _, handle = await site.started(step("true"))
        assert (await site.end(handle)).outcome is Outcome.COMPLETE
        log = pulsar.log
        while "Got acknowledgement for UUID" not in log.read_text("utf-8"):
            await asyncio.sleep(0.05)


async def test_a_report_that_pulsar_cuts_is_told_with_its_gap(
    make_pulsar: MakePulsar, address: BrokerAddress, options: PulsarOptions, tmp_path: pathlib.Path
) -> None:
    make_pulsar(maximum_stream_size=8192)
    storage = tmp_path / "stored"
    storage.mkdir()
    async with at(address, options) as site:
        _, handle = await site.started(
            script("i=0; while [ $i -lt 200 ]; do echo $i > /v/$i; i=$((i+1)); done"),
            outputs=[{"path": "/v", "url": f"file://{storage}/o", "type": "DIRECTORY"}],
            storage={"file": {"roots": [str(storage)]}},
        )
        report = await site.report(handle)
    end = report[-1]
    assert isinstance(end, JobEnded)
    assert end.outcome is Outcome.COMPLETE
    assert len(list((storage / "o").iterdir())) == 200
    (note,) = [event.text for event in report if isinstance(event, JobNoted)]
    told = sum(event.event == "output" for event in report)
    assert note.startswith(f"{200 - told} entries of the job's report are missing here")


async def test_folders_of_ended_jobs_are_removed_many_at_once(
    make_pulsar: MakePulsar, address: BrokerAddress, options: PulsarOptions
) -> None:
    pulsar = make_pulsar()
    async with at(address, options) as site:
        for _ in range(2):
            handles = [(await site.started(step("true")))[1] for _ in range(6)]
            await asyncio.gather(*(site.end(handle) for handle in handles))
            await asyncio.gather(*(site.backend.discard(handle) for handle in handles))
        names: list[str] = []
        while len(names) != 1:
            await asyncio.sleep(0.05)
            names = [folder.name for folder in pulsar.jobs]
        assert names[0].startswith("tesapi-janitor-")


async def test_folders_that_one_process_could_not_have_removed_are_removed_by_the_next(
    make_pulsar: MakePulsar, address: BrokerAddress, options: PulsarOptions, tmp_path: pathlib.Path
) -> None:
    pulsar = make_pulsar()
    noting = replace(options, notes=tmp_path / "notes")
    async with at(address, noting) as site:
        _, handle = await site.started(step("true"))
        await site.end(handle)
        await site.backend.discard(handle)
    left = {folder.name for folder in pulsar.jobs}
    assert handle["job_id"] in left
    assert {note.name for note in (tmp_path / "notes").rglob("*") if note.is_file()} == left | {PROBE_NOTE, ".lock"}
    async with at(address, noting) as site:
        assert "So it was when this was last asked" in site.backend._runtime_sentence
        assert await site.backend.runtime()
        while left & {folder.name for folder in pulsar.jobs}:
            await asyncio.sleep(0.05)
        while left & {note.name for note in (tmp_path / "notes").rglob("*")}:
            await asyncio.sleep(0.05)


async def test_a_job_that_is_too_large_for_a_message_says_so(site: Site) -> None:
    job = await site.job(step("true"), inputs=[{"type": "FILE", "path": "/in", "content": "x" * (16 << 20)}])
    with pytest.raises(JobLost, match=r"its document takes 16 MiB, which is too much for a message to site"):
        await site.backend.start(await site.backend.prepare(job), job)


async def test_a_job_whose_runner_cannot_begin_says_why(
    site: Site, options: PulsarOptions, make_pulsar: MakePulsar
) -> None:
    job = await site.job(step("true"))
    wrong = PulsarOptions(python="no-such-python", runtime=options.runtime)
    async with at(site.address, wrong) as other:
        await other.is_(Standing.UP)
        await other.backend.start({"job_id": job.job_id}, job)
        end = await other.end({"job_id": job.job_id})
        assert end.outcome is Outcome.SYSTEM_ERROR
        assert str(end.reason).startswith("The job's runner could not begin at site: it ended with exit code 127: ")
        assert "no-such-python" in str(end.reason)
        while "no-such-python" not in other.backend.condition().sentence:
            await asyncio.sleep(0.05)
        assert not other.backend.condition().ok


async def test_a_job_that_runs_long_is_asked_for_ever_less_often(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulsar_amqp, "_FIRST_ASK_S", 0.1)
    monkeypatch.setattr(pulsar_amqp, "_FIRST_CALM_ASK_S", 0.2)
    monkeypatch.setattr(pulsar_amqp, "_CALM_ASKS_PER_S", 100.0)
    _, handle = await site.started(script("sleep 6"))
    before = site.backend._queues.published
    assert (await site.end(handle)).outcome is Outcome.COMPLETE
    asks = site.backend._queues.published - before
    assert 3 <= asks <= 15, "by a constant interval they would be 30"


# Who may go away.


@pytest.mark.parametrize("end", [Pulsar.stop, Pulsar.kill])
async def test_pulsar_goes_away_while_a_job_runs_and_ends_and_it_ran_once(
    make_pulsar: MakePulsar, address: BrokerAddress, options: PulsarOptions, end: Callable[[Pulsar], None]
) -> None:
    pulsar = make_pulsar()
    async with at(address, options) as site:
        short, handle = await site.started(ONCE)
        long, other = await site.started(script("echo ran >> /v/ran; sleep 6; cat /v/ran"))
        reports = [asyncio.ensure_future(site.report(one)) for one in (handle, other)]
        await asyncio.gather(_sandbox(short), _sandbox(long))
        await asyncio.to_thread(end, pulsar)
        await site.is_(Standing.DOWN)
        assert "Nobody reads the queue" in site.backend.condition().sentence
        with pytest.raises(BackendUnavailable, match="Nobody reads the queue"):
            await site.backend.prepare(short)
        while sandboxes(short.job_id):
            await asyncio.sleep(0.05)
        await asyncio.to_thread(pulsar.start)
        assert [_printed(report) for report in await asyncio.gather(*reports)] == [["ran\n"], ["ran\n"]]


async def test_a_job_that_is_sent_while_pulsar_is_away_runs_when_it_is_back(
    make_pulsar: MakePulsar, address: BrokerAddress, options: PulsarOptions
) -> None:
    pulsar = make_pulsar()
    async with at(address, options) as site:
        job = await site.job(ONCE)
        handle = await site.backend.prepare(job)
        await asyncio.to_thread(pulsar.stop)
        await site.backend.start(handle, job)
        report = asyncio.ensure_future(site.report(handle))
        await site.is_(Standing.DOWN)
        await asyncio.to_thread(pulsar.start)
        assert _printed(await report) == ["ran\n"]


async def test_a_cancel_while_pulsar_is_away_is_carried_out_when_it_is_back(
    make_pulsar: MakePulsar, address: BrokerAddress, options: PulsarOptions
) -> None:
    pulsar = make_pulsar()
    async with at(address, options) as site:
        job, handle = await site.started(step("sleep", "1000"))
        report = asyncio.ensure_future(site.report(handle))
        await _sandbox(job)
        await asyncio.to_thread(pulsar.kill)
        await site.is_(Standing.DOWN)
        with pytest.raises(BackendUnavailable):
            await site.backend.cancel(handle)
        await asyncio.to_thread(pulsar.start)
        end = (await report)[-1]
        assert isinstance(end, JobEnded)
        assert end.outcome is Outcome.CANCELED
        assert sandboxes(job.job_id) == []


@pytest.mark.parametrize("end", [Rabbit.stop, Rabbit.kill])
async def test_the_broker_goes_away_while_jobs_run_and_end(
    site: Site, rabbit: Rabbit, end: Callable[[Rabbit], None]
) -> None:
    _, handle = await site.started(ONCE)
    _, other = await site.started(script("echo ran >> /v/ran; sleep 8; cat /v/ran"))
    reports = [asyncio.ensure_future(site.report(one)) for one in (handle, other)]
    await asyncio.to_thread(end, rabbit)
    try:
        await site.is_(Standing.DOWN)
        with pytest.raises(BackendUnavailable):
            await site.backend.cancel(handle)
        assert "guest" not in site.backend.condition().sentence
    finally:
        await asyncio.to_thread(rabbit.start)
    printed = [_printed(report) for report in await asyncio.gather(*reports)]
    assert printed[1] == ["ran\n"]
    assert printed[0] in (["ran\n"], [])  # it was canceled, and may have been over before


async def test_connections_that_are_closed_reset_or_stalled_cost_no_job(
    make_pulsar: MakePulsar, address: BrokerAddress, options: PulsarOptions, rabbit: Rabbit, prefix: str
) -> None:
    make_pulsar()
    with Proxy(rabbit.url) as proxy:
        near = BrokerAddress("site", proxy.url, key_prefix=prefix, timeout_s=2)
        async with at(near, options) as site:
            await site.job(step("true"))
            for fault in (proxy.drop, proxy.cut, lambda: proxy.reset_after(100), proxy.stall):
                _, handle = await site.started(ONCE)
                report = asyncio.ensure_future(site.report(handle))
                fault()
                await asyncio.sleep(1.5)  # for the job to end meanwhile
                proxy.heal()
                proxy.drop()
                assert _printed(await report) == ["ran\n"]
            await asyncio.to_thread(rabbit.close_connections)
            await site.is_(Standing.DOWN)
            await site.is_(Standing.UP)
            _, handle = await site.started(ONCE)
            assert _printed(await site.report(handle)) == ["ran\n"]


async def test_a_start_that_nobody_confirms_can_be_repeated_and_the_job_runs_once(
    make_pulsar: MakePulsar, options: PulsarOptions, rabbit: Rabbit, prefix: str
) -> None:
    make_pulsar()
    with Proxy(rabbit.url) as proxy:
        async with at(BrokerAddress("site", proxy.url, key_prefix=prefix, timeout_s=1), options) as site:
            job = await site.job(ONCE)
            handle = await site.backend.prepare(job)
            proxy.reset_after(0)  # the message arrives, its confirmation does not
            with pytest.raises(BackendUnavailable):
                await site.backend.start(handle, job)
            proxy.heal()
            await site.start(job)
            assert _printed(await site.report(handle)) == ["ran\n"]


async def test_a_set_up_message_that_vanished_is_sent_again(
    site: Site, rabbit: Rabbit, make_pulsar: MakePulsar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulsar_amqp, "_SEND_AGAIN_S", 0.5)
    monkeypatch.setattr(pulsar_amqp, "_FIRST_ASK_S", 0.3)
    job = await site.job(ONCE)
    handle = await site.backend.prepare(job)
    site.backend._sent[job.job_id] = (job, time.monotonic())  # as if the broker had confirmed and then lost it
    await site.backend.start(handle, job)
    assert _printed(await site.report(handle)) == ["ran\n"]


async def test_a_job_that_had_begun_and_whose_folder_is_gone_is_lost_and_not_run_again(
    make_pulsar: MakePulsar, address: BrokerAddress, options: PulsarOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulsar_amqp, "_FIRST_CALM_ASK_S", 1.0)
    pulsar = make_pulsar()
    async with at(address, options) as site:
        job, handle = await site.started(step("sleep", "1000"))
        events = asyncio.ensure_future(site.events(handle))
        await _sandbox(job)
        while site.backend._jobs[job.job_id].seen is None:
            await asyncio.sleep(0.02)
        while (pulsar.staging / job.job_id).exists():
            shutil.rmtree(pulsar.staging / job.job_id, ignore_errors=True)
        with pytest.raises(JobLost, match="site has no trace of the job"):
            await events
        while processes_with(job.job_id):
            await asyncio.sleep(0.05)


async def test_a_message_that_stops_pulsar_reading_is_recognised(
    make_pulsar: MakePulsar,
    address: BrokerAddress,
    options: PulsarOptions,
    mailman: Mailman,
    rabbit: Rabbit,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pulsar_queues, "_LOOK_S", 0.5)
    pulsar = make_pulsar()
    async with at(address, options) as site:
        await site.job(step("true"))
        await mailman.sends("setup", b"no JSON", content_type="text/plain")
        await site.is_(Standing.MISCONFIGURED)
        sentence = site.backend.condition().sentence
        queue = address.queue("setup")
        assert f"The Pulsar site has stopped reading {queue}." in sentence
        assert f"rabbitmqctl purge_queue {queue}" in sentence
        await asyncio.to_thread(rabbit.purge, queue)
        await asyncio.to_thread(pulsar.stop)
        await asyncio.to_thread(pulsar.start)
        await site.is_(Standing.UP)
        _, handle = await site.started(step("true"))
        assert (await site.end(handle)).outcome is Outcome.COMPLETE


async def test_slurm_behind_pulsar_behind_a_broker(
    make_pulsar: MakePulsar, rabbit: Rabbit, options: PulsarOptions, slurm: Slurm
) -> None:
    url = await asyncio.to_thread(rabbit.add_vhost, f"own-{uuid.uuid4().hex[:8]}")
    manager = {"type": "queued_cli", "job_plugin": "Slurm", "shell_plugin": "LocalShell", "job_ncpus": 1}
    make_pulsar(url=url, managers={"slurm": manager}, environment=slurm.environment)
    async with at(BrokerAddress("site", url, manager="slurm"), options) as site:
        _, handle = await site.started(ONCE)
        assert _printed(await site.report(handle)) == ["ran\n"]
        jobs = [await site.started(step("sleep", "1000")) for _ in range(6)]  # four run, two wait in Slurm's queue
        ends = [asyncio.ensure_future(site.end(handle)) for _, handle in jobs]
        while sum(bool(sandboxes(job.job_id)) for job, _ in jobs) < 4:
            await asyncio.sleep(0.05)
        await asyncio.gather(*(site.backend.cancel(handle) for _, handle in jobs))
        assert {end.outcome for end in await asyncio.gather(*ends)} == {Outcome.CANCELED}
        assert [job.job_id for job, _ in jobs if sandboxes(job.job_id)] == []
        while await asyncio.to_thread(slurm.queue):
            await asyncio.sleep(0.1)


# Where a Pulsar is.


async def test_managers_have_queues_of_their_own(
    make_pulsar: MakePulsar, rabbit: Rabbit, options: PulsarOptions
) -> None:
    fast = {"type": "queued_python", "min_polling_interval": 0.05}
    url = await asyncio.to_thread(rabbit.add_vhost, f"own-{uuid.uuid4().hex[:8]}")
    pulsar = make_pulsar(url=url, managers={"_default_": fast, "second": fast})
    async with contextlib.AsyncExitStack() as stack:
        sites = [
            await stack.enter_async_context(at(BrokerAddress(f"to-{name}", url, manager=name), options))
            for name in ("", "second")
        ]
        assert [one.address.queue("setup") for one in sites] == ["pulsar__setup", "pulsar_second__setup"]
        handles = [(await one.started(step("true")))[1] for one in sites]
        for one, handle in zip(sites, handles, strict=True):
            assert (await one.end(handle)).outcome is Outcome.COMPLETE
        log = pulsar.log.read_text("utf-8")
        assert "pulsar_second__setup" in log
        nobody = await stack.enter_async_context(at(BrokerAddress("to-nobody", url, manager="nobody"), options))
        await nobody.is_(Standing.DOWN)
        assert nobody.backend.condition().sentence.startswith("Nobody reads the queue pulsar_nobody__setup")


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("amqp://guest:wrong-secret@127.0.0.1:{port}//", "does not accept user and password"),
        ("amqp://guest:guest@127.0.0.1:{port}/nowhere", "there is no such virtual host, or the user may not use it"),
        ("amqp://guest:wrong-secret@127.0.0.1:{free}//", "cannot be reached: "),
        ("amqp://guest:wrong-secret@nowhere.invalid:{port}//", "cannot be reached: "),
        ("amqps://guest:wrong-secret@127.0.0.1:{port}//", "cannot be reached: "),
    ],
)
async def test_a_wrong_address_is_told_in_a_sentence_without_secrets(
    rabbit: Rabbit, options: PulsarOptions, url: str, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    address = BrokerAddress("site", url.format(port=rabbit.port, free=free_port()), timeout_s=5)
    async with at(address, options) as site:
        while site.health.standing is Standing.STARTING:
            await asyncio.sleep(0.02)
        assert sentence in site.backend.condition().sentence
        with pytest.raises(BackendUnavailable) as caught:
            await site.backend.discard({"job_id": "some"})
    assert "wrong-secret" not in site.backend.condition().sentence + str(caught.value)
    assert "wrong-secret" not in caplog.text


async def test_queues_that_do_not_last_are_recognised(rabbit: Rabbit, options: PulsarOptions, mailman: Mailman) -> None:
    url = await asyncio.to_thread(rabbit.add_vhost, f"own-{uuid.uuid4().hex[:8]}")
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        await channel.declare_exchange("pulsar", aio_pika.ExchangeType.DIRECT, durable=False)
        async with at(BrokerAddress("site", url), options) as site:
            await site.is_(Standing.MISCONFIGURED)
            assert "as with amqp_durable: false in Pulsar's app.yml" in site.backend.condition().sentence


async def test_a_broker_that_wants_tls_and_a_certificate_gets_them(
    tmp_path: pathlib.Path, options: PulsarOptions
) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    server, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("client")
    files = {name: tmp_path / f"{name}.pem" for name in ("ca", "stranger", "key", "chain", "client")}
    authority.cert_pem.write_to_path(str(files["ca"]))
    stranger.cert_pem.write_to_path(str(files["stranger"]))
    server.private_key_pem.write_to_path(str(files["key"]))
    server.cert_chain_pems[0].write_to_path(str(files["chain"]))
    client.private_key_and_cert_chain_pem.write_to_path(str(files["client"]))
    port = free_port()
    conf = [
        f"listeners.ssl.default = 127.0.0.1:{port}",
        f"ssl_options.cacertfile = {files['ca']}",
        f"ssl_options.certfile = {files['chain']}",
        f"ssl_options.keyfile = {files['key']}",
        "ssl_options.verify = verify_peer",
        "ssl_options.fail_if_no_peer_cert = true",
    ]
    url = f"amqps://guest:guest@127.0.0.1:{port}//"
    with Rabbit(tmp_path / "rabbit", conf):
        right = BrokerAddress("site", url, ca=files["ca"], certificate=files["client"], timeout_s=5)
        async with at(right, options) as site:
            await site.is_(Standing.DOWN)  # there is no Pulsar, which only a broker can tell
            assert "Nobody reads the queue" in site.backend.condition().sentence
        wrong = BrokerAddress("site", url, ca=files["stranger"], certificate=files["client"], timeout_s=5)
        async with at(wrong, options) as site:
            await site.is_(Standing.MISCONFIGURED)
            assert "is not trusted" in site.backend.condition().sentence
        without = BrokerAddress("site", url, ca=files["ca"], timeout_s=5)
        async with at(without, options) as site:
            await site.is_(Standing.DOWN)
            assert "cannot be reached" in site.backend.condition().sentence
