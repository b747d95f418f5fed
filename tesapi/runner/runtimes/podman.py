"""Containers by the program podman, which needs no service.

`create` comes before `start`, so that there is never a container that nobody can find by its label. A container lives
on when the podman that started it dies: what follows it is only attached to it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from typing import IO, Any, Dict, List, Optional, Sequence, Tuple, Union

from ..job import Limits, Owner, Refused, Step
from ..mounts import Namespace, is_within, normal
from ..progress import Progress
from ..report import tail
from . import top
from .base import Check, End, Note, Room
from .containers import bad_image, comma_separated, labels, out_of_memory, owner_of, with_tmp
from .node import alone
from .process import ProcessContainer, spawn, unnamed

_LOOK_S = 0.1
_ANSWER_S = 120.0
_GRACE_S = 5.0
_SWEEP_S = 0.05
_SLOWEST_SWEEP_S = 5.0
_CREATION_S = 20.0
_LONGEST_LINE = 60_000  # podman's reader gives up at 64 KiB
_MAX_MESSAGE = 1000
_KILLED = 137
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# What Docker takes for a name. Podman would also take `dir:/etc` or `oci-archive:/…`, which are files of this machine.
_IMAGE = re.compile(r"[A-Za-z0-9][\w.-]*(:[0-9]+(?=/))?(/[\w.-]+)*(:[\w.-]+)?(@[a-z0-9]+:[0-9a-f]+)?", re.ASCII)
_VARIABLE = re.compile(r"[^\s=#][^\s=]*")
# What podman, its libraries and the loader read: a task's value would be an order to them.
_HEEDED = re.compile(
    r"LD_|GO|_?(CONTAINER|PODMAN)|BUILDAH|STORAGE_|REGISTR|DOCKER_|XDG_|DBUS_|LISTEN_|NOTIFY_|GLIBC_|MALLOC_|"
    r"(PATH|HOME|TMPDIR|USER)$"
)
_NEVER_STARTED = ("created", "configured", "initialized")
_LOGGED = re.compile(r'^time="[^"]*" level=\w+ msg="((?:[^"\\]|\\.)*)".*')


class Podman:
    """`settings`: `program`, `options` (global ones), `environment` (what podman itself needs), and like Docker's
    `network`, `user`, `capabilities`, `pids_limit`, `pull`; `init` is the path of a program or empty. `rootless` says
    that podman is, and then `controllers` names the cgroup controllers that `podman info` knows.
    """

    foreign_users = True
    outlives = True

    def __init__(self, settings: Dict[str, Any], owner: Owner, note: Note) -> None:
        self._settings = settings
        self._owner = owner
        self._note = note
        self._environment: Dict[str, str] = {"PATH": _PATH, **settings["environment"]}
        self._used: Dict[str, Tuple[str, str]] = {}

    def unsupported(self, image: str) -> Optional[str]:
        if _IMAGE.fullmatch(image) is None:
            return bad_image(image) or f"The image {image!r} is not the name of an image."
        return None

    def unenforced(self, limits: Limits) -> List[str]:
        why = "is not enforced here: podman runs without root, and has no cgroup controller for"
        sentences = []
        if limits.ram_gb and not self._controls("memory"):
            sentences.append(f"resources.ram_gb {why} memory.")
        if limits.cpu_cores and not self._controls("cpu"):
            sentences.append(f"resources.cpu_cores {why} CPUs.")
        if limits.disk_gb:
            sentences.append("resources.disk_gb is not enforced here: podman cannot limit a container's disk.")
        return sentences

    def pull(self, image: str, check: Check) -> None:
        policy = self._settings["pull"]
        if policy != "always" and self._find(image, check):
            return
        if policy == "never":
            raise Refused(f"The image {image} is not on this machine, and runtime.pull is never.")
        with alone(f"pulling {image}", check, self._note):
            if policy == "always" or not self._find(image, check):
                self._pull(image, check)
                if not self._find(image, check):
                    raise Refused(f"The image {image} was pulled, and is not there.")

    def container(self, step: Step, room: Room) -> ProcessContainer:
        name = f"tesapi-{self._owner.job_id}-{step.number}"
        try:
            self._create(name, step, room)
            self._make_workdir(name, step.workdir, room)
            root = [mount.source for mount in room.mounts if mount.target == "/"]
            self._fill_root(name, root, room.check)
        except _Failed as failed:
            raise Refused(f"The container of executor {step.number} cannot be made: {failed}.") from failed
        interactive = ["--interactive"] if room.has_stdin else []
        # Ctrl-P, Ctrl-Q in what goes to standard input would detach from it.
        argv = self._argv(["start", "--attach", *interactive, "--sig-proxy=false", "--detach-keys", "", name])

        def start() -> subprocess.Popen[bytes]:
            return spawn(argv, room, self._environment)

        def read_end(returncode: int) -> End:
            try:
                end = self._end(name, step, room, returncode)
                if root and end.failure is None:
                    self._fetch_top(name, root[0], room.at_top)
            except (_Failed, ValueError) as failed:
                raise Refused(f"The container of executor {step.number} cannot be looked at: {failed}.") from failed
            return end

        return ProcessContainer(self._used[step.image][1], start, read_end)

    def remove(self) -> None:
        pause_s, told, deadline = _SWEEP_S, False, time.monotonic() + _CREATION_S
        while True:
            creators = self._creators()
            try:
                left = self._call(["ps", "--all", "--no-trunc", *self._filter("job", self._owner.job_id)]).split()
                if left:
                    self._call(["rm", "--force", "--volumes", *left])
                elif not creators:
                    return
            except (_Failed, Refused) as failed:
                if not told:
                    told = True
                    self._note(f"The job's containers are not removed yet; podman says: {str(failed).rstrip('.')}.")
            if time.monotonic() > deadline:
                for pid in creators:
                    _kill(pid)
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _SLOWEST_SWEEP_S)

    def others(self) -> List[Owner]:
        try:
            found = json.loads(
                self._call(["ps", "--all", *self._filter("store", self._owner.store_id, "json")]) or "[]"
            )
        except (_Failed, Refused, ValueError):
            return []  # whoever starts a container next will tell
        owners = sorted({owner_of(container.get("Labels") or {}) for container in found})
        return [owner for owner in owners if owner.place == self._owner.place and owner != self._owner]

    def _filter(self, label: str, value: str, form: str = "{{.ID}}") -> List[str]:
        return ["--filter", f"label=tesapi.{label}={value}", "--format", form]

    def _creators(self) -> List[int]:
        """Processes that may still make a container of the job, though their runner is gone."""
        mark = os.fsencode(f"\0tesapi.job={self._owner.job_id}\0")
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    with open(f"/proc/{name}/cmdline", "rb") as file:
                        arguments = file.read()
                except OSError:
                    continue
                program = os.path.basename(arguments.partition(b"\0")[0])
                if mark in arguments and program == os.path.basename(os.fsencode(self._settings["program"])):
                    found.append(int(name))
        return found

    def _controls(self, controller: str) -> bool:
        return not self._settings["rootless"] or controller in self._settings.get("controllers", ())

    def _create(self, name: str, step: Step, room: Room) -> None:
        lines, named = _split_environment(step.env, self._settings["environment"])
        descriptor = unnamed(os.path.join(room.scratch, "environment"), lines)
        try:
            variables = ["--env-file", f"/proc/self/fd/{descriptor}"]
            for variable in named:
                variables += ["--env", variable]
            arguments = self._arguments(name, step, room, variables)
            # Only what podman passes on by its name stands in its own environment.
            said = self._call(arguments, room.check, extra=named, inherited=(descriptor,), warnings=True)
        finally:
            os.close(descriptor)
        for warning in said.splitlines()[-3:]:
            self._note(f"Podman: {warning}")

    def _arguments(self, name: str, step: Step, room: Room, variables: Sequence[str]) -> List[str]:
        settings, limits = self._settings, room.limits
        arguments = ["create", "--name", name, "--pull", "never", "--log-driver", "none", "--http-proxy=false"]
        arguments += ["--cap-drop", "all", "--no-healthcheck", "--systemd", "false", "--stop-timeout", "0"]
        # SELinux would deny the mounts; their files are private copies.
        arguments += ["--security-opt", "no-new-privileges", "--security-opt", "label=disable"]
        for key, value in labels(self._owner).items():
            arguments += ["--label", f"{key}={value}"]
        for capability in settings["capabilities"]:
            arguments += ["--cap-add", capability]
        if settings["network"] not in ("", "default"):
            arguments += ["--network", settings["network"]]
        if settings["user"]:
            arguments += ["--user", settings["user"]]
        if settings["init"]:
            arguments += ["--init", "--init-path", settings["init"]]
        if settings["pids_limit"] and self._controls("pids"):
            arguments += ["--pids-limit", str(settings["pids_limit"])]
        if limits.cpu_cores and self._controls("cpu"):
            arguments += ["--cpus", str(min(limits.cpu_cores, os.cpu_count() or limits.cpu_cores))]
        if limits.ram_gb and self._controls("memory"):
            memory = f"{max(int(limits.ram_gb * 1e9), 6 << 20)}b"
            arguments += ["--memory", memory, "--memory-swap", memory]
        for mount in with_tmp(room):
            if "\r\n" in mount.source + mount.target:
                raise Refused(f"Podman cannot mount at {mount.target!r}: it would take the line's end for another one.")
            fields = ["type=bind", f"source={mount.source}", f"target={mount.target}"]
            arguments += ["--mount", comma_separated([*fields, *([] if mount.writable else ["readonly=true"])])]
        arguments += variables
        if room.has_stdin:
            arguments += ["--interactive"]
        if step.workdir:
            arguments += ["--workdir", step.workdir]
        arguments += ["--entrypoint", json.dumps(step.command[:1], ensure_ascii=False)]
        return [*arguments, self._used[step.image][0], *step.command[1:]]

    def _fill_root(self, name: str, roots: Sequence[str], check: Check) -> None:
        """Put the task's files there, and make / writable for its owner, as with other engines.

        Podman makes the / of an image 0555, which only matters to a root without capabilities.
        """
        with tempfile.TemporaryFile() as archive:
            with tarfile.open(fileobj=archive, mode="w") as tar:
                itself = tarfile.TarInfo("./")
                itself.type, itself.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(itself)
                for root in roots:
                    for entry in sorted(os.listdir(root)):
                        tar.add(os.path.join(root, entry), arcname=entry)
            archive.seek(0)
            self._call(["cp", "-", f"{name}:/"], check, stdin=archive)

    def _make_workdir(self, name: str, workdir: str, room: Room) -> None:
        """Make it where the image does not have it: podman would refuse to start. What is there stays as it is."""
        if normal(workdir or "/") == "/":
            return
        mounts = [mount for mount in room.mounts if mount.target != "/"]
        if any(is_within(normal(workdir), mount.target) for mount in mounts):
            where = Namespace(mounts).resolve(workdir)
            if not os.path.lexists(where):
                os.makedirs(where)
                os.chmod(where, 0o777)  # noqa: S103 - as every folder that is mounted; the task's user may be any
            return
        empty = os.path.join(room.scratch, "empty")
        os.mkdir(empty)
        os.chmod(empty, 0o755)  # noqa: S103 - as every folder of an image
        folder = ""
        for part in normal(workdir)[1:].split("/"):
            folder += "/" + part
            self._call(["cp", f"{empty}/.", f"{name}:{folder}"], room.check)

    def _end(self, name: str, step: Step, room: Room, returncode: int) -> End:
        try:
            state = json.loads(self._call(["container", "inspect", name], room.check))[0]["State"]
        except (_Failed, ValueError) as failed:
            return End(_KILLED, failure=f"The container of executor {step.number} is gone: {failed}.")
        if state["Status"] in _NEVER_STARTED:
            return _not_started(step, returncode, tail(room.stderr, 4096))
        if state["Running"]:
            sentence = f"podman ended with {returncode} while the container of executor {step.number} ran."
            return End(_KILLED, failure=sentence)
        code, limits = int(state["ExitCode"]), room.limits
        reason = out_of_memory(limits, code) if state.get("OOMKilled") else None
        if reason is None and code == _KILLED and limits.ram_gb and self._controls("memory"):
            # Podman often misses why the kernel killed it.
            reason = (
                f"it was killed, probably because the limit of {limits.ram_gb:g} GB (resources.ram_gb) was used up."
            )
        return End(code, reason=reason)

    def _fetch_top(self, name: str, root: str, patterns: Sequence[str]) -> None:
        changes = json.loads(self._call(["diff", "--format", "json", name]))
        paths = [*(changes.get("changed") or ()), *(changes.get("added") or ())]
        for path in top.wanted([path for path in paths if path != "/"], patterns):
            with tempfile.TemporaryFile() as archive, tempfile.TemporaryDirectory(dir=os.path.dirname(root)) as folder:
                try:
                    self._call(["cp", f"{name}:{path}", "-"], stdout=archive)
                except _Failed as failed:  # a link that leads nowhere, for instance
                    self._note(f"Podman cannot take {path} out of the container: {failed}.")
                    continue
                archive.seek(0)
                top.unpack(archive, folder)
                # Of a link podman gives what it leads to, under that one's name.
                for entry in os.listdir(folder):
                    _put_in_place(os.path.join(folder, entry), root + path)

    def _find(self, image: str, check: Check) -> bool:
        """Whether the image is here; by the name that Docker would mean, or else by any that podman takes it for."""
        for name in dict.fromkeys((full_name(image), image)):
            try:
                found = json.loads(self._call(["image", "inspect", name], check))[0]
            except _Failed as failed:
                if failed.code == 125 and re.search(r"not known|no such image|not found|unable to find", str(failed)):
                    continue
                raise Refused(f"The image {image} cannot be used: {failed}.") from failed
            digest = found.get("Digest") or found["Id"]
            # The id, since podman looks for files of this machine behind some names.
            self._used[image] = (found["Id"], f"{image} ({digest}, podman)")
            return True
        return False

    def _pull(self, image: str, check: Check) -> None:
        progress = Progress(self._note)
        with tempfile.TemporaryFile() as said:

            def look() -> None:
                check()
                progress.tell(lambda: _how_far(image, os.pread(said.fileno(), 1 << 20, 0)))

            try:
                self._call(["pull", full_name(image)], look, stderr=said, patience_s=None)
            except _Failed as failed:
                raise Refused(f"The image {image} cannot be pulled: {failed}.") from failed

    def _argv(self, arguments: Sequence[str]) -> List[str]:
        return [self._settings["program"], *self._settings["options"], *arguments]

    def _call(
        self,
        arguments: Sequence[str],
        check: Optional[Check] = None,
        *,
        stdin: Union[int, IO[bytes]] = subprocess.DEVNULL,
        stdout: Optional[IO[bytes]] = None,
        stderr: Optional[IO[bytes]] = None,
        extra: Optional[Dict[str, str]] = None,
        inherited: Sequence[int] = (),
        warnings: bool = False,
        patience_s: Optional[float] = _ANSWER_S,
    ) -> str:
        """What podman prints; what it says besides, where `warnings` are wanted. Raises _Failed, Refused."""
        deadline = None if patience_s is None else time.monotonic() + patience_s
        with tempfile.TemporaryFile() as own_out, tempfile.TemporaryFile() as own_err:
            out, err = stdout or own_out, stderr or own_err
            try:
                process = subprocess.Popen(
                    self._argv(arguments),
                    stdin=stdin,
                    stdout=out,
                    stderr=err,
                    cwd="/",
                    env={**self._environment, **(extra or {})},
                    pass_fds=inherited,
                )
            except OSError as error:
                raise Refused(f"podman ({self._settings['program']}) cannot be started: {error.strerror}.") from error
            try:
                while _runs(process):
                    if check is not None:
                        check()
                    if deadline is not None and time.monotonic() > deadline:
                        raise _Failed(f"podman {arguments[0]} did not end within {_ANSWER_S:.0f} seconds", None)
            finally:
                if process.returncode is None:
                    _end_call(process)
            said = _sentences(os.pread(err.fileno(), 1 << 20, 0))
            if process.returncode != 0:
                raise _Failed(_last(said) or f"podman ended with {process.returncode}", process.returncode)
            return said if warnings else os.pread(out.fileno(), 64 << 20, 0).decode("utf-8", "replace")


class _Failed(Exception):
    """Podman would not; the text says why, without a full stop."""

    def __init__(self, message: str, code: Optional[int]) -> None:
        super().__init__(message)
        self.code = code


def full_name(image: str) -> str:
    """The image that Docker means by this name: podman by itself may ask, or guess, which registry is meant."""
    first, slash, _ = image.partition("/")
    if not slash:
        return f"docker.io/library/{image}"
    return image if "." in first or ":" in first or first == "localhost" else f"docker.io/{image}"


def _put_in_place(source: str, target: str) -> None:
    if os.path.isdir(target) and not os.path.islink(target):
        shutil.rmtree(target)
    os.replace(source, target)


def _runs(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_LOOK_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def _end_call(process: subprocess.Popen[bytes]) -> None:
    """End a podman that does something; asked kindly it leaves nothing half made."""
    process.terminate()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _kill(pid: int) -> None:
    try:
        os.kill(pid, 9)
    except ProcessLookupError:
        pass


def _split_environment(env: Dict[str, str], own: Dict[str, str]) -> Tuple[bytes, Dict[str, str]]:
    """The lines of a file of variables, and those that such a file cannot hold. Raises Refused."""
    lines, named = [], {}
    for name, value in env.items():
        line = os.fsencode(f"{name}={value}\n")
        if _VARIABLE.fullmatch(name) is None or b"\0" in line:
            raise Refused(f"Podman cannot set the environment variable {name!r}.")
        # Some versions of podman take quotes away.
        if not re.search(r"[\r\n]", value) and not value.startswith(("'", '"', "`")) and len(line) < _LONGEST_LINE:
            lines.append(line)
        elif _HEEDED.match(name) or name in own or name.endswith("*"):
            raise Refused(f"Podman cannot set the environment variable {name} to a text of several lines or quotes.")
        else:
            named[name] = value
    return b"".join(lines), named


def _not_started(step: Step, returncode: int, stderr_tail: str) -> End:
    said = _last(_sentences(stderr_tail.encode("utf-8", "replace")))
    command = step.command[0]
    if f'exec: "{command}"' in said or f"executable file `{command}`" in said or "open executable" in said:
        missing = re.search(r"no such file|not found", said, re.IGNORECASE)
        return End(127 if missing else 126)
    failure = f"The container of executor {step.number} cannot be started: {said or f'podman ended with {returncode}'}."
    return End(returncode or 1, failure=failure)


def _sentences(said: bytes) -> str:
    """What podman says, line by line, without the dress of its log."""
    lines = (_LOGGED.sub(r"\1", line) for line in said.decode("utf-8", "replace").splitlines())
    return "\n".join(line.strip() for line in lines if line.strip())


def _last(said: str) -> str:
    line = (said.splitlines() or [""])[-1]
    return (line[len("Error: ") :] if line.startswith("Error: ") else line)[:_MAX_MESSAGE].rstrip(".")


def _how_far(image: str, said: bytes) -> str:
    layers = len(set(re.findall(rb"Copying blob (?:sha256:)?([0-9a-f]{12})", said)))
    return f"Pulling {image}: at {layers} layer{'' if layers == 1 else 's'}." if layers else f"Pulling {image}."
