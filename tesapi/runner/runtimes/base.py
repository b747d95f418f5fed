"""What runs a step in a container. One module per runtime; `RUNTIMES` finds it."""

from __future__ import annotations

import importlib
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Protocol, Sequence, Tuple

from ..job import Limits, Owner, Refused, Step
from ..mounts import Mount

RUNTIMES = {
    "apptainer": "apptainer:Apptainer",
    "bubblewrap": "bubblewrap:Bubblewrap",
    "docker": "docker:Docker",
    "podman": "podman:Podman",
}
"""Kind -> module and class beside this one."""

Note = Callable[[str], None]
Check = Callable[[], None]


class Room(NamedTuple):
    """What a step's container gets. `scratch` is a folder for what it needs outside, and exists.

    `stdin`, `stdout` and `stderr` are descriptors, open until the container is removed. `at_top` are the patterns of
    names directly below / at which outputs may lie. `check` raises when the job is to stop.
    """

    mounts: Sequence[Mount]
    limits: Limits
    scratch: str
    stdin: int
    stdout: int
    stderr: int
    has_stdin: bool
    at_top: Sequence[str]
    check: Check


class End(NamedTuple):
    """How a step ended: its exit code, and what more is known of the reason; or why it was never started."""

    exit_code: int
    reason: Optional[str] = None
    failure: Optional[str] = None


class Container(Protocol):
    """A step's container: made, and not started."""

    image_used: str

    def start(self) -> None:
        """Start it. Raises Refused; an error of the step's own command is its end, which `poll` tells."""

    def descriptors(self) -> Tuple[List[int], List[int]]:
        """What is to become readable, and writable, before `poll` has something to do. A child's end counts, too."""

    def poll(self) -> Optional[End]:
        """Move what there is to be moved, a bounded amount of it; the end, once it has ended."""


class Runtime(Protocol):
    """Containers of one job by one program or engine. Raises Refused, with a sentence, for whatever cannot be done."""

    foreign_users: bool
    """Whether the inside may be another user than the runner, so that files must be open to everybody."""
    outlives: bool
    """Whether a container may outlive all processes of the job, as those of an engine do."""

    def unsupported(self, image: str) -> Optional[str]:
        """A sentence on why `image` cannot be run here, or None. Asked before anything moves."""

    def unenforced(self, limits: Limits) -> List[str]:
        """A sentence on each limit that cannot be applied here."""

    def pull(self, image: str, check: Check) -> None:
        """Have the image on this machine."""

    def container(self, step: Step, room: Room) -> Container:
        """Make the container of a step."""

    def remove(self) -> None:
        """End and remove all containers of the job; returns when none is left, however long that takes.

        Safe in another process than the one that made them, and while that one is being killed.
        """

    def others(self) -> List[Owner]:
        """Whose containers of the same store and place are on this machine; none where they cannot outlive theirs."""


def make(settings: Dict[str, Any], owner: Owner, note: Note) -> Runtime:
    """The runtime of kind `settings["kind"]`; `note` takes sentences for the job's user. Raises Refused."""
    kind = settings["kind"]
    if kind not in RUNTIMES:
        raise Refused(f"This runner has no runtime {kind}; it has {', '.join(sorted(RUNTIMES))}.")
    module, _, name = RUNTIMES[kind].partition(":")
    runtime: Runtime = getattr(importlib.import_module("." + module, __package__), name)(settings, owner, note)
    return runtime
