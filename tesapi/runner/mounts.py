"""Which directories and files a job's containers see, and where a path inside of them lies outside.

Inputs are private copies, mounted one by one and read-only, so that what the image has beside them stays visible.
Volumes and the folders of outputs and streams are directories of the job, writable and shared by all its executors.
"""

from __future__ import annotations

import os
import posixpath
import stat
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

from . import wildcards
from .job import Job, Refused

_RESERVED = ("/proc", "/sys", "/dev")
_MAX_LINKS = 40
DISCARD = "/dev/null"


class Mount(NamedTuple):
    """`source` outside is seen as `target` in the container. A `target` of / is the container's own root."""

    source: str
    target: str
    writable: bool


class Layout(NamedTuple):
    """The mounts of a job, parents first, and where each input is to be staged, in the order of the job's inputs.

    `at_top` are the patterns of names directly below / at which outputs may lie.
    """

    mounts: List[Mount]
    staged_inputs: List[str]
    at_top: List[str]


def normal(path: str) -> str:
    """`path` without empty, `.` and trailing parts."""
    return "/" + posixpath.normpath(path).lstrip("/")


def is_within(path: str, directory: str) -> bool:
    """Whether `path` is `directory` or lies below it, segment by segment. Both are normal."""
    return directory == "/" or path == directory or path.startswith(directory + "/")


def plan(job: Job, work: str) -> Layout:
    """The mounts that `job` needs, with sources below `work`. Raises Refused for a path that cannot be a mount."""
    outputs = {normal(output.path) for output in job.outputs}
    wanted = _wanted_folders(job)
    folders = _writable_folders(job)
    mounts = [
        Mount(os.path.join(work, "root") if folder == "/" else os.path.join(work, "files", str(number)), folder, True)
        for number, folder in enumerate(folders)
    ]
    staged: List[str] = []
    claimed: Dict[str, int] = {}
    for number, item in enumerate(job.inputs):
        path = _mountable(item.path)
        first = claimed.setdefault(path, number)
        if (item.url, item.content) != (job.inputs[first].url, job.inputs[first].content):
            raise Refused(f"Two different inputs have the path {path}.")
        if first != number:
            staged.append(staged[first])
            continue
        # A copy that the task may write over: as Cromwell's scripts are, and folders into which outputs go.
        if path in outputs or _holds(path, wanted):
            staged.append(_beneath(mounts, path))
        else:
            staged.append(os.path.join(work, "in", str(number)))
            mounts.append(Mount(staged[-1], path, False))
    mounts.sort(key=lambda mount: 0 if mount.target == "/" else mount.target.count("/"))
    return Layout(mounts, staged, _at_top(job, folders))


def make_folders(job: Job, layout: Layout) -> None:
    """Make the writable folders, and in them what the job's paths need: folders of outputs, streams and volumes."""
    namespace = Namespace(layout.mounts)
    for mount in layout.mounts:
        if mount.writable:
            os.makedirs(mount.source)
    for folder in _wanted_folders(job):
        os.makedirs(namespace.resolve(folder), exist_ok=True)


def make_mount_points(layout: Layout) -> None:
    """Make the places for mounts inside of other mounts, where they are not yet or not any more.

    Asked before each executor, when the inputs are staged, since it looks at them. Raises Refused where a link stands
    in the way: it could lead out of the job.
    """
    for mount in layout.mounts:
        parents = [other for other in layout.mounts if other is not mount and is_within(mount.target, other.target)]
        parents = [other for other in parents if other.target not in ("/", mount.target)]
        if not parents:
            continue
        point = _beneath(parents, mount.target)
        top = max((other.source for other in parents if point.startswith(other.source + "/")), key=len)
        folder = top
        for name in os.path.relpath(point, top).split("/"):
            folder = os.path.join(folder, name)
            if os.path.islink(folder):
                raise Refused(f"{mount.target} cannot be mounted: there is a symbolic link on its way.")
        os.makedirs(os.path.dirname(point), exist_ok=True)
        if os.path.isdir(mount.source):
            os.makedirs(point, exist_ok=True)
        elif not os.path.lexists(point):
            os.close(os.open(point, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def open_to_all(layout: Layout) -> None:
    """Let any user read what is mounted, and write where it may be written. Around it lies a folder of the runner's."""
    for mount in layout.mounts:
        _open(mount.source, 0o222 if mount.writable else 0)
        for folder, folders, files in os.walk(mount.source):
            for name in folders + files:
                _open(os.path.join(folder, name), 0o222 if mount.writable else 0)


def _open(path: str, more: int) -> None:
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        return
    more |= 0o555 if stat.S_ISDIR(status.st_mode) else 0o444
    if status.st_mode & more != more:
        os.chmod(path, stat.S_IMODE(status.st_mode) | more)


class Namespace:
    """Paths as the containers see them, led back to where they lie; links never lead out of the job's own mounts."""

    def __init__(self, mounts: Sequence[Mount]) -> None:
        self._mounts = mounts

    def resolve(self, path: str) -> str:
        """Where `path` lies outside, after every link; nothing needs to be there. Raises Refused outside the mounts."""
        seen = follow_links(path, self._link)
        where = self._where(seen)
        if where is None:
            led = f" leads to {seen}, which" if seen != normal(path) else ""
            raise Refused(f"{path}{led} is not in an input, an output folder or a volume of the task.")
        return where

    def _where(self, path: str) -> Optional[str]:
        fitting = [mount for mount in self._mounts if is_within(path, mount.target)]
        return _beneath(fitting, path) if fitting else None

    def _link(self, path: str) -> Optional[str]:
        where = self._where(path)
        return os.readlink(where) if where is not None and os.path.islink(where) else None


def follow_links(path: str, link: Callable[[str], Optional[str]]) -> str:
    """`path` with each link followed; `link` gives the target of a path that is one. Raises Refused for a ring."""
    pending = path.split("/")[::-1]
    done: List[str] = []
    links = 0
    while pending:
        name = pending.pop()
        if name in ("", "."):
            continue
        if name == "..":
            del done[-1:]
            continue
        target = link("/" + "/".join([*done, name]))
        if target is None:
            done.append(name)
            continue
        links += 1
        if links > _MAX_LINKS:
            raise Refused(f"{path} leads through too many symbolic links.")
        if target.startswith("/"):
            done = []
        pending.extend(target.split("/")[::-1])
    return "/" + "/".join(done)


def _beneath(mounts: Sequence[Mount], path: str) -> str:
    """Where `path` lies in the innermost of `mounts` that hold it."""
    mount = max((m for m in mounts if is_within(path, m.target)), key=lambda m: len(m.target.rstrip("/")))
    return os.path.join(mount.source, path[len(mount.target) :].lstrip("/")).rstrip("/")


def _writable_folders(job: Job) -> List[str]:
    """The outermost of the folders that are wanted; / holds files at the top, and stands for nothing below it."""
    wanted = _wanted_folders(job)
    # An input into which something is to be written is a folder of the job, too.
    inputs = [_mountable(item.path) for item in job.inputs]
    wanted = sorted({*wanted, *(path for path in inputs if _holds(path, wanted))})
    return sorted(
        folder
        for folder in wanted
        if not any(other not in ("/", folder) and is_within(folder, other) for other in wanted)
    )


def _holds(path: str, wanted: Sequence[str]) -> bool:
    return any(is_within(folder, path) for folder in wanted)


def _wanted_folders(job: Job) -> List[str]:
    wanted = {_mountable(volume) for volume in job.volumes}
    wanted.update(posixpath.dirname(_mountable(wildcards.fixed_part(output.path))) for output in job.outputs)
    for step in job.steps:
        for stream in (step.stdout, step.stderr):
            if stream and stream != DISCARD:
                wanted.add(posixpath.dirname(_mountable(stream)))
    return sorted(wanted)


def _at_top(job: Job, folders: Sequence[str]) -> List[str]:
    paths = [normal(output.path) for output in job.outputs]
    inside = [folder for folder in folders if folder != "/"]
    return sorted({path.split("/")[1] for path in paths if not any(is_within(path, folder) for folder in inside)})


def _mountable(path: str) -> str:
    path = normal(path)
    if path == "/" or any(is_within(path, reserved) for reserved in _RESERVED):
        raise Refused(f"{path} cannot be the place of a file of the task: /, /proc, /sys and /dev are the container's.")
    return path
