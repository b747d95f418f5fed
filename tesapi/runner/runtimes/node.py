"""What the jobs of one user on one node agree on: who fetches an image while the others wait for it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import time
from typing import Iterator

from ..job import Refused
from ..progress import Progress
from .base import Check, Note

_LOOK_S = 0.1


@contextlib.contextmanager
def alone(purpose: str, check: Check, note: Note) -> Iterator[None]:
    """Hold the node's lock for `purpose`; wait for it as long as it takes."""
    name = hashlib.sha256(purpose.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    descriptor = os.open(os.path.join(_folder(), name), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        progress = Progress(note)
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress.tell(lambda: f"Waiting: another job on this machine is {purpose}.")
                check()
                time.sleep(_LOOK_S)
        yield
    finally:
        os.close(descriptor)


def _folder() -> str:
    """A folder of this user's own below /tmp, where others could have made one first."""
    path = f"/tmp/tesapi-{os.getuid()}"  # noqa: S108 - checked below
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise Refused(f"{path} is not a folder that only this user can write to; jobs keep their locks there.")
    return path
