"""No-op tasks on the local backend, beside bare loops that start the same processes."""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tesapi.backends.runtimes import RuntimeOptions, RuntimeProbe
from tests import engines
from tests.jobs import JobPlace, step, until
from tests.services.server import Server

_TASKS = 60
_TRUE = {"executors": [{"image": "alpine", "command": ["true"]}]}


def run(folder: pathlib.Path, rounds: int) -> None:
    """Measure bubblewrap, and print."""
    probe = RuntimeProbe(folder, RuntimeOptions("bubblewrap", images=[("alpine", "host")]))
    probe.look()
    if probe.found is None:
        print(f"local: not measured. {probe.sentence}")
        return
    found = probe.found
    with Server(folder) as server:
        _compare(
            "bubblewrap",
            rounds,
            {
                "a bare loop of bwrap": lambda: _bare(_bwrap(str(found["program"])), _TASKS),
                "a bare loop of runners": lambda: _runners(folder, found, _TASKS),
                "tasks to COMPLETE": lambda: _tasks(server, _TASKS),
            },
        )
        _print_latency(rounds, server, _bwrap(str(found["program"])), "bwrap")
        _print_phases(server)


def run_docker(folder: pathlib.Path, rounds: int) -> None:
    """Measure a Docker engine, and print."""
    try:
        with engines.docker() as engine:
            environment = {"RUNTIME__KIND": "docker", "RUNTIME__DOCKER__HOST": f"unix://{engine.socket}"}
            environment |= {"RUNTIME__PULL": "never", "RUNTIME__NETWORK": "none"}
            command = ["docker", "-H", f"unix://{engine.socket}", "run", "--rm", "--init", "--network", "none"]
            command += ["alpine", "true"]
            with Server(folder, **environment) as server:
                _compare(
                    "docker",
                    rounds,
                    {
                        "a bare loop of docker run": lambda: _bare(command, 20),
                        "a bare loop of runners": lambda: _runners(folder, engine.settings(), 20),
                        "tasks to COMPLETE": lambda: _tasks(server, 20),
                    },
                )
                _print_latency(rounds, server, command, "docker run")
                _print_phases(server)
    except engines.Missing as why:
        print(f"docker: not measured, {why}")


def _compare(name: str, rounds: int, loops: Mapping[str, Callable[[], float]]) -> None:
    measured: dict[str, list[float]] = {what: [] for what in loops}
    for _ in range(rounds):
        for what, loop in loops.items():
            measured[what].append(loop())
    figures = {what: statistics.median(values) for what, values in measured.items()}
    ours = figures["tasks to COMPLETE"]
    print(f"Local backend on {name}, no-op tasks, {_width()} at once, {rounds} rounds")
    for what, figure in figures.items():
        ratio = "" if what == "tasks to COMPLETE" else f"   the tasks are {ours / figure:5.2f} of it"
        print(f"  {what:26} {figure:8.1f}/s{ratio}")


def _print_latency(rounds: int, server: Server, command: list[str], name: str) -> None:
    ours, bare = [], []
    for _ in range(3 * rounds):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        bare.append(time.perf_counter() - began)
        began = time.perf_counter()
        _wait(server, [server.post(_TRUE)])
        ours.append(time.perf_counter() - began)
    task, reference = statistics.median(ours), statistics.median(bare)
    print(
        f"  one task, POST to COMPLETE {task * 1000:6.0f} ms; {name} {reference * 1000:.0f} ms: {task / reference:.2f}"
    )


def _print_phases(server: Server) -> None:
    """Where the time of one task goes, by what it says of itself."""
    phases: dict[str, list[float]] = {
        "until its runner began": [],
        "runner until start": [],
        "container": [],
        "rest": [],
    }
    for _ in range(10):
        posted = time.time()
        task_id = server.post(_TRUE)
        _wait(server, [task_id])
        seen = time.time()
        log = server.get(task_id)["logs"][0]
        step_log = log["logs"][0]
        began, start, end = (_seconds(at) for at in (log["start_time"], step_log["start_time"], step_log["end_time"]))
        for phase, took in zip(phases, (began - posted, start - began, end - start, seen - end), strict=True):
            phases[phase].append(took)
    told = ", ".join(f"{phase} {statistics.median(values) * 1000:.0f}" for phase, values in phases.items())
    print(f"  of which in ms: {told}")


def _seconds(at: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(at).timestamp()


def _bwrap(program: str) -> list[str]:
    roots = [part for name in ("bin", "lib", "lib64") for part in ("--symlink", f"usr/{name}", f"/{name}")]
    command = [program, "--unshare-all", "--die-with-parent", "--ro-bind", "/usr", "/usr", *roots, "--proc", "/proc"]
    return [*command, "--dev", "/dev", "true"]


def _bare(command: list[str], count: int) -> float:
    began = time.perf_counter()
    with ThreadPoolExecutor(_width()) as pool:
        for _ in pool.map(lambda _: subprocess.run(command, check=True, stdout=subprocess.DEVNULL), range(count)):
            pass
    return count / (time.perf_counter() - began)


def _runners(folder: pathlib.Path, runtime: Mapping[str, Any], count: int) -> float:
    """The runner as a command, each with a job of its own that is written beforehand."""
    places = [JobPlace(folder, runtime) for _ in range(count)]
    for place in places:
        place.write(step("true"))
    began = time.perf_counter()
    with ThreadPoolExecutor(_width()) as pool:
        for ended in pool.map(lambda place: _run(place), places):
            assert ended == "complete"
    return count / (time.perf_counter() - began)


def _run(place: JobPlace) -> str:
    said = subprocess.run(place.command(sys.executable), check=True, stdout=subprocess.PIPE, env={}).stdout
    return str(json.loads(said.splitlines()[-1])["outcome"])


def _tasks(server: Server, count: int) -> float:
    began = time.perf_counter()
    _wait(server, [server.post(_TRUE) for _ in range(count)])
    return count / (time.perf_counter() - began)


def _wait(server: Server, ids: list[str]) -> None:
    until(lambda: all(server.get(task_id, "MINIMAL")["state"] == "COMPLETE" for task_id in reversed(ids)), "the tasks")


def _width() -> int:
    return len(os.sched_getaffinity(0))
