"""Sandboxes by bubblewrap, which has no images: an image is mapped to a root file system, or to `host`.

`host` is never the whole machine: it is this machine's /usr read-only, the usual links into it, and a generated /etc.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import posixpath
import re
import resource
import select
import signal
import subprocess
import time
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Union

from ..job import Limits, Owner, Refused, Step
from ..mounts import Mount, Namespace, follow_links, is_within
from ..processes import boot_id, start_time
from ..report import tail
from . import cgroups
from .base import Check, End, Note, Room
from .containers import out_of_memory
from .process import ProcessContainer, spawn, unnamed

HOST = "host"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LINKS_INTO_USR = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
# Not of the image: fresh ones are made.
_OWN = ("proc", "dev", "sys", "tmp", "run")
# /etc/alternatives holds links only, without which /usr/bin/awk leads nowhere on Debian.
_ETC_FROM_HOST = (
    "alternatives",
    "ld.so.cache",
    "ssl/certs",
    "ssl/openssl.cnf",
    "pki/tls/certs",
    "pki/ca-trust/extracted",
    "ca-certificates",
)
_ETC_MADE = {
    "passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "group": "root:x:0:\nnogroup:x:65534:\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}
_SWEEP_INTERVAL_S = 0.05
_LOOK_S = 0.005
_UNREACHED = re.compile(r"^bwrap: execvp .*: ([^:\n]*)$", re.MULTILINE)


ARGUMENTS_FD = 20
STATUS_FD = 21
GATE_FD = 22
"""Descriptors at which bwrap finds most of its arguments, writes how its child began and ended, and waits to go on."""

_GATE = "gate"
_STATUS_BYTES = 64 << 10
_BEGIN_S = 60.0


class Bubblewrap:
    """`settings` are `program` (path of bwrap), `images` (`[[pattern, "host" or a directory], ...]`), `pids_limit`,
    `network` (`none`, or this machine's).
    """

    foreign_users = False
    outlives = False

    def __init__(self, settings: Dict[str, Any], owner: Owner, note: Note) -> None:
        self._program: str = settings["program"]
        self._images: List[List[str]] = settings["images"]
        self._hostname = owner.job_id[:64]
        self._place = os.path.dirname(os.path.dirname(owner.lock))
        self._boxes = os.path.join(os.path.dirname(owner.lock), "boxes")
        self._network = settings.get("network", "default")
        self._pids_limit = int(settings.get("pids_limit") or 0)
        self._group = f"tesapi-{owner.job_id}"
        self._groups = os.path.join(os.path.dirname(owner.lock), "cgroups")
        self._note = note
        self._all_known = False

    def unsupported(self, image: str) -> Optional[str]:
        root = self._root_of(image)
        if root is None:
            known = ", ".join(pattern for pattern, _ in self._images) or "none"
            return (
                f"The image {image} is not mapped to a root file system: bubblewrap runs only images that "
                f"runtime.bubblewrap.images in settings.toml maps to a directory or to host (mapped now: {known})."
            )
        if root != HOST and not os.path.isdir(root):
            return f"The image {image} is mapped to {root}, which is not a directory on this machine."
        return None

    def unenforced(self, limits: Limits) -> List[str]:
        found = cgroups.places()
        why = "is not enforced here: the runner may not make a cgroup for"
        sentences = []
        if limits.ram_gb and "memory" not in found:
            sentences.append(f"resources.ram_gb {why} memory.")
        if limits.cpu_cores and "cpu" not in found:
            sentences.append(f"resources.cpu_cores {why} CPUs.")
        if limits.disk_gb:
            sentences.append("resources.disk_gb is not enforced here: bubblewrap cannot limit a sandbox's disk.")
        return sentences

    def pull(self, image: str, check: Check) -> None:
        return

    def others(self) -> List[Owner]:
        return []  # a sandbox dies with its runner

    def remove(self) -> None:
        for pid, started in self._known_boxes():
            _end_box(pid, started)
        if not self._all_known:
            _sweep(self._marks(), self._place)
        for group in _lines(self._groups):
            if not cgroups.remove(group):
                self._note(f"The cgroup {group} cannot be removed.")
        if os.path.exists(self._groups):
            os.unlink(self._groups)

    def container(self, step: Step, room: Room) -> ProcessContainer:
        mapped = self._root_of(step.image)
        if mapped is None:
            raise Refused(str(self.unsupported(step.image)))
        image = _HostImage() if mapped == HOST else _DirectoryImage(mapped)
        arguments = b"".join(os.fsencode(argument) + b"\0" for argument in self._arguments(step, room, image))
        # Only what marks the sandbox stands in the open: the rest holds values of the user's environment.
        argv = [self._program, "--unshare-uts", *self._marks(), "--args", str(ARGUMENTS_FD)]
        argv += ["--block-fd", str(GATE_FD), "--", *step.command]
        status, status_writer = os.pipe()
        os.set_blocking(status, False)
        said = bytearray()
        noted: List[int] = []
        group = self._made_group(room.limits)

        def start() -> subprocess.Popen[bytes]:
            given = unnamed(os.path.join(room.scratch, "arguments"), arguments)
            gate = _gate(os.path.join(room.scratch, _GATE))
            inherited = {ARGUMENTS_FD: given, STATUS_FD: status_writer, GATE_FD: gate}
            self._all_known = False
            try:
                for descriptor, source in inherited.items():
                    os.dup2(source, descriptor)
                process = spawn(argv, room, {}, tuple(inherited))
            finally:
                for descriptor in (*inherited, given, status_writer):
                    os.close(descriptor)
            pid = _first_pid(process, status, said)
            if pid is not None:
                self._note_box(pid)
                noted.append(pid)
                self._limit(pid, group)
            os.write(gate, b"!")
            os.close(gate)
            return process

        def read_end(returncode: int) -> End:
            # bwrap has been waited for, and its only child is noted: `remove` sees that one gone by its number, and
            # need not look through all processes. Whoever else removes the job's sandboxes has no such knowledge.
            self._all_known = bool(noted)
            _read_status(status, said)
            os.close(status)
            end = _end(returncode, bytes(said), tail(room.stderr, 4096))
            if group is not None and group.ran_out_of_memory():
                return End(end.exit_code, reason=out_of_memory(room.limits, end.exit_code))
            return end

        return ProcessContainer(f"{step.image} is {image.description} (bubblewrap)", start, read_end)

    def _made_group(self, limits: Limits) -> Optional[cgroups.Group]:
        """The cgroup with the limits of a step; None where there is nothing to limit, or no way to."""
        names = cgroups.wanted(limits, self._pids_limit)
        found = {name: place for name, place in cgroups.places().items() if name in names}
        if not found:
            return None
        group = cgroups.Group(found, self._group)
        # Noted before it is there, so that whoever ends the job removes it.
        with open(self._groups, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(directory + "\n" for directory in group.directories)
        try:
            group.make(limits, self._pids_limit)
        except OSError as error:
            self._note(f"The job's limits are not enforced here: {error.strerror} ({error.filename}).")
            return None
        return group

    def _limit(self, pid: int, group: Optional[cgroups.Group]) -> None:
        """Set the limits of a sandbox that has not begun."""
        if group is not None:
            try:
                group.add(pid)
            except OSError as error:
                self._note(f"The job's limits are not enforced here: {error.strerror} ({error.filename}).")
        # Before Linux 5.14 this would count all processes of the user. For root it has no effect.
        if self._pids_limit and _kernel() >= (5, 14):
            with contextlib.suppress(OSError):
                most = min(self._pids_limit, *(x for x in resource.prlimit(pid, resource.RLIMIT_NPROC) if x >= 0))
                resource.prlimit(pid, resource.RLIMIT_NPROC, (most, most))

    def _note_box(self, pid: int) -> None:
        """Note the first process of a sandbox before anything of the task runs in it, for whoever has to end it.

        A task may change what its sandbox shows of itself; what it cannot change is a process's number and start.
        """
        started = start_time(pid)
        with open(self._boxes, "a", encoding="ascii") as file:
            file.write(f"{pid} {started} {boot_id()}\n")

    def _known_boxes(self) -> List[Tuple[int, int]]:
        lines = [line.split() for line in _lines(self._boxes)]
        return [(int(line[0]), int(line[1])) for line in lines if len(line) == 3 and line[2] == boot_id()]

    def _arguments(self, step: Step, room: Room, image: Union[_HostImage, _DirectoryImage]) -> List[str]:
        own_root = [mount.source for mount in room.mounts if mount.target == "/"]
        root = own_root[0] if own_root else os.path.join(room.scratch, "root")
        _make_root(root)
        isolation = _isolation() + (["--unshare-net"] if self._network == "none" else [])
        arguments = [*isolation, "--bind", root, "/", *image.arguments(room.scratch, self._hostname, root)]
        places = [mount._replace(target=image.resolve(mount.target)) for mount in room.mounts if mount.target != "/"]
        workdir = image.resolve(step.workdir) if step.workdir else "/"
        make_workdir = ["--dir", workdir] if _is_unmade(workdir, room.mounts) else []
        arguments += _rebuilt([mount.target for mount in places] + [workdir], image)
        for mount in places:
            arguments += ["--bind" if mount.writable else "--ro-bind", mount.source, mount.target]
        arguments += image.closing_arguments()
        arguments += ["--proc", "/proc", *_protected_proc(), "--dev", "/dev", *make_workdir, "--chdir", workdir]
        environment = {"PATH": _PATH, "HOME": "/root", "HOSTNAME": self._hostname, **step.env}
        for name, value in environment.items():
            arguments += ["--setenv", name, value]
        return arguments

    def _marks(self) -> List[str]:
        """Consecutive arguments that every process of the job's sandboxes shows."""
        return ["--hostname", self._hostname]

    def _root_of(self, image: str) -> Optional[str]:
        name = short_name(image)
        for pattern, root in self._images:
            short = short_name(pattern)
            if fnmatch.fnmatchcase(name, short) or fnmatch.fnmatchcase(_repository(name), short):
                return root
        return None


def _lines(path: str) -> List[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []


def _kernel() -> Tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"[0-9]+", os.uname().release)[:2])


def _end(returncode: int, status: bytes, stderr_tail: str) -> End:
    for line in status.splitlines():
        code = _word(line, "exit-code")
        if code is not None:
            return End(code)
    # bwrap itself ends with 1 where the program cannot be executed, and then reports no exit code.
    unreached = _UNREACHED.findall(stderr_tail)
    if unreached:
        return End(127 if unreached[-1] == "No such file or directory" else 126)
    if returncode < 0:
        return End(128 - returncode)
    said = stderr_tail.strip().splitlines()[-1:] or [f"bwrap ended with {returncode}"]
    return End(returncode, failure=f"The sandbox could not be made: {said[0]}.")


def _gate(path: str) -> int:
    """What a sandbox waits at. A FIFO that is open both ways has no end, also when the runner is killed."""
    os.mkfifo(path, 0o600)
    descriptor = os.open(path, os.O_RDWR)
    os.unlink(path)
    return descriptor


def _first_pid(process: subprocess.Popen[bytes], status: int, said: bytearray) -> Optional[int]:
    """The first process of the sandbox, once there is one; None where bwrap ended without."""
    deadline = time.monotonic() + _BEGIN_S
    while process.poll() is None and time.monotonic() < deadline:
        select.select([status], [], [], _SWEEP_INTERVAL_S)
        _read_status(status, said)
        for line in bytes(said).splitlines(keepends=True):
            pid = _word(line, "child-pid") if line.endswith(b"\n") else None
            if pid is not None:
                return pid
    return None


def _read_status(status: int, said: bytearray) -> None:
    try:
        while len(said) < _STATUS_BYTES:
            data = os.read(status, _STATUS_BYTES)
            if not data:
                return
            said += data
    except BlockingIOError:
        return


def _sweep(marks: List[str], place: str) -> None:
    """Kill every sandbox that shows `marks` or waits at a gate of the job in `place`; return when there is none.

    That is enough for one that has not begun: a task's own processes could change what a sandbox shows. The child of
    a runner that was killed just when it started bwrap shows still what the runner did, and has the gate. One that
    ends while it is looked for may have made another just before, and that one is there when it is looked for again.
    """
    looks = 0
    while looks < 2:
        found = {*_sandboxes(marks), *_at_gates(os.path.realpath(place))}
        looks = 0 if found else looks + 1
        for pid in found:
            _kill(pid)
        if found:
            time.sleep(_SWEEP_INTERVAL_S)


def _sandboxes(marks: List[str]) -> List[int]:
    wanted = b"\0" + b"\0".join(os.fsencode(mark) for mark in marks) + b"\0"
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                arguments = file.read()
        except OSError:
            continue
        # The marks stand before `--`: what the user's own command says does not count.
        if wanted in arguments.partition(b"\0--\0")[0] + b"\0" and _is_bwrap(arguments):
            found.append(int(name))
    return found


def _at_gates(folder: str) -> List[int]:
    """Processes that wait at a gate below `folder`, or will: they have it from the moment they are made."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            gate = os.readlink(f"/proc/{name}/fd/{GATE_FD}")
        except OSError:
            continue
        if is_within(gate, folder) and os.path.basename(gate) == f"{_GATE} (deleted)" and int(name) != os.getpid():
            found.append(int(name))
    return found


def _is_bwrap(arguments: bytes) -> bool:
    return os.path.basename(arguments.partition(b"\0")[0]) == b"bwrap"


def _end_box(pid: int, started: int) -> None:
    """Kill the first process of a sandbox; when it is gone, the kernel has ended all others in it."""
    while start_time(pid) == started:
        _kill(pid)
        time.sleep(_LOOK_S)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def short_name(image: str) -> str:
    """`image` as people write it: without the registry and the folder that stand for the official ones."""
    for prefix in ("docker.io/", "index.docker.io/"):
        if image.startswith(prefix):
            image = image[len(prefix) :]
    return image[len("library/") :] if image.startswith("library/") else image


def _repository(image: str) -> str:
    """`image` without its tag and digest."""
    image = image.partition("@")[0]
    folder, slash, name = image.rpartition("/")
    return folder + slash + name.partition(":")[0]


class _HostImage:
    """This machine's /usr, with links into it as they are here, and an /etc of our own."""

    description = "this machine's /usr"

    def arguments(self, scratch: str, hostname: str, root: str) -> List[str]:
        arguments = ["--ro-bind", "/usr", "/usr"]
        for name in _LINKS_INTO_USR:
            path = "/" + name
            if os.path.islink(path):
                if not os.path.lexists(root + path):  # an earlier step has it in the root that they share
                    arguments += ["--symlink", os.readlink(path), path]
            elif os.path.isdir(path):
                arguments += ["--ro-bind", path, path]
        etc = os.path.join(scratch, "etc")
        _make_etc(etc, hostname)
        arguments += ["--bind", etc, "/etc"]
        for name in _ETC_FROM_HOST:
            path = "/etc/" + name
            if os.path.exists(path):
                arguments += ["--ro-bind", path, path]
        return arguments

    def closing_arguments(self) -> List[str]:
        return ["--remount-ro", "/etc"]

    def resolve(self, path: str) -> str:
        return follow_links(path, lambda p: _link(p) if self.outside(p) or p[1:] in _LINKS_INTO_USR else None)

    def outside(self, path: str) -> Optional[str]:
        """Where `path` of the image lies, for the parts that the image has and that cannot be written to."""
        return path if is_within(path, "/usr") else None


class _DirectoryImage:
    """A root file system that lies in a directory."""

    def __init__(self, directory: str) -> None:
        self._directory = directory.rstrip("/")
        self.description = f"the root file system {directory}"

    def arguments(self, scratch: str, hostname: str, root: str) -> List[str]:
        arguments: List[str] = []
        for name in sorted(os.listdir(self._directory)):
            source = os.path.join(self._directory, name)
            if name in _OWN:
                continue
            if os.path.islink(source):
                if not os.path.lexists(os.path.join(root, name)):
                    arguments += ["--symlink", os.readlink(source), "/" + name]
            else:
                arguments += ["--ro-bind", source, "/" + name]
        made = os.path.join(scratch, "etc")
        _make_etc(made, hostname)
        for name in ("hosts", "resolv.conf"):  # as every container engine does
            if os.path.isfile(os.path.join(self._directory, "etc", name)):
                arguments += ["--ro-bind", os.path.join(made, name), self.resolve("/etc/" + name)]
        return arguments

    def closing_arguments(self) -> List[str]:
        return []

    def resolve(self, path: str) -> str:
        return follow_links(path, lambda p: _link(self._directory + p))

    def outside(self, path: str) -> Optional[str]:
        top = path.split("/")[1]
        where = self._directory + path
        return where if top not in _OWN and os.path.isdir(self._directory + "/" + top) else None


def _isolation() -> List[str]:
    return [
        *("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-cgroup-try"),
        *("--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"),
        *("--uid", "0", "--gid", "0", "--json-status-fd", str(STATUS_FD)),
    ]


def _protected_proc() -> List[str]:
    # Where the runner is root, the kernel takes the inside for root by its uid, whatever its capabilities: without
    # this, a task could write /proc/sys/kernel/core_pattern. bwrap covers only directories that are writable.
    paths = [path for path in ("/proc/sys", "/proc/fs", "/proc/sysrq-trigger") if os.path.exists(path)]
    return [argument for path in paths for argument in ("--ro-bind", path, path)]


def _is_unmade(workdir: str, mounts: Sequence[Mount]) -> bool:
    """Whether bwrap has to make the working directory. In a mount it is made here: bwrap would follow links."""
    if not any(is_within(workdir, mount.target) for mount in mounts):
        return True
    os.makedirs(Namespace(mounts).resolve(workdir), exist_ok=True)
    return False


def _make_root(root: str) -> None:
    """The container's own part of /: writable, on disk, gone with the job."""
    os.makedirs(root, exist_ok=True)
    for name, mode in (("tmp", 0o1777), ("var", 0o755), ("var/tmp", 0o1777), ("root", 0o700)):
        path = os.path.join(root, name)
        # An earlier step may have made a link of /var in the root that they share.
        if not os.path.islink(os.path.dirname(path)) and not os.path.lexists(path):
            os.mkdir(path)
            os.chmod(path, mode)


def _make_etc(etc: str, hostname: str) -> None:
    os.makedirs(etc, exist_ok=True)
    files = dict(_ETC_MADE)
    files["hosts"] = f"127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {hostname[:64]}\n"
    try:
        with open("/etc/resolv.conf", encoding="utf-8", errors="replace") as file:
            files["resolv.conf"] = file.read()
    except OSError:
        files["resolv.conf"] = ""
    for name, text in files.items():
        with open(os.path.join(etc, name), "w", encoding="utf-8") as file:
            file.write(text)


def _rebuilt(targets: Sequence[str], image: Any) -> List[str]:
    """Make room for `targets` in the image's read-only directories.

    The innermost existing directory around a missing place becomes a fresh one, with a link for each thing that was
    in it; so does every directory between two such ones.
    """
    rebuilt: Set[str] = set()
    for target in targets:
        where = image.outside(target)
        if where is not None and not os.path.lexists(where):
            folder = posixpath.dirname(target)
            while not os.path.isdir(image.outside(folder) or "/nonexistent"):
                folder = posixpath.dirname(folder)
            rebuilt.add(folder)
    if not rebuilt:
        return []
    inner = rebuilt | {target for target in targets if os.path.lexists(image.outside(target) or "")}
    for path in sorted(inner):
        folder = posixpath.dirname(path)
        while any(is_within(folder, outer) for outer in rebuilt) and folder not in rebuilt:
            rebuilt.add(folder)
            folder = posixpath.dirname(folder)
    arguments: List[str] = []
    for number, folder in enumerate(sorted(rebuilt)):
        arguments += ["--ro-bind", image.outside(folder), f"/.image/{number}", "--tmpfs", folder]
        for name in sorted(os.listdir(image.outside(folder))):
            path = folder + "/" + name
            if path in rebuilt:
                arguments += ["--dir", path]
            elif path not in targets:
                arguments += ["--symlink", f"/.image/{number}/{name}", path]
    return arguments


def _link(path: str) -> Optional[str]:
    return os.readlink(path) if os.path.islink(path) else None


def _word(line: bytes, name: str) -> Optional[int]:
    try:
        value = json.loads(line).get(name)
    except ValueError:
        return None
    return value if isinstance(value, int) else None
