"""Containers by the program apptainer, or singularity: for clusters where nothing else is installed.

Images become files in a folder of this user's, once for each node. A container is a child of the runner in a process
namespace of its own. It may outlive the runner; so it begins in a session that is noted before it is anything, and
whoever ends the job ends every process of that session, with which the namespace goes.

Needs Apptainer 1.1 or SingularityCE 3.10: older ones give the environment's values to a shell.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import tempfile
import time
from typing import Any, Dict, List, Optional, Tuple

from ..job import Limits, Owner, Refused, Step
from ..mounts import Mount, Namespace, is_within, normal
from ..processes import boot_id, start_time
from ..progress import Progress
from ..report import tail
from .base import Check, End, Note, Room
from .containers import bad_image, comma_separated, with_tmp
from .node import alone
from .process import ProcessContainer, spawn

_LOOK_S = 0.1
_SWEEP_S = 0.05
_FATAL = 255  # its own failures; a command may end so, too
_SCHEMES = ("docker", "oras", "library")  # others are files of this machine, or URLs that no one has looked at
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_MAX_MESSAGE = 1000
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Apptainer:
    """`settings`: `program`, `options` (of exec), `environment` (what the program itself needs), `network`, `pull`,
    `pids_limit`, `cache` (a folder for images), `image_folders` (in which tasks may name .sif files), `controllers` (of
    cgroups: those by which this user may set limits).
    """

    foreign_users = False
    outlives = False

    def __init__(self, settings: Dict[str, Any], owner: Owner, note: Note) -> None:
        self._settings = settings
        self._note = note
        self._sessions = os.path.join(os.path.dirname(owner.lock), "sessions")
        # Singularity does not know the other name.
        name = os.path.basename(settings["program"])
        self._prefix = "SINGULARITYENV_" if "singularity" in name else "APPTAINERENV_"

    def unsupported(self, image: str) -> Optional[str]:
        if image.startswith("/"):
            return self._bad_file(image)
        scheme, colon, name = image.partition("://")
        if colon and scheme not in _SCHEMES:
            return f"The image {image} has to be at one of {', '.join(known + '://' for known in _SCHEMES)}."
        return bad_image(name if colon else image) and f"The image {image!r} is not the name of an image."

    def unenforced(self, limits: Limits) -> List[str]:
        why = "is not enforced here: apptainer may not set limits for"
        sentences = []
        if limits.ram_gb and "memory" not in self._settings["controllers"]:
            sentences.append(f"resources.ram_gb {why} memory.")
        if limits.cpu_cores and "cpu" not in self._settings["controllers"]:
            sentences.append(f"resources.cpu_cores {why} CPUs.")
        if limits.disk_gb:
            sentences.append("resources.disk_gb is not enforced here: apptainer cannot limit a container's disk.")
        return sentences

    def pull(self, image: str, check: Check) -> None:
        policy = self._settings["pull"]
        path = self.file_of(image)
        if image.startswith("/") or (policy != "always" and os.path.exists(path)):
            return
        if policy == "never":
            raise Refused(f"The image {image} is not on this machine, and runtime.pull is never.")
        with alone(f"pulling {image}", check, self._note):
            if policy == "always" or not os.path.exists(path):
                self._pull(image, path, check)

    def file_of(self, image: str) -> str:
        """Where the image lies on this machine, once it has been pulled."""
        if image.startswith("/"):
            return image
        return os.path.join(self._settings["cache"], hashlib.sha256(_url(image).encode()).hexdigest()[:32] + ".sif")

    def container(self, step: Step, room: Room) -> ProcessContainer:
        if any(mount.target == "/" for mount in room.mounts):
            raise Refused("Apptainer cannot bring files directly below / into a container, or out of it.")
        argv, environment = self.command(step, room)

        def start() -> subprocess.Popen[bytes]:
            return spawn(argv, room, environment, before_exec=self._note_session)

        def read_end(returncode: int) -> End:
            return _end(step, returncode, tail(room.stderr, 4096))

        return ProcessContainer(f"{step.image} ({os.path.basename(self._settings['program'])})", start, read_end)

    def command(self, step: Step, room: Room) -> Tuple[List[str], Dict[str, str]]:
        """The argument list, and the environment in which it is run. Raises Refused."""
        settings, limits = self._settings, room.limits
        argv = [settings["program"], "exec", "--containall", "--cleanenv", "--no-home", "--no-eval", "--writable-tmpfs"]
        if os.geteuid() == 0:
            argv += ["--no-privs"]
        if settings["network"] == "none":
            argv += ["--net", "--network", "none"]
        if limits.cpu_cores and "cpu" in settings["controllers"]:
            argv += ["--cpus", str(min(limits.cpu_cores, os.cpu_count() or limits.cpu_cores))]
        if limits.ram_gb and "memory" in settings["controllers"]:
            memory = str(int(limits.ram_gb * 1e9))
            argv += ["--memory", memory, "--memory-swap", memory]
        if settings["pids_limit"] and "pids" in settings["controllers"]:
            argv += ["--pids-limit", str(settings["pids_limit"])]
        mounts = with_tmp(room)
        if not any(mount.target == "/var/tmp" for mount in mounts):  # noqa: S108 - in the container
            private = os.path.join(room.scratch, "var-tmp")
            os.mkdir(private)
            mounts.append(Mount(private, "/var/tmp", True))  # noqa: S108 - in memory otherwise, and small
        for mount in mounts:
            access = [] if mount.writable else ["ro"]
            fields = ["type=bind", f"source={mount.source}", f"destination={mount.target}", *access]
            argv += ["--mount", comma_separated(fields)]
        workdir = normal(step.workdir or "/")
        if any(is_within(workdir, mount.target) for mount in mounts):
            os.makedirs(Namespace(mounts).resolve(workdir), exist_ok=True)
        argv += ["--pwd", workdir, *settings["options"], self.file_of(step.image), *step.command]
        return argv, {"PATH": _PATH, **settings["environment"], **self._inside(step.env)}

    def remove(self) -> None:
        while True:
            left = _living_in(self._known_sessions())
            if not left:
                return
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(_SWEEP_S)

    def others(self) -> List[Owner]:
        return []  # a container is in its runner's cgroup, and is killed with it

    def _inside(self, env: Dict[str, str]) -> Dict[str, str]:
        for name, value in env.items():
            if _VARIABLE.fullmatch(name) is None or "\0" in value:
                raise Refused(f"Apptainer cannot set the environment variable {name!r}.")
        return {self._prefix + name: value for name, value in env.items()}

    def _bad_file(self, image: str) -> Optional[str]:
        real = os.path.realpath(image)
        folders = [os.path.realpath(folder) for folder in self._settings["image_folders"]]
        if not image.endswith(".sif") or not any(is_within(real, folder) for folder in folders):
            return f"The image {image} is not a .sif file in a folder from which tasks may take images."
        return None if os.path.isfile(real) else f"The image {image} is not on this machine."

    def _pull(self, image: str, path: str, check: Check) -> None:
        progress = Progress(self._note)
        partial = path + ".new"
        argv = [self._settings["program"], "pull", "--force", partial, _url(image)]
        environment = {"PATH": _PATH, **self._settings["environment"]}
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile() as said:
            try:
                process = subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=said, stderr=said, cwd="/", env=environment
                )
            except OSError as error:
                raise Refused(f"{argv[0]} cannot be started: {error.strerror}.") from error
            try:
                while _runs(process):
                    check()
                    progress.tell(lambda: f"Pulling {image}.")
            finally:
                if process.returncode is None:
                    process.kill()
                    process.wait()
            if process.returncode != 0:
                why = _fatal(tail(said.fileno(), 4096)) or f"apptainer ended with {process.returncode}"
                raise Refused(f"The image {image} cannot be pulled: {why}.")
        os.replace(partial, path)

    def _note_session(self) -> None:
        """Begin a session and note it. Asked in the child, before it becomes the program."""
        os.setsid()
        descriptor = os.open(self._sessions, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(descriptor, f"{os.getpid()} {start_time(os.getpid())} {boot_id()}\n".encode("ascii"))
        os.close(descriptor)

    def _known_sessions(self) -> List[Tuple[int, int]]:
        try:
            with open(self._sessions, encoding="ascii") as file:
                lines = [line.split() for line in file]
        except FileNotFoundError:
            return []
        return [(int(line[0]), int(line[1])) for line in lines if len(line) == 3 and line[2] == boot_id()]


def _url(image: str) -> str:
    return image if "://" in image else f"docker://{image}"


def _living_in(sessions: List[Tuple[int, int]]) -> List[int]:
    """The processes in `sessions`, each given by the number and the start of the process that began it.

    The kernel does not give a number again while there is a session of that number. So a process of that number which
    started at another time says that the session is long over; where there is none, what is in the session is of it.
    """
    known = {number for number, started in sessions if start_time(number) in (None, started)}
    found = []
    for name in os.listdir("/proc") if known else ():
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b") ")[2].split()
            except OSError:
                continue
            if int(fields[3]) in known and fields[0] not in (b"Z", b"X"):
                found.append(int(name))
    return found


def _end(step: Step, returncode: int, stderr_tail: str) -> End:
    if returncode < 0:
        return End(128 - returncode)
    said = _fatal(stderr_tail) if returncode == _FATAL else ""
    if not said:
        return End(returncode)
    if step.command[0] in said:
        if re.search(r"not found|no such file", said, re.IGNORECASE):
            return End(127)
        if re.search(r"permission denied|exec format", said, re.IGNORECASE):
            return End(126)
    return End(returncode, failure=f"The container of executor {step.number} cannot be started: {said}.")


def _fatal(text: str) -> str:
    """What the program says when it gives up, without a full stop; empty where its last line is something else."""
    line = (text.strip().splitlines() or [""])[-1]
    head, colon, message = line.partition(":")
    return message.strip()[:_MAX_MESSAGE].rstrip(".") if colon and head.endswith("FATAL") else ""


def _runs(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_LOOK_S)
    except subprocess.TimeoutExpired:
        return True
    return False
