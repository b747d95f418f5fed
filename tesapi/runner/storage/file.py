"""Files of this machine, under the allowed roots only.

What a path means is decided on open descriptors, never on names that somebody may exchange meanwhile: a source is
opened and then asked where it really lies; a target's folder likewise, and the file is put there by renaming.
"""

from __future__ import annotations

import os
import stat
from typing import Any, Callable, Dict, List, Optional, Tuple

from ..mounts import is_within
from ..report import plain
from .base import StorageFailure, StoredFile

_CHUNK = 16 << 20
_Identity = Tuple[int, int]


class FileStorage:
    """`settings` are `{"roots": [absolute paths]}`."""

    def __init__(self, settings: Dict[str, Any]) -> None:
        self._total: Optional[int] = None
        self._roots: List[str] = [os.path.realpath(root) for root in settings["roots"]]

    def unsupported(self, url: str, operation: str) -> Optional[str]:
        try:
            path = path_of(url)
        except ValueError as error:
            return f"{url}: {error}."
        if "\0" in path or ".." in path.split("/"):
            return f"{url}: the path contains '..' or a NUL character."
        if operation == "put" and not path.rstrip("/").strip("/"):
            return f"{url}: not a place for a file."
        parent = path if operation != "put" else os.path.dirname(path.rstrip("/"))
        root = next((root for root in self._roots if is_within(os.path.realpath(parent), root)), None)
        if root is None:
            return self._outside(url)
        if not os.path.isdir(root):
            return f"{url}: the storage root {plain(root)} is not a directory on this machine."
        return None

    @property
    def total(self) -> Optional[int]:
        return self._total

    def get(self, url: str, path: str, check: Callable[[], None]) -> None:
        self._total = None
        try:
            # Without O_NONBLOCK, a FIFO would keep us here until somebody writes to it.
            source = os.open(path_of(url), os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise StorageFailure(f"{url} cannot be read: {error.strerror}.") from error
        try:
            self._confirm(source, url)
            self._get(source, path, url, check, ())
        except OSError as error:
            raise StorageFailure(f"{url} cannot be staged in: {error.strerror}.") from error
        finally:
            os.close(source)

    def _get(self, source: int, path: str, url: str, check: Callable[[], None], above: Tuple[_Identity, ...]) -> None:
        status = os.fstat(source)
        if stat.S_ISDIR(status.st_mode):
            self._get_folder(source, path, url, check, (*above, (status.st_dev, status.st_ino)))
        elif stat.S_ISREG(status.st_mode):
            target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            if not above:
                self._total = status.st_size
            try:
                _copy(source, target, check)
                os.fchmod(target, 0o644 | (status.st_mode & 0o111))
            finally:
                os.close(target)
        else:
            raise StorageFailure(f"{url} is, or has in it, something that is neither a file nor a directory.")

    def _get_folder(
        self, source: int, path: str, url: str, check: Callable[[], None], above: Tuple[_Identity, ...]
    ) -> None:
        os.makedirs(path, 0o755, exist_ok=True)  # an output's folder may have been made there beforehand
        for name in sorted(os.listdir(source)):
            check()
            target = os.path.join(path, name)
            inner = self._open_entry(source, name, above)
            if inner is None:
                os.symlink(os.readlink(name, dir_fd=source), target)
                continue
            try:
                self._get(inner, target, url, check, above)
            finally:
                os.close(inner)

    def _open_entry(self, folder: int, name: str, above: Tuple[_Identity, ...]) -> Optional[int]:
        """What `name` is, or leads to. None for a link that stays one: into nothing, into a folder around it, or out
        of the roots; whoever reads it in the container finds there what the container has."""
        if not stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            return os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=folder)
        try:
            inner = os.open(name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=folder)
        except OSError:
            return None
        status = os.fstat(inner)
        if self._allows(os.readlink(f"/proc/self/fd/{inner}")) and (status.st_dev, status.st_ino) not in above:
            return inner
        os.close(inner)
        return None

    def make_folder(self, url: str) -> None:
        try:
            os.close(self._open_folder(path_of(url).rstrip("/"), url))
        except OSError as error:
            raise StorageFailure(f"{url} cannot be made: {error.strerror}.") from error

    def put(self, path: str, url: str, check: Callable[[], None]) -> StoredFile:
        folder, name = os.path.split(path_of(url).rstrip("/"))
        try:
            source = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                size = self._put(source, folder, name, url, check)
            finally:
                os.close(source)
        except OSError as error:
            raise StorageFailure(f"{url} cannot be written: {error.strerror}.") from error
        return StoredFile(url.rstrip("/"), size)

    def _put(self, source: int, folder: str, name: str, url: str, check: Callable[[], None]) -> int:
        directory = self._open_folder(folder, url)
        # The name is our own and the rename replaces a link or a hard link itself, never what it shares.
        partial = f".tes-{os.getpid()}-{os.urandom(8).hex()}"
        try:
            if _is_directory(directory, name):
                raise StorageFailure(f"{url} is a directory, and cannot be replaced by a file.")
            target = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=directory)
            try:
                size = _copy(source, target, check)
                os.fsync(target)
            finally:
                os.close(target)
            os.rename(partial, name, src_dir_fd=directory, dst_dir_fd=directory)
            os.fsync(directory)
            return size
        except BaseException:
            try:
                os.unlink(partial, dir_fd=directory)
            except OSError:
                pass
            raise
        finally:
            os.close(directory)

    def _open_folder(self, folder: str, url: str) -> int:
        """A descriptor of `folder`, made where it is missing, and never outside of the roots on the way."""
        existing = folder
        missing: List[str] = []
        while not os.path.isdir(existing) and existing != "/":
            existing, name = os.path.split(existing)
            missing.append(name)
        descriptor = os.open(existing, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._confirm(descriptor, url)
            for name in reversed(missing):
                try:
                    os.mkdir(name, dir_fd=descriptor)
                except FileExistsError:
                    pass
                inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = inner
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _confirm(self, descriptor: int, url: str) -> None:
        if not self._allows(os.readlink(f"/proc/self/fd/{descriptor}")):
            raise StorageFailure(self._outside(url))

    def _allows(self, path: str) -> bool:
        return any(is_within(path, root) for root in self._roots)

    def _outside(self, url: str) -> str:
        roots = ", ".join(plain(root) for root in self._roots) or "none"
        return f"{url}: not under the storage roots of this server ({roots})."


def path_of(url: str) -> str:
    """The path in a `file` URL, percent-decoded; a plain path is taken as it is. Raises ValueError."""
    if url.startswith("/"):
        return url
    rest = url.partition(":")[2]
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host not in ("", "localhost"):
            raise ValueError(f"the host {host!r} in a file URL is not this machine")
        rest = slash + path
    if not rest.startswith("/"):
        raise ValueError("the path in a file URL is to be absolute")
    return os.fsdecode(_percent_decoded(os.fsencode(rest)))


def _percent_decoded(text: bytes) -> bytes:
    parts = text.split(b"%")
    decoded = parts[0]
    for part in parts[1:]:
        try:
            decoded += bytes([int(part[:2].decode("ascii"), 16)]) + part[2:]
        except ValueError:
            raise ValueError("a % in a file URL is to be followed by two hexadecimal digits") from None
    return decoded


def _is_directory(directory: int, name: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _copy(source: int, target: int, check: Callable[[], None]) -> int:
    """Copy all that is left of `source`; the number of bytes. Inside the kernel where it can."""
    copied, step = 0, _copy_in_kernel if hasattr(os, "copy_file_range") else _copy_through_memory
    while True:
        check()
        try:
            count = step(source, target)
        except OSError:
            if copied or step is _copy_through_memory:
                raise
            step = _copy_through_memory  # between file systems on older kernels, and on some never
            continue
        if not count:
            return copied
        copied += count


def _copy_in_kernel(source: int, target: int) -> int:
    return os.copy_file_range(source, target, _CHUNK)


def _copy_through_memory(source: int, target: int) -> int:
    view = memoryview(os.read(source, 1 << 20))
    size = len(view)
    while view:
        view = view[os.write(target, view) :]
    return size
