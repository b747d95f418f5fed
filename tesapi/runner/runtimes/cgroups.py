"""Groups of processes to which the kernel gives no more than a job may have. Source: cgroups(7) and the kernel's
cgroup-v1 and cgroup-v2 documents.

A job's group lies in the runner's own, so that what confines the runner confines the job. In version 2 no group that
has processes can have limited ones in it; there the job's group lies beside the runner's.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Dict, List, NamedTuple, Optional

from ..job import Limits

CONTROLLERS = ("memory", "cpu", "pids")
_LEAST_MEMORY = 6 << 20
_PERIOD_US = 100_000
_LOOK_S = 0.01
_PATIENCE_S = 30.0


class Place(NamedTuple):
    """A directory in which groups of one controller can be made, and the version of cgroups that it is of."""

    directory: str
    version: int


def places(mountinfo: Optional[str] = None, groups: Optional[str] = None) -> Dict[str, Place]:
    """Where this process can make groups, by controller; `mountinfo` and `groups` as in proc(5)."""
    own = _own_groups(_read("/proc/self/cgroup") if groups is None else groups)
    found: Dict[str, Place] = {}
    for line in (_read("/proc/self/mountinfo") if mountinfo is None else mountinfo).splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(), [*after.split(), "", "", ""][:3]
        if kind == "cgroup":
            for controller in set(options.split(",")) & set(CONTROLLERS) & set(own):
                directory = _outside(own[controller], fields[3], fields[4])
                if _may_make_groups(directory):
                    found[controller] = Place(directory, 1)
        elif kind == "cgroup2" and "" in own:
            directory = _outside(own[""], fields[3], fields[4])
            beside = [os.path.dirname(directory)] if directory != fields[4] else []
            for candidate in (directory, *beside):
                for controller in _read(os.path.join(candidate, "cgroup.subtree_control")).split():
                    if controller in CONTROLLERS and controller not in found and _may_make_groups(candidate):
                        found[controller] = Place(candidate, 2)
    return found


def wanted(limits: Limits, pids_limit: int) -> List[str]:
    """The controllers that are needed for these limits."""
    asked = {"memory": limits.ram_gb, "cpu": limits.cpu_cores, "pids": pids_limit}
    return [controller for controller in CONTROLLERS if asked[controller]]


class Group:
    """The group `name` in each of `found`, by controller, with limits. Raises OSError.

    `directories` says where it is, and is known before anything is made.
    """

    def __init__(self, found: Dict[str, Place], name: str) -> None:
        self._found = dict(found)
        self._name = name
        self.directories = sorted({self._directory(controller) for controller in found})

    def make(self, limits: Limits, pids_limit: int) -> None:
        """Make it, and set its limits."""
        for directory in self.directories:
            os.makedirs(directory, exist_ok=True)
        if "memory" in self._found:
            memory = str(max(int((limits.ram_gb or 0) * 1e9), _LEAST_MEMORY))
            if self._found["memory"].version == 1:
                self._set("memory", "memory.limit_in_bytes", memory)
                self._set_if_there("memory", "memory.memsw.limit_in_bytes", memory)
            else:
                self._set("memory", "memory.max", memory)
                self._set_if_there("memory", "memory.swap.max", "0")
        if "cpu" in self._found:
            quota = (limits.cpu_cores or 1) * _PERIOD_US
            if self._found["cpu"].version == 1:
                self._set("cpu", "cpu.cfs_period_us", str(_PERIOD_US))
                self._set("cpu", "cpu.cfs_quota_us", str(quota))
            else:
                self._set("cpu", "cpu.max", f"{quota} {_PERIOD_US}")
        if "pids" in self._found:
            self._set("pids", "pids.max", str(pids_limit))

    def add(self, pid: int) -> None:
        """Let the limits hold for a process and for all that it starts from now on."""
        for directory in self.directories:
            _write(os.path.join(directory, "cgroup.procs"), str(pid))

    def ran_out_of_memory(self) -> bool:
        """Whether the kernel has killed something in it because its memory was used up."""
        if "memory" not in self._found:
            return False
        name = "memory.oom_control" if self._found["memory"].version == 1 else "memory.events"
        lines = (line.split() for line in _read(os.path.join(self._directory("memory"), name)).splitlines())
        return any(line[0] == "oom_kill" and line[1] != "0" for line in lines if len(line) == 2)

    def _directory(self, controller: str) -> str:
        return os.path.join(self._found[controller].directory, self._name)

    def _set(self, controller: str, name: str, value: str) -> None:
        _write(os.path.join(self._directory(controller), name), value)

    def _set_if_there(self, controller: str, name: str, value: str) -> None:
        if os.path.exists(os.path.join(self._directory(controller), name)):
            self._set(controller, name, value)


def remove(directory: str) -> bool:
    """End what is in a group, and remove it; whether it is gone."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            return True
        except OSError:
            for pid in _read(os.path.join(directory, "cgroup.procs")).split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    pass
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK_S)


def _own_groups(text: str) -> Dict[str, str]:
    """The paths of this process's groups by controller; that of version 2 stands under the empty name."""
    own = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(","), path))
    return own


def _outside(path: str, root: str, mount_point: str) -> str:
    """Where the group `path` is seen, when the group `root` is mounted at `mount_point`."""
    inside = os.path.relpath(path, root)
    return mount_point if inside == "." or inside.startswith("..") else os.path.join(mount_point, inside)


def _may_make_groups(directory: str) -> bool:
    return os.access(directory, os.W_OK) and os.access(os.path.join(directory, "cgroup.procs"), os.W_OK)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def _write(path: str, value: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, value.encode("ascii"))
    finally:
        os.close(descriptor)
