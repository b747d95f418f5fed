"""Tasks that several dispatchers drive from one MongoDB, beside one alone, at a destination that takes no time.

Each dispatcher is held to a share of a processor, as if it had a small machine of its own: on the two that are here, a
second one would otherwise take from MongoDB what it needs itself.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pymongo

from benchmarks.pulsar import answers
from tests.daemon import free_port
from tests.engines import Missing
from tests.jobs import until
from tests.mongod import Mongod, install
from tests.services.server import Server

_TASKS = 300
_MAX_JOBS = 64
_SHARE = 0.2
_PERIOD_US = 20_000
_TRUE = {"executors": [{"image": "alpine", "command": ["true"]}]}
_CGROUP = pathlib.Path("/sys/fs/cgroup")


def run(folder: pathlib.Path, rounds: int) -> None:
    """Measure and print."""
    try:
        program = install()
    except Missing as why:
        print(f"dispatchers: not measured. It {why}.")
        return
    if _files("x") is None:
        print("dispatchers: not measured. It needs root and the processor controller of cgroups.")
        return
    rates: dict[int, list[float]] = {1: [], 2: []}
    with Mongod(folder / "mongod", program) as mongod, _ending() as url:
        for number in range(rounds):
            for count, found in rates.items():
                place = folder / f"{number}-{count}"
                place.mkdir()
                found.append(_rate(place, mongod, url, count))
    one, two = (statistics.median(found) for found in rates.values())
    print(
        f"{_TASKS} tasks at a destination that takes no time, {_SHARE:.0%} of a processor for each dispatcher, ", end=""
    )
    print(f"{rounds} rounds, load {os.getloadavg()[0]:.1f}")
    print(f"  one dispatcher    {one:8.1f}/s")
    print(f"  two dispatchers   {two:8.1f}/s   {two / one:5.2f} of one")


def _rate(folder: pathlib.Path, mongod: Mongod, url: str, count: int) -> float:
    """Tasks per second, from a tenth of them to the last tenth, of so many dispatchers."""
    database = mongod.database_url(folder.name)
    site = {"URL": url, "MAX_JOBS": _MAX_JOBS, "RUNTIME__KIND": "bubblewrap"}
    settings = {f"DESTINATIONS__SITE__{key}": value for key, value in site.items()}
    settings |= {"DB__MONGODB_URI": database, "SERVER__DATA_DIR": str(folder / "data")}
    (folder / "api").mkdir()
    with contextlib.ExitStack() as stack:
        client: pymongo.MongoClient[dict[str, Any]] = stack.enter_context(pymongo.MongoClient(database))
        api = stack.enter_context(Server(folder / "api", "api", **settings))
        for _ in range(_TASKS):
            api.post(_TRUE)
        for number in range(count):
            (place := folder / f"dispatcher{number}").mkdir()
            dispatcher = stack.enter_context(Server(place, "dispatcher", **settings))
            assert dispatcher.process is not None
            stack.enter_context(_held(dispatcher.process.pid))
        tasks = client.get_default_database()["tasks"]
        at = [_when(tasks, _TASKS * tenths // 10) for tenths in (1, 9)]
        found = {row["_id"]: row["n"] for row in tasks.aggregate([{"$group": {"_id": "$state", "n": {"$sum": 1}}}])}
        assert set(found) <= {"COMPLETE", "QUEUED", "INITIALIZING", "RUNNING"}, found
        _when(tasks, _TASKS)
    return _TASKS * 0.8 / (at[1] - at[0])


def _when(tasks: Any, count: int) -> float:
    """When so many had ended."""
    until(lambda: tasks.count_documents({"state": "COMPLETE"}) >= count or None, f"{count} tasks to end", 300)
    return time.perf_counter()


@contextlib.contextmanager
def _ending() -> Iterator[str]:
    port = free_port()
    with subprocess.Popen([sys.executable, "-m", "benchmarks.simulated_pulsar", str(port), "--ends"]) as process:
        url = f"http://127.0.0.1:{port}"
        until(lambda: answers(url) or None, "the simulated Pulsar")
        yield url
        process.terminate()


def _files(name: str) -> tuple[pathlib.Path, dict[str, str]] | None:
    """The folder of a group of processes, and what is to be written into its files; None where nobody may."""
    quota = int(_PERIOD_US * _SHARE)
    if os.getuid() != 0:
        return None
    if (_CGROUP / "cpu" / "cpu.cfs_quota_us").exists():
        return _CGROUP / "cpu" / name, {"cpu.cfs_period_us": str(_PERIOD_US), "cpu.cfs_quota_us": str(quota)}
    if "cpu" in _text(_CGROUP / "cgroup.subtree_control").split():
        return _CGROUP / name, {"cpu.max": f"{quota} {_PERIOD_US}"}
    return None


def _text(file: pathlib.Path) -> str:
    return file.read_text("ascii") if file.exists() else ""


@contextlib.contextmanager
def _held(pid: int) -> Iterator[None]:
    """Hold a process, with all its threads, to `_SHARE`."""
    found = _files(f"tesapi-bench-{pid}")
    assert found is not None
    group, limits = found
    group.mkdir()
    try:
        for name, value in limits.items():
            (group / name).write_text(value, "ascii")
        (group / "cgroup.procs").write_text(str(pid), "ascii")
        yield
    finally:
        (group.parent / "cgroup.procs").write_text(str(pid), "ascii")
        group.rmdir()
