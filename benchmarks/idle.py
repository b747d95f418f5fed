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
        pid = server.process.pid
        time.sleep(2)
        before = cpu_s(pid)
        time.sleep(_SECONDS)
        share = (cpu_s(pid) - before) / _SECONDS
        memory = memory_mib(pid)
    print(f"Idle, over {_SECONDS} s: {memory:.0f} MiB of memory, {share * 100:.2f} % of a core")


def memory_mib(pid: int) -> float:
    """How much memory a process has resident, in MiB."""
    pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu_s(pid: int) -> float:
    """How many seconds of CPU a process has taken."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
