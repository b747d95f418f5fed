"""Files directly below /: nothing can be mounted there, so they are copied into a container and out of it, as tar.

Few jobs have such files, so what it takes to pack them is imported only then.
"""

from __future__ import annotations

import os
from typing import IO, Callable, List, Optional, Sequence

from .. import wildcards


def put(send: Callable[[IO[bytes]], object], root: str) -> None:
    """`send` what lies in `root` as a tar archive; nothing where it is empty."""
    if not os.listdir(root):
        return
    import tarfile
    import tempfile

    with tempfile.TemporaryFile(dir=root) as archive:
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for name in sorted(os.listdir(root)):
                tar.add(os.path.join(root, name), arcname=name)
        archive.seek(0)
        send(archive)


def wanted(paths: Sequence[str], patterns: Sequence[str]) -> List[str]:
    """Of changed paths those directly below / at which outputs may lie."""
    names = {path[1:] for path in paths if path.startswith("/") and "/" not in path[1:]}
    return sorted(
        "/" + name for name in names if any(name == pattern or wildcards.matches(name, pattern) for pattern in patterns)
    )


def unpack(stream: IO[bytes], root: str) -> None:
    """Unpack files, directories and links below `root`, and nothing that leads out of it while it is unpacked."""
    import shutil
    import tarfile

    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            target = _below(root, member.name)
            if target is None:
                continue
            if member.isdir():
                os.makedirs(target, exist_ok=True)
                continue
            if os.path.lexists(target):
                os.unlink(target)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if member.issym():
                os.symlink(member.linkname, target)
            elif member.islnk():
                first = _below(root, member.linkname)
                if first is not None and os.path.isfile(first):
                    shutil.copyfile(first, target)
            elif member.isfile():
                source = tar.extractfile(member)
                if source is not None:
                    with open(target, "xb") as file:
                        shutil.copyfileobj(source, file, 1 << 20)


def _below(root: str, name: str) -> Optional[str]:
    """Where `name` goes; None where its way leads through a link or out of `root`."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        return None
    folder = root
    for part in parts[:-1]:
        folder = os.path.join(folder, part)
        if os.path.islink(folder):
            return None
    return os.path.join(folder, parts[-1])
