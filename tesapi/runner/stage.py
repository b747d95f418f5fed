"""Files in before the executors run, and out when they have ended."""

from __future__ import annotations

import os
import stat
from typing import Callable, List, Optional, Set, Tuple

from . import wildcards
from .job import Input, Job, Output, Refused
from .mounts import Layout, Namespace, normal
from .progress import Progress
from .report import Report, plain
from .storage.base import Storage, StorageFailure, Storages, below, shown

Check = Callable[[], None]


def refusal(job: Job, storages: Storages) -> Optional[str]:
    """A sentence on the first file of the job that cannot be moved, or None. Nothing is moved to find out."""
    for item in job.inputs:
        if item.content is None:
            operation = "get_directory" if item.type == "DIRECTORY" else "get"
            sentence = storages.unsupported(item.url or "", operation)
            if sentence is not None:
                return sentence
    for output in job.outputs:
        sentence = storages.unsupported(output.url, "put")
        if sentence is not None:
            return sentence
    return None


def stage_in(job: Job, layout: Layout, storages: Storages, report: Report, check: Check) -> None:
    """Put each input where the layout wants it, and say how far that is. Raises StorageFailure."""
    staged: Set[str] = set()
    progress = Progress(report.note)
    for number, (item, path) in enumerate(zip(job.inputs, layout.staged_inputs), 1):
        check()
        if path in staged:
            continue  # the same input twice
        staged.add(path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if item.content is not None:
            _write(item, path)
            continue
        storage = storages.of(item.url or "")
        of_all = f"input {number} of {len(job.inputs)} ({shown(item.url or '')})"

        def look(storage: Storage = storage, path: str = path, of_all: str = of_all) -> None:
            check()
            progress.tell(lambda: _how_far(of_all, path, storage.total))

        storage.get(item.url or "", path, look)
        # The other way round is no mistake: clients call directories files where they do not know better.
        if item.type == "DIRECTORY" and not os.path.isdir(path):
            raise StorageFailure(f"{shown(item.url or '')} is a file, and the input {item.path} is to be a directory.")


def stage_out(job: Job, layout: Layout, storages: Storages, report: Report, check: Check) -> List[str]:
    """Store each output that is there, and report it; a sentence for each that is not there or could not be stored."""
    out = _Out(Namespace(layout.mounts), storages, report, check)
    problems: List[str] = []
    for number, output in enumerate(job.outputs, 1):
        out.what = f"output {number} of {len(job.outputs)}"
        check()
        try:
            out.store(output)
        except (Refused, StorageFailure) as error:
            problems.append(plain(str(error)))
        except OSError as error:  # such as a folder that the task has closed, or a name that is too long
            problems.append(plain(f"The output {output.path} cannot be read: {error.strerror}."))
    return problems


class _Out:
    """The way out of the containers: paths inside, links followed inside, nothing from elsewhere."""

    def __init__(self, namespace: Namespace, storages: Storages, report: Report, check: Check) -> None:
        self._namespace = namespace
        self._storages = storages
        self._report = report
        self._stop = check
        self._progress = Progress(report.note)
        self._stored = 0
        self.what = ""

    def _check(self) -> None:
        self._stop()
        self._progress.tell(lambda: f"Storing {self.what}; {self._stored / 1e6:.0f} MB are stored.")

    def store(self, output: Output) -> None:
        path = normal(output.path)
        if not wildcards.has(path) or self._status(path) is not None:
            if not self._store(path, output.url, output.type, ()):
                raise Refused(f"The output {output.path} was not written by the task (No such file or directory).")
            return
        prefix, url = wildcards.base(path, output.path_prefix, output.url)
        found = self._matching(wildcards.segments(path))
        for match in found:
            self._store(match, below(url, wildcards.relative(match, prefix)), "FILE", ())
        if not found:
            self._report.note(f"Nothing matches the output {output.path}.")

    def _store(self, path: str, url: str, kind: str, above: Tuple[str, ...]) -> bool:
        """Store a file, or a directory with all that is in it; False where there is nothing."""
        self._check()
        where = self._namespace.resolve(path)
        mode = self._status(path)
        if mode is None:
            return False
        if stat.S_ISDIR(mode):
            self._store_folder(path, where, url, above)
            return True
        if kind == "DIRECTORY":
            raise Refused(f"The output {path} is a file, and was to be a directory.")
        if not stat.S_ISREG(mode):
            raise Refused(f"The output {path} is not a regular file.")
        stored = self._storages.of(url).put(where, url, self._check)
        self._stored += stored.size_bytes
        self._report.write("output", url=plain(stored.url), path=plain(path), size_bytes=stored.size_bytes)
        return True

    def _store_folder(self, path: str, where: str, url: str, above: Tuple[str, ...]) -> None:
        if where in above:
            self._report.note(f"{path} leads to a folder around it, and was not stored.")
            return
        self._storages.of(url).make_folder(url)
        for name in sorted(self._names(path)):
            inner = path.rstrip("/") + "/" + name
            try:
                self._store(inner, below(url, name), "FILE", (*above, where))
            except Refused as refused:  # a link out of the task, or a FIFO: no reason to lose the rest
                self._report.note(f"Not stored: {refused}")

    def _matching(self, pattern: List[str]) -> List[str]:
        found = [""]
        for segment in pattern:
            if wildcards.has(segment):
                found = [
                    f"{path}/{name}" for path in found for name in self._names(path) if wildcards.matches(name, segment)
                ]
            else:
                found = [f"{path}/{segment}" for path in found]
        return sorted(path for path in found if self._status(path) is not None)

    def _names(self, path: str) -> List[str]:
        """What is in a directory of the task; nothing where it is none."""
        try:
            return os.listdir(self._namespace.resolve(path or "/"))
        except (Refused, NotADirectoryError, FileNotFoundError):
            return []

    def _status(self, path: str) -> Optional[int]:
        try:
            return os.lstat(self._namespace.resolve(path)).st_mode
        except (Refused, NotADirectoryError, FileNotFoundError):
            return None


def _how_far(of_all: str, path: str, total: Optional[int]) -> str:
    if total is None or not os.path.isfile(path):
        return f"Staging in {of_all}."
    return f"Staging in {of_all}: {os.path.getsize(path) / 1e6:.0f} of {total / 1e6:.0f} MB."


def _write(item: Input, path: str) -> None:
    try:
        with open(path, "x", encoding="utf-8", newline="") as file:
            file.write(item.content or "")
    except OSError as error:
        raise StorageFailure(f"The content of {item.path} cannot be written: {error.strerror}.") from error
