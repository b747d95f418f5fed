"""What a service takes that nobody asks for anything: memory, and CPU over some seconds."""

from __future__ import annotations

import os
import pathlib
import time

from tests.services.server import Server

_SECONDS = 20


def run(folder: pathlib.Path) -> None:
    """Measure and print."""
    with Server(folder) as server:
        assert server.process is not None
        proc = pathlib.Path("/proc", str(server.process.pid))
        time.sleep(2)
        before = _cpu_s(proc)
        time.sleep(_SECONDS)
        share = (_cpu_s(proc) - before) / _SECONDS
        pages = int((proc / "statm").read_text("ascii").split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    print(f"Idle, over {_SECONDS} s: {memory:.0f} MiB of memory, {share * 100:.2f} % of a core")


def _cpu_s(proc: pathlib.Path) -> float:
    fields = (proc / "stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
