"""Output paths with the wildcards of POSIX (IEEE Std 1003.1-2017, 2.13), and the URLs of what they match."""

from __future__ import annotations

import fnmatch
import posixpath
import re
from typing import List, Tuple

_WILDCARD = re.compile(r"[*?\[]")


def has(path: str) -> bool:
    """Whether `path` has wildcards."""
    return _WILDCARD.search(path) is not None


def fixed_part(path: str) -> str:
    """The part of `path` before its first segment with a wildcard, and that segment: its folder holds all matches."""
    segments = path.split("/")
    for number, segment in enumerate(segments):
        if has(segment):
            return "/".join(segments[: number + 1])
    return path


def matches(name: str, pattern: str) -> bool:
    """Whether one segment matches; a leading period only where the pattern has it, and `**` is no more than `*`."""
    return name.startswith(".") <= pattern.startswith(".") and fnmatch.fnmatchcase(name, pattern)


def base(path: str, path_prefix: str, url: str) -> Tuple[str, str]:
    """What is taken from the front of a matching path, and the URL below which the rest goes.

    That is `path_prefix` and `url` as the specification has it. Early and current versions of Nextflow leave the
    prefix out and repeat the pattern at the end of the URL; then that is taken off both.
    """
    if path_prefix:
        return posixpath.normpath(path_prefix), url
    folder = posixpath.dirname(fixed_part(path))
    pattern = path[len(folder) :].strip("/")
    return folder, url[: -len(pattern)].rstrip("/") if url.endswith("/" + pattern) else url


def relative(path: str, prefix: str) -> str:
    """`path` without `prefix`, which it may not have."""
    inside = path == prefix or path.startswith(prefix.rstrip("/") + "/")
    return path[len(prefix) :].lstrip("/") if inside else path.lstrip("/")


def segments(path: str) -> List[str]:
    """The parts of an absolute path."""
    return [segment for segment in path.split("/") if segment]
