"""What runs a step in a container. One module per runtime; `RUNTIMES` finds it."""

from __future__ import annotations

import importlib
from typing import Any, Dict, List, NamedTuple, Optional, Protocol, Sequence

from ..job import Step
from ..mounts import Mount

RUNTIMES = {
    "bubblewrap": "bubblewrap:Bubblewrap",
}
"""Kind -> module and class beside this one."""

ARGUMENTS_FD = 20
STATUS_FD = 21
"""Descriptors at which the started program finds `Launch.arguments` and may write what `read_end` understands."""


class Launch(NamedTuple):
    """How a step is started: an argument list, and more arguments that others on this machine are not to see."""

    argv: List[str]
    arguments: bytes
    image_used: str


class End(NamedTuple):
    """How a step ended: its exit code, or a sentence on why it was never started."""

    exit_code: int
    failure: Optional[str]


class Runtime(Protocol):
    """Builds argument lists and reads what came back; runs nothing itself."""

    def unsupported(self, image: str) -> Optional[str]:
        """A sentence on why `image` cannot be run here, or None."""

    def launch(self, step: Step, mounts: Sequence[Mount], scratch: str) -> Launch:
        """How to start `step`. `scratch` is a folder for what this one container needs outside; it exists."""

    def read_end(self, returncode: int, status: bytes, stderr_tail: str) -> End:
        """What the program's return code, its words at STATUS_FD and the end of its stderr mean."""

    def marks(self, job_id: str) -> List[str]:
        """Consecutive arguments that every process of this job's containers shows; empty where there is none."""


def make(settings: Dict[str, Any]) -> Runtime:
    """The runtime of kind `settings["kind"]`."""
    module, _, name = RUNTIMES[settings["kind"]].partition(":")
    runtime: Runtime = getattr(importlib.import_module("." + module, __package__), name)(settings)
    return runtime
