"""What stands in the log: one line per change of a task's state, and nothing of each request."""

from __future__ import annotations

import itertools
import json
import pathlib

import httpx

from tests.jobs import until
from tests.services.server import Server

TRUE = {"executors": [{"image": "alpine", "command": ["true"]}]}


def _is_a_tasks_story(changes: list[str]) -> bool:
    """From QUEUED to COMPLETE, each change from where the one before led; a quick task may skip states."""
    steps = [change.split(" -> ") for change in changes]
    joined = all(before[-1] == after[0] for before, after in itertools.pairwise(steps))
    return joined and steps[0] == ["QUEUED"] and steps[-1][-1] == "COMPLETE" and len(steps) > 1


def test_each_change_of_a_state_is_one_json_object_with_the_tasks_id(
    tmp_path: pathlib.Path, bubblewrap: object
) -> None:
    with Server(tmp_path, LOGGING__OUTPUT_JSON="true") as server:
        ids = [server.post(TRUE) for _ in range(3)]
        for task_id in ids:
            assert server.wait_for(task_id) == "COMPLETE"
        assert server.stop() == 0
        lines = [json.loads(line) for line in server.log.read_text("utf-8").splitlines()]
    for task_id in ids:
        assert _is_a_tasks_story([line["message"] for line in lines if line.get("task_id") == task_id])
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)


def test_each_change_of_a_state_is_one_line_of_text(server: Server) -> None:
    task_id = server.post(TRUE)
    server.wait_for(task_id)

    def changes() -> list[str]:
        lines = server.log.read_text("utf-8").splitlines()
        return [line.partition("] ")[2] for line in lines if f"[{task_id}] " in line]

    until(lambda: changes()[-1:] and changes()[-1].endswith("COMPLETE"), "the last line")
    assert _is_a_tasks_story(changes())


def test_requests_are_not_logged(server: Server) -> None:
    before = server.log.read_text("utf-8")
    for path in ("/v1/tasks", "/v1/tasks/none", "/livez", "/nowhere", "/v1/service-info?secret=1", "/docs"):
        httpx.get(server.url + path)
    httpx.post(f"{server.url}/v1/tasks", content=b"{")
    assert server.log.read_text("utf-8") == before
