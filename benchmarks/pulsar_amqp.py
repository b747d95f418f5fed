"""No-op tasks on a Pulsar behind a RabbitMQ, beside a bare client of the broker that has the same jobs run.

And what very many jobs take that run there, at a Pulsar that runs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import pathlib
import statistics
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import aio_pika

from benchmarks.idle import cpu_s, memory_mib
from benchmarks.local import complete, seconds
from tesapi import __version__
from tesapi.backends.pulsar_queues import BrokerAddress
from tesapi.backends.runtimes import RuntimeOptions, RuntimeProbe
from tesapi.jobs.bundle import runner_text
from tests.engines import Missing
from tests.jobs import until
from tests.pulsars import Pulsar, install
from tests.rabbit import Rabbit
from tests.services.server import Server

_TASKS = 60
_ALONE = 10
_AT_ONCE = 16
_LOOK_S = 0.005
_LOOK_AT_MANY_S = 0.05
_IDLE_JOBS = 10_000
_IDLE_S = 60
_POSTERS = 8
_TRUE = {"executors": [{"image": "alpine", "command": ["true"]}]}


def run(folder: pathlib.Path, rounds: int) -> None:
    """Measure, and print."""
    options = RuntimeOptions("bubblewrap", images=[("alpine", "host")])
    probe = RuntimeProbe(folder, options)
    probe.look()
    if probe.found is None:
        print(f"pulsar_amqp: not measured. {probe.sentence}")
        return
    try:
        with Rabbit(folder / "rabbit") as rabbit:
            url = rabbit.add_vhost("service")
            settings = {"AMQP_URL": url, "MAX_JOBS": _AT_ONCE, "RUNTIME__KIND": "bubblewrap"}
            settings["RUNTIME__BUBBLEWRAP__IMAGES"] = '{ alpine = "host" }'
            with (
                Pulsar(folder / "bare", install(), message_queue_url=rabbit.url, web=False),
                Pulsar(folder / "pulsar", install(), message_queue_url=url, web=False),
                Server(folder, **{f"PULSAR__{name}": value for name, value in settings.items()}) as server,
                asyncio.Runner() as runner,
            ):
                client = runner.run(_opened(rabbit.url, probe.found))
                many, one = _measured(server, client, runner, rounds)
                runner.run(client.close())
    except Missing as why:
        print(f"pulsar_amqp: not measured. It {why}.")
        return
    title = f"Pulsar over AMQP, bubblewrap, {_TASKS} no-op tasks, {_AT_ONCE} at once, {rounds} rounds"
    print(f"{title}, load {os.getloadavg()[0]:.1f}")
    _row("tasks to COMPLETE", many["task"], "/s")
    for name in ("true", "runner"):
        _row(f"a bare client, {name}", many[name], f"/s   tasks: {many['task'] / many[name]:5.2f} of it")
    _row("POST to COMPLETE, one alone", one["task"] * 1e3, " ms")
    for name in ("true", "runner"):
        _row(f"a bare client, {name}", one[name] * 1e3, f" ms   task: {one['task'] / one[name]:5.2f} of it")


def run_idle(folder: pathlib.Path) -> None:
    """What very many running jobs take that nobody looks at, beside the same service without any; and print it."""
    with contextlib.ExitStack() as stack:
        try:
            rabbit = stack.enter_context(Rabbit(folder / "rabbit"))
        except Missing as why:
            print(f"idle_amqp: not measured. It {why}.")
            return
        pulsar = _Simulated(rabbit.url)
        stack.enter_context(pulsar)
        settings = {"PULSAR__AMQP_URL": rabbit.url, "PULSAR__MAX_JOBS": _IDLE_JOBS}
        server = stack.enter_context(Server(folder, PULSAR__RUNTIME__KIND="bubblewrap", **settings))
        assert server.process is not None
        pid = server.process.pid
        until(lambda: pulsar.counted["setup"] or None, "the first question")
        time.sleep(3)
        memory = memory_mib(pid)
        alone = _share(pid)
        with ThreadPoolExecutor(_POSTERS) as pool:
            list(pool.map(lambda _: server.post(_TRUE), range(_IDLE_JOBS)))
        until(lambda: pulsar.counted["setup"] > _IDLE_JOBS or None, "all to be sent", 600)
        time.sleep(_IDLE_S / 2)
        before = pulsar.counted["status"]
        share, more = _share(pid), memory_mib(pid) - memory
        asked = pulsar.counted["status"] - before
    print(f"{_IDLE_JOBS} jobs that run at a simulated Pulsar behind a RabbitMQ, over {_IDLE_S} s: ", end="")
    print(f"{share:.1%} of a core (without any {alone:.1%}), {more:.0f} MiB more than without, {asked} asked after")


def _share(pid: int) -> float:
    began = cpu_s(pid)
    time.sleep(_IDLE_S)
    return (cpu_s(pid) - began) / _IDLE_S


class _Simulated:
    """Says on the wire what a Pulsar says whose jobs begin at once and never end; counts what it is sent."""

    def __init__(self, url: str) -> None:
        self.counted = dict.fromkeys(("setup", "status", "kill"), 0)
        self._url = url
        self._address = BrokerAddress("simulated", "")
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *how: object) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with await aio_pika.connect(self._url) as connection:
            channel = await connection.channel(publisher_confirms=False)
            await channel.set_qos(prefetch_count=100)
            self._exchange = await channel.declare_exchange("pulsar", aio_pika.ExchangeType.DIRECT, durable=True)
            for what in self.counted:
                queue = await channel.declare_queue(self._address.queue(what), durable=True)
                await queue.bind(self._exchange, routing_key=queue.name)
                await queue.consume(functools.partial(self._take, what))
            self._ready.set()
            await self._stop.wait()

    async def _take(self, what: str, message: aio_pika.abc.AbstractIncomingMessage) -> None:
        self.counted[what] += 1
        content = json.loads(message.body)
        if what != "kill":
            status: dict[str, object] = {"job_id": content["job_id"], "complete": "false", "status": "running"}
            if content["job_id"].startswith("tesapi-probe"):
                said = {"event": "probed", "found": {"kind": "simulated"}, "sentence": "Nothing is run: simulated."}
                status |= {"complete": "true", "status": "complete", "returncode": 0, "job_stdout": json.dumps(said)}
            update = aio_pika.Message(json.dumps(status).encode(), content_type="application/json")
            await self._exchange.publish(update, routing_key=self._address.queue("status_update"))
        await message.ack()


def _measured(
    server: Server, client: _Client, runner: asyncio.Runner, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Jobs per second, and seconds for one alone: of tasks and of bare jobs, in turn."""
    many: dict[str, list[float]] = {"true": [], "runner": [], "task": []}
    one: dict[str, list[float]] = {"true": [], "runner": [], "task": []}
    complete(server, 1, _LOOK_S)
    for _ in range(rounds):
        for name in ("true", "runner"):
            many[name].append(_TASKS / runner.run(client.timed(name, _TASKS, _AT_ONCE)))
        many["task"].append(_TASKS / seconds(lambda: complete(server, _TASKS, _LOOK_AT_MANY_S)))
    for _ in range(_ALONE):
        for name in ("true", "runner"):
            one[name].append(runner.run(client.timed(name, 1, 1)))
        one["task"].append(seconds(lambda: complete(server, 1, _LOOK_S)))
    return tuple({name: statistics.median(found) for name, found in all_of.items()} for all_of in (many, one))  # type: ignore[return-value]


def _row(name: str, figure: float, unit: str) -> None:
    print(f"  {name:28} {figure:8.1f}{unit}")


async def _opened(url: str, runtime: Mapping[str, object]) -> _Client:
    client = _Client(runtime)
    await client.open(url)
    return client


class _Client:
    """Sends jobs and waits for their ends, and nothing else: what is lost stays lost, what is left stays there."""

    def __init__(self, runtime: Mapping[str, object]) -> None:
        self._runtime = runtime
        self._address = BrokerAddress("bare", "")
        self._ends: dict[str, asyncio.Future[Mapping[str, Any]]] = {}

    async def open(self, url: str) -> None:
        self._connection = await aio_pika.connect(url)
        channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
        self._exchange = await channel.declare_exchange("pulsar", aio_pika.ExchangeType.DIRECT, durable=True)
        queue = await channel.declare_queue(self._address.queue("status_update"), durable=True)
        await queue.bind(self._exchange, routing_key=queue.name)
        await queue.consume(self._take)
        setups = await channel.declare_queue(self._address.queue("setup"), durable=True)
        await setups.bind(self._exchange, routing_key=setups.name)

    async def close(self) -> None:
        await self._connection.close()

    async def _take(self, message: aio_pika.abc.AbstractIncomingMessage) -> None:
        update = json.loads(message.body)
        await message.ack()
        if update["complete"] == "true":
            self._ends.pop(update["job_id"]).set_result(update)

    async def timed(self, name: str, count: int, width: int) -> float:
        """How long so many jobs take, `width` of them at once."""
        room = asyncio.Semaphore(width)

        async def one() -> None:
            async with room:
                await self.job(name)

        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(count)))
        return time.perf_counter() - began

    async def job(self, name: str) -> None:
        """Have a job run to its end: the command `true`, or the runner with a task that does no more."""
        job_id = f"bare-{uuid.uuid4()}"
        files, command = {}, "true"
        if name == "runner":
            place = '"__PULSAR_JOB_DIRECTORY__/inputs'
            command = f'python3 -I -S -X utf8 {place}/runner.py" {place}/job.json"'
            files = {"runner.py": runner_text(__version__), "job.json": json.dumps(self._document(job_id))}
        staged = [
            {"name": name, "type": "input", "action": {"action_type": "message", "contents": text}}
            for name, text in files.items()
        ]
        setup = {
            "job_id": job_id,
            "command_line": command,
            "setup_params": {"job_id": job_id},
            "remote_staging": {"setup": staged},
        }
        end = self._ends[job_id] = asyncio.get_running_loop().create_future()
        message = aio_pika.Message(
            json.dumps(setup).encode(), content_type="application/json", delivery_mode=aio_pika.DeliveryMode.PERSISTENT
        )
        await self._exchange.publish(message, routing_key=self._address.queue("setup"), mandatory=True)
        assert (await end)["returncode"] == 0
        assert name == "true" or '"outcome": "complete"' in end.result()["job_stdout"]

    def _document(self, job_id: str) -> dict[str, object]:
        step = {"image": "alpine", "command": ["true"], "env": {}, "workdir": "", "stdin": "", "stdout": ""}
        return {
            "version": 1,
            "job_id": job_id,
            "task_id": "task",
            "store_id": "store",
            "limits": {},
            "executors": [{**step, "stderr": "", "ignore_error": False}],
            "inputs": [],
            "outputs": [],
            "volumes": [],
            "storage": {"file": {"roots": []}},
            "runtime": dict(self._runtime),
            "tail_bytes": 65536,
            "tidy": True,
        }
