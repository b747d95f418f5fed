"""Tasks through a real Pulsar over REST, beside a client that does the least that has to be done for the same jobs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from benchmarks.idle import cpu_s, memory_mib
from tesapi import __version__
from tesapi.backends.runtimes import RuntimeOptions, RuntimeProbe
from tesapi.jobs.bundle import runner_text
from tests import pulsars
from tests.daemon import free_port
from tests.engines import Missing
from tests.jobs import sandboxes, step, until
from tests.pulsars import Pulsar
from tests.services.server import SETTLED, Server

_ALONE = 15
_MANY = 48
_IN_FLIGHT = 16
_CANCELS = 20
_IDLE_JOBS = 1000
_IDLE_S = 60
_POLL_S = 0.02
_LOOK_S = 0.005
_LOOK_AT_MANY_S = 0.05
_TRUE = {"executors": [{"image": "alpine", "command": ["true"]}]}
_SLEEP = {
    "executors": [{"image": "alpine", "command": ["sh", "-c", "trap '' TERM; echo on; while :; do sleep 1; done"]}]
}


def run(folder: pathlib.Path, rounds: int) -> None:
    """Measure and print."""
    probe = RuntimeProbe(folder, RuntimeOptions("bubblewrap", images=[("alpine", "host")]))
    probe.look()
    try:
        programs = pulsars.install()
    except Missing as why:
        print(f"pulsar: not measured. It {why}.")
        return
    if probe.found is None:
        print(f"pulsar: not measured. {probe.sentence}")
        return
    with Pulsar(folder / "pulsar", programs) as pulsar:
        with Server(folder, **_destination(pulsar.url, pulsar.token)) as server:
            _complete(server, 2, _LOOK_S)
            _compare(server, pulsar, probe.found, rounds)
            _cancel(server)
    _idle(folder / "idle")


def _destination(url: str, token: str, max_jobs: int = _IN_FLIGHT) -> dict[str, object]:
    own = {"URL": url, "PRIVATE_TOKEN": f'"{token}"', "MAX_JOBS": max_jobs, "RUNTIME__KIND": "bubblewrap"}
    own["RUNTIME__BUBBLEWRAP__IMAGES"] = '{ alpine = "host" }'
    return {f"DESTINATIONS__SITE__{key}": value for key, value in own.items()}


def _compare(server: Server, pulsar: Pulsar, runtime: Mapping[str, object], rounds: int) -> None:
    theirs, ours, their_rates, our_rates = [], [], [], []
    for _ in range(rounds):
        for _ in range(_ALONE // rounds + 1):
            theirs += asyncio.run(_bare(pulsar, runtime, 1, 1))
            ours.append(_seconds_of(server, 1, _LOOK_S))
        began = time.perf_counter()
        asyncio.run(_bare(pulsar, runtime, _MANY, _IN_FLIGHT))
        their_rates.append(_MANY / (time.perf_counter() - began))
        our_rates.append(_MANY / _seconds_of(server, _MANY, _LOOK_AT_MANY_S))
    print(f"Pulsar over REST, bubblewrap, no-op tasks, {rounds} rounds, load {os.getloadavg()[0]:.1f}")
    latency, reference = statistics.median(ours), statistics.median(theirs)
    print(f"  bare client, one alone, until it has the report  {reference * 1e3:8.1f} ms")
    print(
        f"  POST to COMPLETE, one alone                      {latency * 1e3:8.1f} ms  {latency / reference:5.2f} of it"
    )
    rate, reference = statistics.median(our_rates), statistics.median(their_rates)
    print(f"  bare client, {_IN_FLIGHT} in flight                        {reference:8.1f}/s")
    print(f"  tasks, {_IN_FLIGHT} in flight                              {rate:8.1f}/s  {rate / reference:5.2f} of it")


async def _bare(pulsar: Pulsar, runtime: Mapping[str, object], count: int, at_once: int) -> list[float]:
    """Run no-op jobs: set up, two uploads, submit, poll, delete; the seconds of each until its report is there."""
    took: list[float] = []
    left = iter(range(count))
    async with httpx.AsyncClient(
        base_url=pulsar.url, params={"private_token": pulsar.token}, limits=httpx.Limits(max_connections=4)
    ) as client:
        async with asyncio.TaskGroup() as workers:
            for _ in range(at_once):
                workers.create_task(_worker(client, runtime, left, took))
    return took


async def _worker(
    client: httpx.AsyncClient, runtime: Mapping[str, object], left: Iterator[int], took: list[float]
) -> None:
    for _ in left:
        began = time.perf_counter()
        job_id = f"bare-{uuid.uuid4()}"
        place = (await client.post("/jobs", params={"job_id": job_id})).json()
        inputs = place["inputs_directory"]
        files = {
            "runner.py": runner_text(__version__).encode(),
            "job.json": json.dumps(_document(job_id, runtime)).encode(),
        }
        for name, data in files.items():
            await client.post(f"/jobs/{job_id}/files", params={"name": name, "type": "input"}, content=data)
        command = f"python3 -I -S {inputs}/runner.py {inputs}/job.json"
        await client.post(f"/jobs/{job_id}/submit", params={"command_line": command})
        status: dict[str, Any] = {}
        while status.get("complete") != "true":
            await asyncio.sleep(_POLL_S)
            status = (await client.get(f"/jobs/{job_id}/status")).json()
        assert '"outcome": "complete"' in status["job_stdout"]
        took.append(time.perf_counter() - began)
        await client.delete(f"/jobs/{job_id}")


def _document(job_id: str, runtime: Mapping[str, object]) -> dict[str, object]:
    return {
        "version": 1,
        "job_id": job_id,
        "task_id": "bare",
        "store_id": "bare",
        "limits": {},
        "executors": [step("true")],
        "inputs": [],
        "outputs": [],
        "volumes": [],
        "storage": {"file": {"roots": []}},
        "runtime": dict(runtime),
        "tail_bytes": 65536,
        "tidy": True,
    }


def _seconds_of(server: Server, count: int, look_s: float) -> float:
    began = time.perf_counter()
    _complete(server, count, look_s)
    return time.perf_counter() - began


def _complete(server: Server, count: int, look_s: float) -> None:
    """Have so many tasks run to their ends, and look for that every `look_s`."""
    left = [server.post(_TRUE) for _ in range(count)]
    while left:
        state = server.get(left[-1], "MINIMAL")["state"]
        if state in SETTLED:
            assert state == "COMPLETE", server.get(left[-1])
            left.pop()
        else:
            time.sleep(look_s)


def _cancel(server: Server) -> None:
    """From the request until no container is left, for running tasks that ignore SIGTERM, one after the other."""
    took = []
    for _ in range(_CANCELS // 5):
        tasks = [server.post(_SLEEP) for _ in range(5)]
        until(lambda tasks=tasks: all(_prints(server.get(task)) for task in tasks) or None, "all to run", 60)
        jobs = {task: server.get(task)["logs"][-1]["metadata"]["job_id"] for task in tasks}
        for task in tasks:
            began = time.perf_counter()
            server.cancel(task)
            until(lambda job_id=jobs[task]: not sandboxes(job_id) or None, "the container to be gone", 60)
            took.append(time.perf_counter() - began)
        for task in tasks:
            assert server.wait_for(task) == "CANCELED"
    print(f"  cancel to container gone, {len(took)} tasks:", end=" ")
    print(f"median {statistics.median(took):.2f} s, longest {max(took):.2f} s")


def _prints(task: Mapping[str, Any]) -> bool:
    return any("on" in run.get("stdout", "") for log in task["logs"] for run in log["logs"])


def _idle(folder: pathlib.Path) -> None:
    """What very many jobs in flight take that nobody looks at, beside the same service without any."""
    folder.mkdir()
    with _simulated() as url, Server(folder, **_destination(url, "", _IDLE_JOBS)) as server:
        assert server.process is not None
        pid = server.process.pid
        time.sleep(3)
        memory, began = memory_mib(pid), cpu_s(pid)
        time.sleep(_IDLE_S / 3)
        alone = (cpu_s(pid) - began) / (_IDLE_S / 3)
        for _ in range(_IDLE_JOBS):
            server.post(_TRUE)
        until(lambda: all(task["state"] == "RUNNING" for task in server.all()) or None, "all to run", 300)
        time.sleep(_IDLE_S)  # they are asked for less and less often
        began = cpu_s(pid)
        time.sleep(_IDLE_S)
        share, more = (cpu_s(pid) - began) / _IDLE_S, memory_mib(pid) - memory
    print(f"  {_IDLE_JOBS} jobs in flight, simulated, over {_IDLE_S} s: {share * 100:.1f} % of a core", end="")
    print(f" (without any {alone * 100:.1f} %), {more:.0f} MiB more than without")


@contextlib.contextmanager
def _simulated() -> Iterator[str]:
    port = free_port()
    with subprocess.Popen([sys.executable, "-m", "benchmarks.simulated_pulsar", str(port)]) as process:
        url = f"http://127.0.0.1:{port}"
        until(lambda: answers(url) or None, "the simulated Pulsar")
        yield url
        process.terminate()


def answers(url: str) -> bool:
    """Whether a Pulsar, or something like it, is there."""
    try:
        return httpx.get(f"{url}/healthz").status_code == 200
    except httpx.TransportError:
        return False
