"""Which process it is: a number alone does not tell, since numbers are given again, and machines restarted."""

from __future__ import annotations

import os
from typing import List, Optional


def start_time(pid: int) -> Optional[int]:
    """When a process started, in clock ticks since boot; None where it is gone. Source: proc(5), field 22 of stat."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def boot_id() -> str:
    """This run of the machine; empty where the kernel does not say."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def show_as(arguments: List[str]) -> None:
    """Have this process listed with other arguments, as far as there is room where its own ones are.

    Source: proc(5), arg_start and arg_end of stat. Where that is not allowed, it goes on under its old ones.
    """
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        if not 0 < start < end:
            return
        # The last byte stays zero: another one would mean that the arguments go on behind it.
        shown = b"".join(os.fsencode(argument) + b"\0" for argument in arguments)[: end - start - 1]
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(start)
            memory.write(shown.ljust(end - start, b"\0"))
    except (OSError, IndexError, ValueError):
        return
