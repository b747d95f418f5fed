"""A real Pulsar that is reached over REST and tells of its jobs through a real RabbitMQ."""

from __future__ import annotations

import asyncio
import json
import pathlib
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import aio_pika
import pytest

from tesapi.backends import pulsar_queues
from tesapi.backends.base import Capacity
from tesapi.backends.health import Health
from tesapi.backends.pulsar_jobs import PulsarOptions
from tesapi.backends.pulsar_queues import BrokerAddress
from tesapi.backends.pulsar_rest import PulsarRestBackend
from tesapi.backends.pulsar_updates import PulsarUpdates
from tesapi.backends.pulsar_wire import PulsarAddress, PulsarServer
from tesapi.backends.runtimes import RuntimeOptions
from tesapi.jobs.plan import Job
from tesapi.tes.events import ExecutorEnded, Handle, RunnerEvent
from tests.backends import events_of, make_job
from tests.jobs import sandboxes, script, step
from tests.pulsars import Pulsar
from tests.rabbit import Rabbit


@pytest.fixture
def pulsar(tmp_path: pathlib.Path, pulsar_programs: pathlib.Path, rabbit: Rabbit) -> Iterator[Pulsar]:
    url = rabbit.add_vhost(f"own-{uuid.uuid4().hex[:8]}")
    with Pulsar(tmp_path / "pulsar", pulsar_programs, message_queue_url=url) as pulsar:
        yield pulsar


class Site:
    """A backend whose requests can be counted."""

    def __init__(self, pulsar: Pulsar) -> None:
        self.broker = BrokerAddress("site", pulsar.options["message_queue_url"], timeout_s=5)
        self.updates = PulsarUpdates(self.broker)
        health = Health()
        self.server = PulsarServer(PulsarAddress("site", pulsar.url, token=pulsar.token), health)
        runtime = RuntimeOptions("bubblewrap", images=[("alpine", "host")]).document()
        self.backend = PulsarRestBackend(
            self.server, health, Capacity(8), PulsarOptions(runtime=runtime), self.updates
        )  # fmt: skip

    async def is_hearing(self, hearing: bool) -> None:
        """Wait until updates come, or do not."""
        while self.updates.hearing is not hearing:
            await asyncio.sleep(0.02)

    async def started(self, *steps: dict[str, Any]) -> tuple[Job, Handle]:
        """A job that has been sent."""
        job = await make_job(self.backend, *steps)
        handle = await self.backend.prepare(job)
        await self.backend.start(handle, job)
        return job, handle

    async def report(self, handle: Handle) -> list[RunnerEvent]:
        """Everything that a job's runner tells."""
        return await events_of(self.backend, handle)


@pytest.fixture
async def site(
    pulsar: Pulsar, bubblewrap: Mapping[str, object], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Site]:
    monkeypatch.setattr(pulsar_queues, "_LOOK_S", 0.5)
    site = Site(pulsar)
    async with site.backend:
        await site.is_hearing(True)
        yield site


def _printed(report: list[RunnerEvent]) -> list[str]:
    return [event.stdout for event in report if isinstance(event, ExecutorEnded)]


async def test_while_updates_come_a_job_is_not_polled(site: Site) -> None:
    _, handle = await site.started(script("sleep 8; echo done"))
    report = asyncio.ensure_future(site.report(handle))
    while not any(job.events for job in site.backend._jobs.values()):
        await asyncio.sleep(0.05)
    before = site.server.requests
    assert _printed(await report) == ["done\n"]
    # A look when it began and one at its end, and perhaps one at Pulsar's health; once a second, there would be 8.
    assert site.server.requests - before <= 4
    assert "reads its queues" in site.backend.condition().sentence


async def test_while_the_broker_is_away_jobs_are_polled(site: Site, rabbit: Rabbit) -> None:
    _, handle = await site.started(script("sleep 4; echo done"))
    report = asyncio.ensure_future(site.report(handle))
    await asyncio.to_thread(rabbit.kill)
    try:
        await site.is_hearing(False)
        condition = site.backend.condition()
        assert condition.ok
        assert "Jobs are polled: " in condition.sentence
        assert _printed(await report) == ["done\n"]
        _, handle = await site.started(step("echo", "another"))
        assert _printed(await site.report(handle)) == ["another\n"]
    finally:
        await asyncio.to_thread(rabbit.start)
    await site.is_hearing(True)


async def test_what_others_say_in_pulsars_name_is_not_believed(site: Site) -> None:
    job, handle = await site.started(script("sleep 1; echo done"))
    report = asyncio.ensure_future(site.report(handle))
    while not sandboxes(job.job_id):
        await asyncio.sleep(0.01)
    line = {"seq": 1, "at": "2026-01-01T00:00:00Z", "event": "ended", "outcome": "complete"}
    forged = {"job_id": job.job_id, "status": "complete", "complete": "true", "job_stdout": json.dumps(line) + "\n"}
    async with await aio_pika.connect(site.broker.url) as connection:
        exchange = await (await connection.channel()).get_exchange("pulsar")
        for body in (b"no JSON", json.dumps(forged).encode(), json.dumps({**forged, "status": "lost"}).encode()):
            await exchange.publish(aio_pika.Message(body), routing_key=site.broker.queue("status_update"))
    assert _printed(await report) == ["done\n"]
