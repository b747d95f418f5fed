"""No-op tasks on the local backend beside a bare loop that starts the same sandboxes."""

from __future__ import annotations

import os
import pathlib
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

from tesapi.backends.runtimes import RuntimeOptions, RuntimeProbe
from tests.jobs import until
from tests.services.server import Server

_TASKS = 60
_TRUE = {"executors": [{"image": "alpine", "command": ["true"]}]}


def run(folder: pathlib.Path, rounds: int) -> None:
    """Measure and print."""
    probe = RuntimeProbe(folder, RuntimeOptions("bubblewrap"))
    probe.look()
    if probe.found is None:
        print(f"local: not measured. {probe.sentence}")
        return
    width = len(os.sched_getaffinity(0))
    bare, tasks = [], []
    with Server(folder) as server:
        for _ in range(rounds):
            bare.append(_bare(str(probe.found["program"]), width))
            tasks.append(_tasks(server))
    ours, reference = statistics.median(tasks), statistics.median(bare)
    print(f"Local backend, {_TASKS} no-op tasks, {width} at once, {rounds} rounds")
    print(f"  a bare loop of bwrap {reference:8.1f}/s")
    print(f"  tasks to COMPLETE    {ours:8.1f}/s   {ours / reference:5.2f} of the bare loop")


def _bare(program: str, width: int) -> float:
    roots = [part for name in ("bin", "lib", "lib64") for part in ("--symlink", f"usr/{name}", f"/{name}")]
    command = [program, "--unshare-all", "--die-with-parent", "--ro-bind", "/usr", "/usr", *roots, "--proc", "/proc"]
    command += ["--dev", "/dev", "true"]
    began = time.perf_counter()
    with ThreadPoolExecutor(width) as pool:
        for _ in pool.map(lambda _: subprocess.run(command, check=True), range(_TASKS)):
            pass
    return _TASKS / (time.perf_counter() - began)


def _tasks(server: Server) -> float:
    began = time.perf_counter()
    ids = [server.post(_TRUE) for _ in range(_TASKS)]
    until(lambda: all(server.get(task_id, "MINIMAL")["state"] == "COMPLETE" for task_id in reversed(ids)), "the tasks")
    return _TASKS / (time.perf_counter() - began)
