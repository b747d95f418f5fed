"""Files in before the executors run, and out when they have ended."""

from __future__ import annotations

import os
import re
import stat
from typing import Callable, List, Optional

from .job import Input, Job, Output, Refused
from .mounts import Layout, Namespace
from .report import Report, plain
from .storage.base import StorageFailure, Storages

_WILDCARD = re.compile(r"[*?\[]")


def refusal(job: Job, storages: Storages) -> Optional[str]:
    """A sentence on the first file of the job that cannot be moved, or None. Nothing is moved to find out."""
    for item in job.inputs:
        if item.type != "FILE":
            return f"The input {item.path} is a {item.type}: this version of the runner stages single files."
        if item.content is None:
            sentence = storages.unsupported(item.url or "", "get")
            if sentence is not None:
                return sentence
    for output in job.outputs:
        if output.type != "FILE":
            return f"The output {output.path} is a {output.type}: this version of the runner stores single files."
        if _WILDCARD.search(output.path):
            return f"The output {output.path} has wildcards: this version of the runner stores single files."
        sentence = storages.unsupported(output.url, "put")
        if sentence is not None:
            return sentence
    return None


def stage_in(job: Job, layout: Layout, storages: Storages, check: Callable[[], None]) -> None:
    """Put each input where the layout wants it. Raises StorageFailure."""
    for item, path in zip(job.inputs, layout.staged_inputs):
        check()
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.lexists(path):
            continue  # the same input twice
        if item.content is not None:
            _write(item, path)
        else:
            storages.of(item.url or "").get(item.url or "", path, check)


def stage_out(job: Job, layout: Layout, storages: Storages, report: Report, check: Callable[[], None]) -> List[str]:
    """Store each output that is there, and report it; a sentence for each that is not there or could not be stored."""
    namespace = Namespace(layout.mounts)
    problems: List[str] = []
    for output in job.outputs:
        check()
        try:
            path = _existing_file(output, namespace)
            stored = storages.of(output.url).put(path, output.url, check)
        except (Refused, StorageFailure) as error:
            problems.append(plain(str(error)))
            continue
        report.write("output", url=plain(stored.url), path=output.path, size_bytes=stored.size_bytes)
    return problems


def _existing_file(output: Output, namespace: Namespace) -> str:
    path = namespace.resolve(output.path)
    try:
        mode = os.lstat(path).st_mode
    except OSError as error:
        raise Refused(f"The output {output.path} was not written by the task ({error.strerror}).") from error
    if stat.S_ISDIR(mode):
        raise Refused(f"The output {output.path} is a directory: this version of the runner stores single files.")
    if not stat.S_ISREG(mode):
        raise Refused(f"The output {output.path} is not a regular file.")
    return path


def _write(item: Input, path: str) -> None:
    try:
        with open(path, "x", encoding="utf-8", newline="") as file:
            file.write(item.content or "")
    except OSError as error:
        raise StorageFailure(f"The content of {item.path} cannot be written: {error.strerror}.") from error
