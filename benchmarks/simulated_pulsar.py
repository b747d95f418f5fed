"""What a Pulsar says on the wire, without running anything: jobs begin at once, and run until they are canceled.

`python -m benchmarks.simulated_pulsar PORT`. For measuring what the service takes for very many jobs in flight. With
`--ends`, jobs have ended as soon as they are submitted: for measuring how many tasks it drives where nothing is run.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from urllib.parse import parse_qs

import uvicorn

_AT = "2026-01-01T00:00:00.000000Z"
_RUNNING = (
    json.dumps({"seq": 1, "at": _AT, "event": "started", "host": "simulated"})
    + "\n"
    + json.dumps({"seq": 2, "at": _AT, "event": "executor_started", "index": 0, "image_used": "simulated"})
    + "\n"
).encode()
_ENDED = (
    _RUNNING.decode()
    + json.dumps({"seq": 3, "at": _AT, "event": "executor_ended", "index": 0, "exit_code": 0})
    + "\n"
    + json.dumps({"seq": 4, "at": _AT, "event": "ended", "outcome": "complete"})
    + "\n"
)
_FOUND = {"kind": "simulated"}

jobs: dict[str, str] = {}
ends = False


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answer as Pulsar does: everything as text/html, and a file that is not there with 500."""
    if scope["type"] != "http":
        return
    more = True
    while more:
        more = (await receive()).get("more_body", False)
    query = {name: values[0] for name, values in parse_qs(scope["query_string"].decode()).items()}
    status, body = _answer(scope["method"], scope["path"].strip("/").split("/"), query)
    headers = [(b"content-type", b"text/html; charset=UTF-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _answer(method: str, path: list[str], query: dict[str, str]) -> tuple[int, bytes]:
    if path == ["healthz"]:
        return 200, json.dumps({"version": "0.16.0"}).encode()
    if path == ["jobs"]:
        jobs[query["job_id"]] = "preprocessing"
        return 200, json.dumps({"job_id": query["job_id"], "job_directory": f"/sim/{query['job_id']}"}).encode()
    job_id, what = path[1], path[2] if len(path) > 2 else ""
    if method == "DELETE":
        jobs.pop(job_id, None)
        return 200, b"OK"
    if what == "submit":
        probe = "--probe" in query["command_line"]
        jobs[job_id] = "complete" if probe else "ended" if ends else "running"
        return 200, b"OK"
    if what == "status":
        return 200, json.dumps(_status(job_id)).encode()
    if what == "files" and method == "GET":
        known = query["name"] == "report.jsonl" and jobs.get(job_id) == "running"
        return (200, _RUNNING) if known else (500, b"")
    return 200, b"{}"


def _status(job_id: str) -> dict[str, object]:
    state = jobs.get(job_id, "lost")
    if state == "ended":
        return {"job_id": job_id, "complete": "true", "status": "complete", "returncode": 0, "job_stdout": _ENDED}
    if state != "complete":
        return {"job_id": job_id, "complete": "false", "status": state}
    said = {"event": "probed", "host": "simulated", "found": _FOUND, "sentence": "Nothing is run: it is simulated."}
    return {"job_id": job_id, "complete": "true", "status": state, "returncode": 0, "job_stdout": json.dumps(said)}


if __name__ == "__main__":
    ends = "--ends" in sys.argv
    uvicorn.run(application, port=int(sys.argv[1]), log_level="warning", access_log=False)
