"""What a task leaves closed to the runner, where its containers were other users: found, and opened by its owner.

Else nobody but root could store such files, or ever remove the folders. They are opened by a container like those of
the executors, with their images, capabilities and labels, as an image's user or the files' owner: it has no rights that
the task had not, and no link leads anywhere that the task itself could not go. Owners stay as they are.
"""

from __future__ import annotations

import os
import select
import stat
import time
from typing import Iterator, List, NamedTuple, Optional, Sequence, Set

from .job import Job, Refused, Step
from .mounts import Layout, Mount
from .runtimes.base import Check, End, Note, Room, make

_PROGRAMS = (["chmod"], ["/bin/busybox", "chmod"])
_MODE = "a+rwX,a-t"  # from a sticky folder only owners may remove something
_NOT_STARTED = (126, 127)
_INSIDE = "/tesapi"
_MOST_BYTES = 100_000
_LOOK_S = 0.05
_PATIENCE_S = 60.0


class _Closed(NamedTuple):
    """Something closed: the mount that it is in, its path below that one's folder, and its owner, as uid:gid."""

    mount: Mount
    name: str
    user: str


def open_up(job: Job, layout: Layout, work: str, note: Note, check: Optional[Check] = None) -> None:
    """Open what the job has left, none of whose containers runs any more. What stays closed is noted.

    `check` may raise what it likes; without one it takes about a minute at most.
    """
    if os.geteuid() == 0:
        return
    check = check or _patience()
    folders = [mount for mount in layout.mounts if mount.writable]
    folders += [Mount(os.path.join(work, "exec", str(step.number), "tmp"), "/tmp", True) for step in job.steps]  # noqa: S108
    closed: List[_Closed] = []
    able: List[str] = []
    try:
        closed = _find(folders, check)
        for image in dict.fromkeys(step.image for step in job.steps):
            while closed and _chmod(job, image, "", closed, work, check):
                able.append(image)
                before, closed = closed, _find(folders, check)
                if closed == before:
                    break
        # What is not those images' users': files of an image that has no chmod, and such as were given away.
        hopeless: Set[str] = set()
        while able and {found.user for found in closed} - hopeless:
            user = min({found.user for found in closed} - hopeless)
            _chmod(job, able[0], user, closed, work, check)
            before, closed = closed, _find(folders, check)
            if closed == before:
                hopeless.add(user)
        why = "chmod did not open them" if able else "no image of the task has chmod"
    except (Refused, OSError) as error:
        why = str(error).rstrip(".")
    if closed:
        paths = ", ".join(
            f"{found.mount.target.rstrip('/')}/{found.name} (of user {found.user.partition(':')[0]})"
            for found in closed[:3]
        )
        more = " and others" if len(closed) > 3 else ""
        note(f"The task left files closed to the runner, which may stay on its machine: {paths}{more}; {why}.")


def _patience() -> Check:
    deadline = time.monotonic() + _PATIENCE_S

    def check() -> None:
        if time.monotonic() > deadline:
            raise Refused(f"they could not be opened within {_PATIENCE_S:.0f} seconds")

    return check


def _find(folders: Sequence[Mount], check: Check) -> List[_Closed]:
    """The outermost of what is closed, as much as a command line takes."""
    found: List[_Closed] = []
    room = _MOST_BYTES
    for mount in folders:
        for closed in _closed_in(mount, check):
            room -= len(os.fsencode(closed.name)) + len(_INSIDE) + 10
            if room < 0 and found:
                return found
            found.append(closed)
    return found


def _closed_in(mount: Mount, check: Check) -> Iterator[_Closed]:
    pending = [""]
    while pending:
        check()
        name = pending.pop()
        path = os.path.join(mount.source, name)
        try:
            status = os.lstat(path)
            if _is_closed(path, status):
                yield _Closed(mount, name, f"{status.st_uid}:{status.st_gid}")
            elif stat.S_ISDIR(status.st_mode):
                pending.extend(os.path.join(name, inner) for inner in os.listdir(path))
        except OSError:
            continue  # not there; or the runner's own, which it opens itself to remove it


def _is_closed(path: str, status: os.stat_result) -> bool:
    if status.st_uid == os.geteuid():
        return False
    if stat.S_ISDIR(status.st_mode):
        return bool(status.st_mode & stat.S_ISVTX) or not os.access(path, os.R_OK | os.W_OK | os.X_OK)
    return stat.S_ISREG(status.st_mode) and not os.access(path, os.R_OK)


def _chmod(job: Job, image: str, user: str, closed: Sequence[_Closed], work: str, check: Check) -> bool:
    """Open what is `closed` as `user`, or else the image's own; False where it has no chmod."""
    numbers = {mount: number for number, mount in enumerate(dict.fromkeys(found.mount for found in closed))}
    mounts = [Mount(mount.source, f"{_INSIDE}/{number}", True) for mount, number in numbers.items()]
    # Only what is closed: at what is the runner's, busybox's chmod would turn back.
    paths = [f"{_INSIDE}/{numbers[found.mount]}/{found.name}" for found in closed]
    for program in _PROGRAMS:
        command = [*program, "-R", _MODE, *paths]
        step = Step(len(job.steps), image, command, {}, "/", "", "", "", ignore_error=False)
        end = _run(job, step, user, mounts, work, check)
        if end.failure is not None:
            raise Refused(end.failure)
        if end.exit_code not in _NOT_STARTED:
            return True
    return False


def _run(job: Job, step: Step, user: str, mounts: Sequence[Mount], work: str, check: Check) -> End:
    import tempfile  # few jobs leave something closed

    settings = {**job.runtime, "pull": "never", **({"user": user} if user else {})}
    runtime = make(settings, job.owner, lambda text: None)
    runtime.pull(step.image, check)
    with open(os.devnull, "rb") as nothing, tempfile.TemporaryFile() as said:
        room = Room(
            mounts=mounts,
            limits=job.limits,
            scratch=tempfile.mkdtemp(dir=os.path.join(work, "exec")),
            stdin=nothing.fileno(),
            stdout=said.fileno(),
            stderr=said.fileno(),
            has_stdin=False,
            at_top=(),
            check=check,
        )
        try:
            container = runtime.container(step, room)
            container.start()
            while True:
                end = container.poll()
                if end is not None:
                    return end
                check()
                select.select(*container.descriptors(), [], _LOOK_S)
        finally:
            runtime.remove()
