"""The job document: what `tesapi.jobs.plan` writes and the runner reads, and where a job's files lie."""

from __future__ import annotations

import json
import os
from typing import Any, Dict, List, NamedTuple, Optional

VERSION = 1


class Refused(Exception):
    """The job cannot be run here; the text is a sentence for the user."""


class Input(NamedTuple):
    """A file to be there at `path`: `content` where that is not None, else what `url` holds."""

    path: str
    type: str
    url: Optional[str]
    content: Optional[str]


class Output(NamedTuple):
    """A file or directory to be stored at `url` when the executors have ended; `path` may have wildcards."""

    path: str
    type: str
    url: str
    path_prefix: str


class Owner(NamedTuple):
    """Whose containers they are: what a later runner, or an operator, wants to know of one.

    `lock` is a path. `place` tells the folder of this job's and its neighbours' directories from all others, also where
    runners that share an engine see different files under the same path.
    """

    store_id: str
    task_id: str
    job_id: str
    lock: str
    place: str


class Limits(NamedTuple):
    """What the task asked for, and is not to exceed; None where it did not say. `ram_gb`, `disk_gb` in 10^9 bytes."""

    cpu_cores: Optional[int]
    ram_gb: Optional[float]
    disk_gb: Optional[float]


class Step(NamedTuple):
    """One executor. Paths are inside its container; empty where none was given."""

    number: int
    image: str
    command: List[str]
    env: Dict[str, str]
    workdir: str
    stdin: str
    stdout: str
    stderr: str
    ignore_error: bool


class Job(NamedTuple):
    """One attempt at a task. A `tidy` one removes its files itself: whoever removes its place knows less of them."""

    owner: Owner
    steps: List[Step]
    inputs: List[Input]
    outputs: List[Output]
    volumes: List[str]
    limits: Limits
    storage: Dict[str, Any]
    runtime: Dict[str, Any]
    tail_bytes: int
    tidy: bool


class Places:
    """Where everything of a job lies, given the path of its document.

    The layout is that of a Pulsar job directory, in which `inputs/` and `metadata/` survive a second start.
    """

    def __init__(self, document: str) -> None:
        self.document = os.path.abspath(document)
        self.directory = os.path.dirname(os.path.dirname(self.document))
        self.metadata = os.path.join(self.directory, "metadata")
        self.lock = os.path.join(self.metadata, "lock")
        self.started = os.path.join(self.metadata, "started")
        self.report = os.path.join(self.metadata, "report.jsonl")
        self.tails = os.path.join(self.metadata, "tails.json")
        self.cancelled = os.path.join(self.directory, "cancelled")
        self.complaints = os.path.join(self.metadata, "runner.stderr")
        self.work = os.path.join(self.directory, "tes")


def read(path: str) -> Job:
    """The job in the document at `path`. Raises Refused where it is none that this runner knows."""
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
        if document["version"] != VERSION:
            raise Refused(f"The job document is of version {document['version']!r}; this runner reads {VERSION}.")
        return _job(document, Places(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"The job document cannot be read: {type(error).__name__}: {error}.") from error


def _job(document: Dict[str, Any], places: Places) -> Job:
    limits = document["limits"]
    return Job(
        owner=Owner(document["store_id"], document["task_id"], document["job_id"], places.lock, _place(places)),
        steps=[_step(number, step) for number, step in enumerate(document["executors"])],
        inputs=[Input(i["path"], i["type"], i.get("url"), i.get("content")) for i in document["inputs"]],
        outputs=[Output(o["path"], o["type"], o["url"], o.get("path_prefix", "")) for o in document["outputs"]],
        volumes=list(document["volumes"]),
        limits=Limits(limits.get("cpu_cores"), limits.get("ram_gb"), limits.get("disk_gb")),
        storage=document["storage"],
        runtime=document["runtime"],
        tail_bytes=int(document["tail_bytes"]),
        tidy=bool(document.get("tidy")),
    )


def _place(places: Places) -> str:
    status = os.stat(os.path.dirname(places.directory))
    return f"{status.st_dev}:{status.st_ino}"


def _step(number: int, step: Dict[str, Any]) -> Step:
    return Step(
        number=number,
        image=step["image"],
        command=list(step["command"]),
        env=dict(step["env"]),
        workdir=step["workdir"],
        stdin=step["stdin"],
        stdout=step["stdout"],
        stderr=step["stderr"],
        ignore_error=bool(step["ignore_error"]),
    )
