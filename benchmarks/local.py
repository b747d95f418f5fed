"""No-op tasks on the local backend, beside bare loops that start the same sandboxes, containers and processes."""

from __future__ import annotations

import itertools
import os
import pathlib
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

from tesapi.backends.runtimes import RuntimeOptions, RuntimeProbe
from tesapi.jobs.bundle import CODE_SUFFIX, runner_code
from tests.engines import DockerEngine, Missing
from tests.engines import docker as docker_engine
from tests.jobs import JobPlace, step
from tests.services.server import SETTLED, Server

_TASKS = 60
_CONTAINERS = 20
_ALONE = 10
_PATIENCE_S = 300.0
_LOOK_S = 0.005  # while one task runs alone
_LOOK_AT_MANY_S = 0.05  # whoever asks takes time from what is measured
_TRUE = {"executors": [{"image": "alpine", "command": ["true"]}]}


def bubblewrap(folder: pathlib.Path, rounds: int) -> None:
    """Measure with bubblewrap, and print."""
    probe = RuntimeProbe(folder, RuntimeOptions("bubblewrap", images=[("alpine", "host")]))
    probe.look()
    if probe.found is None:
        print(f"local: not measured. {probe.sentence}")
        return
    with Server(folder) as server:
        runners = _Runners(folder / "bare", probe.found)
        sandbox = _bwrap(str(probe.found["program"]))
        loops = {"a bare loop of bwrap": lambda: _call(sandbox), "a bare loop of runners": runners.run}
        _compare("Local backend, bubblewrap", server, loops, _TASKS, rounds)
        _phases(server)


def docker(folder: pathlib.Path, rounds: int) -> None:
    """Measure with a Docker engine of its own, and print."""
    try:
        with docker_engine() as engine:
            _docker(folder, rounds, engine)
    except Missing as why:
        print(f"docker: not measured. It {why}.")


def _docker(folder: pathlib.Path, rounds: int, engine: DockerEngine) -> None:
    host = f"unix://{engine.socket}"
    settings = {"KIND": "docker", "DOCKER__HOST": host, "PULL": "never", "NETWORK": "none"}
    container = [shutil.which("docker") or "docker", "-H", host, "run", "--rm", "--network", "none", "alpine", "true"]
    with Server(folder, **{f"RUNTIME__{name}": value for name, value in settings.items()}) as server:
        runners = _Runners(folder / "bare", engine.settings())
        loops = {"a bare loop of docker run": lambda: _call(container), "a bare loop of runners": runners.run}
        _compare("Local backend, Docker", server, loops, _CONTAINERS, rounds)
        theirs, ours = [], []
        for _ in range(_ALONE):
            theirs.append(seconds(lambda: _call(container)))
            ours.append(seconds(lambda: complete(server, 1, _LOOK_S)))
        reference, latency = statistics.median(theirs), statistics.median(ours)
        print(f"  docker run, one alone        {reference * 1e3:8.1f} ms")
        print(f"  POST to COMPLETE, one alone  {latency * 1e3:8.1f} ms   {latency / reference:5.2f} of docker run")
        _phases(server)


def _compare(title: str, server: Server, loops: Mapping[str, Callable[[], None]], count: int, rounds: int) -> None:
    """Tasks per second, beside each of `loops` at the same concurrency."""
    width = len(os.sched_getaffinity(0))
    rates: dict[str, list[float]] = {name: [] for name in loops}
    tasks = []
    for _ in range(rounds):
        for name, loop in loops.items():
            rates[name].append(count / seconds(lambda loop=loop: _at_once(loop, count, width)))  # type: ignore[misc]
        tasks.append(count / seconds(lambda: complete(server, count, _LOOK_AT_MANY_S)))
    print(f"{title}, {count} no-op tasks, {width} at once, {rounds} rounds, load {os.getloadavg()[0]:.1f}")
    ours = statistics.median(tasks)
    print(f"  {'tasks to COMPLETE':28} {ours:8.1f}/s")
    for name, found in rates.items():
        print(f"  {name:28} {statistics.median(found):8.1f}/s   tasks: {ours / statistics.median(found):5.2f} of it")


def _at_once(loop: Callable[[], None], count: int, width: int) -> None:
    with ThreadPoolExecutor(width) as pool:
        for _ in pool.map(lambda _: loop(), range(count)):
            pass


def _call(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _bwrap(program: str) -> list[str]:
    roots = [part for name in ("bin", "lib", "lib64") for part in ("--symlink", f"usr/{name}", f"/{name}")]
    command = [program, "--unshare-all", "--die-with-parent", "--ro-bind", "/usr", "/usr", *roots, "--proc", "/proc"]
    return [*command, "--dev", "/dev", "true"]


class _Runners:
    """Runners of the same job, each a Python of its own in a place of its own; nobody follows them.

    The service forks its runners from a warm one, and so may be faster than this.
    """

    def __init__(self, folder: pathlib.Path, runtime: Mapping[str, object]) -> None:
        self._folder = folder
        self._runtime = runtime
        self._numbers = itertools.count()

    def run(self) -> None:
        """Make a place, run a job in it to its end, and remove it."""
        folder = self._folder / str(next(self._numbers))
        folder.mkdir(parents=True)
        place = JobPlace(folder, self._runtime)
        place.write(step("true"))
        (place.directory / "inputs" / f"runner.py{CODE_SUFFIX}").write_bytes(runner_code())
        _call(place.command())
        assert b'"outcome": "complete"' in place.report_file.read_bytes()
        shutil.rmtree(folder)


def complete(server: Server, count: int, look_s: float) -> None:
    """Have so many tasks run to their end, and look for that every `look_s`."""
    left = [server.post(_TRUE) for _ in range(count)]
    deadline = time.monotonic() + _PATIENCE_S
    while left:
        state = server.get(left[-1], "MINIMAL")["state"]
        if state in SETTLED:
            assert state == "COMPLETE", state
            left.pop()
        else:
            assert time.monotonic() < deadline, f"{len(left)} tasks have not ended"
            time.sleep(look_s)


def seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _phases(server: Server) -> None:
    """Where the time of one task alone goes, by what its record and the clock of whoever asks say."""
    rows = [_phases_of_one(server) for _ in range(_ALONE)]
    print(f"  One task alone, ms, median of {_ALONE}")
    for name in rows[0]:
        print(f"    {name:44} {statistics.median(row[name] for row in rows) * 1e3:8.1f}")


def _phases_of_one(server: Server) -> dict[str, float]:
    asked = time.time()
    task_id = server.post(_TRUE)
    accepted = time.time()
    while server.get(task_id, "MINIMAL")["state"] not in SETTLED:
        time.sleep(_LOOK_S)
    told = time.time()
    while server.jobs:
        time.sleep(_LOOK_S)
    discarded = time.time()
    logs: dict[str, Any] = server.get(task_id)["logs"][-1]
    moments = {"POST to answer (stored)": accepted, **_moments(logs)}
    moments |= {"end reported to COMPLETE seen": told, "COMPLETE to the job's place gone": discarded}
    steps = dict(zip(moments, itertools.pairwise([asked, *moments.values()]), strict=True))
    return {name: after - before for name, (before, after) in steps.items()} | {"in all, to COMPLETE": told - asked}


def _moments(logs: Mapping[str, Any]) -> dict[str, float]:
    executor = logs["logs"][0]
    return {
        "answer to runner's start (placed, imported)": _at(logs["start_time"]),
        "start to executor (watchdog, staged in)": _at(executor["start_time"]),
        "executor (sandbox or container)": _at(executor["end_time"]),
        "executor to end (staged out)": _at(logs["end_time"]),
    }


def _at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
