"""Which process it is: a number alone does not tell, since numbers are given again, and machines restarted."""

from __future__ import annotations

from typing import Optional


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
