"""What stands in the log: one line per change of a task's state, and nothing of each request."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Sequence

import httpx

from tests.jobs import until
from tests.services.server import Server

TRUE = {"executors": [{"image": "alpine", "command": ["true"]}]}


def _is_a_whole_story(messages: Sequence[str], end: str) -> bool:
    """Whether each change begins with the state that the one before ended with, from QUEUED to `end`.

    What a runner told at once is one change.
    """
    states = [message.split(" -> ") for message in messages]
    return (
        states[:1] == [["QUEUED"]]
        and states[-1][-1] == end
        and all(before[-1] == after[0] != after[1] for before, after in itertools.pairwise(states))
    )


def test_each_change_of_a_state_is_one_json_object_with_its_id(tmp_path: pathlib.Path, bubblewrap: object) -> None:
    with Server(tmp_path, LOGGING__OUTPUT_JSON="true") as server:
        ids = [server.post(TRUE) for _ in range(3)]
        for task_id in ids:
            assert server.wait_for(task_id) == "COMPLETE"
        assert server.stop() == 0
        lines = [json.loads(line) for line in server.log.read_text("utf-8").splitlines()]
    for task_id in ids:
        messages = [line["message"] for line in lines if line.get("task_id") == task_id]
        assert _is_a_whole_story(messages, "COMPLETE"), messages
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)


def test_each_change_of_a_state_is_one_line_of_text(server: Server) -> None:
    task_id = server.post({"executors": [{"image": "alpine", "command": ["sleep", "60"]}]})
    server.wait_for(task_id, "RUNNING")
    server.cancel(task_id)
    server.wait_for(task_id, "CANCELED")

    def messages() -> list[str]:
        lines = server.log.read_text("utf-8").splitlines()
        return [line.partition("] ")[2] for line in lines if f"[{task_id}] " in line]

    found = until(lambda: (now := messages())[-1:] == ["CANCELING -> CANCELED"] and now, "the last line")
    assert _is_a_whole_story(found, "CANCELED"), found
    assert "RUNNING -> CANCELING" in found


def test_requests_are_not_logged(server: Server) -> None:
    before = server.log.read_text("utf-8")
    for path in ("/v1/tasks", "/v1/tasks/none", "/livez", "/nowhere", "/v1/service-info?secret=1", "/docs"):
        httpx.get(server.url + path)
    httpx.post(f"{server.url}/v1/tasks", content=b"{")
    assert server.log.read_text("utf-8") == before
