"""Tasks for the fault suites: each says outside of its container when it begins and ends, and has one right end."""

from __future__ import annotations

import contextlib
import pathlib
import random
import socketserver
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.services.server import Server


class Counting(socketserver.ThreadingTCPServer):
    """Counts, outside of every sandbox, what runs: each command says its name over TCP when it starts and ends."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        self.said: list[str] = []
        super().__init__(("127.0.0.1", 0), _Said)

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _Said(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Counting)
        self.server.said += [line.decode().strip() for line in self.rfile]


@dataclass
class Posted:
    """What was asked for, and what is to become of it."""

    expected: str
    executors_run: int
    task_id: str | None = None
    cancel: bool = False
    document: dict[str, Any] = field(default_factory=dict)


_SAY = {
    "bubblewrap": ("bash", "exec 3<>/dev/tcp/127.0.0.1/{port}"),
    # Of busybox; what has been said is to arrive before the container ends.
    "docker": (
        "sh",
        "mkfifo /tmp/p; nc 127.0.0.1 {port} < /tmp/p & exec 3> /tmp/p; trap 'exec 3>&-; wait' EXIT",
    ),
}
"""How a command opens a line to what counts: the shell, and its words."""


def _task(name: str, kind: str, seconds: float, port: int, storage: pathlib.Path, runtime: str) -> Posted:
    def command(index: int, then: str) -> list[str]:
        shell, say = _SAY[runtime]
        begin, end = f"echo {name}/{index}/begin >&3", f"echo {name}/{index}/end >&3"
        return [shell, "-c", f"{say.format(port=port)}; {begin}; sleep {seconds / 2:.2f}; {then}; {end}"]

    first, second = "cat /in/a /in/b > /vol/both", "cat /vol/both > /out/o"
    expected, run = "COMPLETE", 2
    if kind == "fails":
        first, expected, run = "exit 3", "EXECUTOR_ERROR", 1
    elif kind == "forgets":
        second, expected = "true", "SYSTEM_ERROR"
    document = {
        "name": name,
        "inputs": [
            {"path": "/in/a", "url": f"file://{storage}/input"},
            {"path": "/in/b", "content": f"{name}\n"},
        ],
        "outputs": [{"path": "/out/o", "url": f"file://{storage}/{name}"}],
        "volumes": ["/vol"],
        "executors": [
            {"image": "alpine", "command": command(0, first)},
            {"image": "debian:bookworm", "command": command(1, second)},
        ],
        "tags": {"kind": kind},
    }
    return Posted(expected, run, document=document)


class Poster:
    """Posts tasks, each under a name of its own, whatever becomes of the server meanwhile."""

    def __init__(self, server: Server, counting: Counting, chance: random.Random, runtime: str) -> None:
        self.runtime = runtime
        self.posted: dict[str, Posted] = {}
        self.server = server
        self.counting = counting
        self.chance = chance
        self.storage = server.folder / "data" / "files"
        self.storage.mkdir(parents=True, exist_ok=True)
        (self.storage / "input").write_text("of the input\n", "ascii")

    @property
    def acknowledged(self) -> int:
        return sum(task.task_id is not None for task in self.posted.values())

    def post(self) -> None:
        """Post one more task; it counts as acknowledged only if the server said so."""
        process = self.server.process
        assert process is None or process.poll() is None, self.server.log.read_text("utf-8")[-4000:]
        name = f"task-{len(self.posted)}"
        kind = self.chance.choice(["runs", "runs", "runs", "runs", "fails", "forgets", "is canceled"])
        seconds = self.chance.choice([0.0, 0.1, 0.3, 1.0, 2.0])
        task = self.posted[name] = _task(name, kind, seconds, self.counting.port, self.storage, self.runtime)
        with contextlib.suppress(httpx.TransportError):
            task.task_id = self.server.post(task.document)
            if kind == "is canceled":
                time.sleep(self.chance.choice([0, 0.1, 0.5]))
                task.cancel = True
                self.server.cancel(task.task_id)


def check(poster: Poster, tasks: Mapping[str, Mapping[str, Any]], said: Counter[str]) -> None:
    """Nothing lost, nothing run twice, no lie told: of `tasks`, by id, and of what was `said` outside."""
    names = [task["name"] for task in tasks.values()]
    assert len(names) == len(set(names))
    for name, posted in poster.posted.items():
        if posted.task_id is not None:
            assert tasks[posted.task_id]["name"] == name, "an acknowledged task is there"
    for task in tasks.values():
        posted = poster.posted[task["name"]]
        begun = [said[f"{task['name']}/{index}/begin"] for index in range(2)]
        assert max(begun) <= 1, f"{task['name']} ran twice"
        if task["state"] == "CANCELED":
            assert posted.cancel, f"nobody canceled {task['name']}"
            continue
        explained = task["name"], task["logs"]
        assert task["state"] == posted.expected, explained
        assert begun == [1, int(posted.executors_run == 2)], explained
        stored = poster.storage / task["name"]
        if posted.expected == "COMPLETE":
            assert stored.read_text("ascii") == f"of the input\n{task['name']}\n"
            assert task["logs"][-1]["outputs"][0]["size_bytes"] == str(stored.stat().st_size)
            assert [log["exit_code"] for log in task["logs"][-1]["logs"]] == [0, 0]
        else:
            assert not stored.exists()
            assert task["logs"][-1]["system_logs"], "a failure says why"
    assert set(said.values()) <= {1}
    assert {key.split("/")[0] for key in said} <= set(names), "what ran is in the list"
