"""What the containers of all engines have in common: whose they are, their own /tmp, and the words on their end."""

from __future__ import annotations

import csv
import io
import os
from typing import Dict, List, Optional, Sequence

from ..job import Limits, Owner
from ..mounts import Mount
from .base import Room

_TMP = "/tmp"  # noqa: S108 - in a container
_LABELS = ("store", "task", "job", "lock", "place")  # in the order of Owner


def labels(owner: Owner) -> Dict[str, str]:
    """How a container tells whose it is."""
    return {f"tesapi.{name}": value for name, value in zip(_LABELS, owner)}


def owner_of(found: Dict[str, str]) -> Owner:
    """The opposite of `labels`."""
    return Owner(*(found.get(f"tesapi.{field}", "") for field in _LABELS))


def bad_image(image: str) -> Optional[str]:
    """A sentence on an image whose name no engine would take, or None."""
    odd = any(character.isspace() or character == "\0" for character in image)
    if odd or image.startswith("-") or {"", ".", ".."} & set(image.split("/")):
        return f"The image {image!r} is not the name of an image."
    return None


def out_of_memory(limits: Limits, code: int) -> str:
    """The sentence on a step of which something was killed because memory ran out."""
    limit = f"the limit of {limits.ram_gb:g} GB (resources.ram_gb)" if limits.ram_gb else "this machine's memory"
    return (
        f"it ran out of memory; {limit} was used up."
        if code
        else f"a process of it ran out of memory; {limit} was used up."
    )


def with_tmp(room: Room) -> List[Mount]:
    """The room's mounts but for /, and a /tmp on disk where the task has none of its own."""
    mounts = [mount for mount in room.mounts if mount.target != "/"]
    if not any(mount.target == _TMP for mount in mounts):
        private = os.path.join(room.scratch, "tmp")
        os.mkdir(private)
        os.chmod(private, 0o1777)  # noqa: S103 - as every /tmp; around it lies a folder of the runner's
        mounts.append(Mount(private, _TMP, True))
    return mounts


def comma_separated(fields: Sequence[str]) -> str:
    """The value of an option --mount, whatever its fields hold: such options are read as a line of CSV."""
    line = io.StringIO()
    csv.writer(line).writerow(fields)
    return line.getvalue()[: -len("\r\n")]
