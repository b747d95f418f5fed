"""The API as its clients meet it, with everything behind it at work."""

from __future__ import annotations

import asyncio
import json
import pathlib
from typing import Any

import httpx
import pytest

CLIENTS = sorted((pathlib.Path(__file__).parents[1] / "clients").glob("*.json"))
TRUE = {"executors": [{"image": "alpine", "command": ["true"]}]}
SETTLED = {"COMPLETE", "EXECUTOR_ERROR", "SYSTEM_ERROR", "CANCELED"}


async def _post(client: httpx.AsyncClient, document: object) -> str:
    answer = await client.post("/tasks", json=document)
    assert answer.status_code == 200, answer.text
    assert list(answer.json()) == ["id"]
    return str(answer.json()["id"])


async def _get(client: httpx.AsyncClient, task_id: str, view: str | None = "FULL") -> dict[str, Any]:
    answer = await client.get(f"/tasks/{task_id}", params={"view": view} if view else {})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return dict(answer.json())


async def _settled(client: httpx.AsyncClient, task_id: str) -> dict[str, Any]:
    while (await _get(client, task_id, "MINIMAL"))["state"] not in SETTLED:
        await asyncio.sleep(0.02)
    return await _get(client, task_id)


async def _run(client: httpx.AsyncClient, document: object) -> dict[str, Any]:
    return await _settled(client, await _post(client, document))


async def test_a_task_is_told_in_three_views(client: httpx.AsyncClient) -> None:
    document = {
        "name": "three views",
        "description": "",
        "inputs": [{"path": "/in/a", "content": "hello", "name": "a"}],
        "executors": [{"image": "alpine", "command": ["sh", "-c", "cat /in/a; echo oops >&2"]}],
        "tags": {"k": "v", "empty": ""},
        "volumes": ["/vol/"],
        "resources": {"cpu_cores": 1, "ram_gb": 0.5},
    }
    full = await _run(client, document)
    task_id = full["id"]
    assert {key: full[key] for key in document} == {
        **document,
        "inputs": [{"path": "/in/a", "content": "hello", "name": "a", "type": "FILE"}],
    }
    (log,) = full["logs"]
    assert full["state"] == "COMPLETE"
    assert [(run["exit_code"], run["stdout"], run["stderr"]) for run in log["logs"]] == [(0, "hello", "oops\n")]
    assert set(log["metadata"]) == {"destination", "job_id", "host", "image_used"}
    assert log["outputs"] == []
    assert log["system_logs"] == []
    for time in (full["creation_time"], log["start_time"], log["end_time"], log["logs"][0]["end_time"]):
        assert time.endswith("Z")
    assert await _get(client, task_id, None) == {"id": task_id, "state": "COMPLETE"}
    assert await _get(client, task_id, "MINIMAL") == {"id": task_id, "state": "COMPLETE"}
    basic = await _get(client, task_id, "BASIC")
    del full["inputs"][0]["content"], log["logs"][0]["stdout"], log["logs"][0]["stderr"], log["system_logs"]
    assert basic == full


async def test_a_task_that_is_sent_again_with_its_key_is_made_once(client: httpx.AsyncClient) -> None:
    document = {**TRUE, "name": "once", "tags": {"a": "1", "b": "2"}}
    again = {"tags": {"b": "2", "a": "1"}, "name": "once", "description": None, "unknown": 1, **TRUE}
    key = {"Idempotency-Key": "run-7"}
    sent = [client.post("/tasks", json=each, headers=key) for each in (document, again) * 10]
    answers = await asyncio.gather(*sent)
    assert {answer.status_code for answer in answers} == {200}
    (task_id,) = {answer.json()["id"] for answer in answers}
    await _settled(client, task_id)
    assert (await client.post("/tasks", json=document, headers=key)).json() == {"id": task_id}
    assert len((await client.get("/tasks")).json()["tasks"]) == 1
    other = await client.post("/tasks", json=document, headers={"Idempotency-Key": "run-8"})
    assert other.json()["id"] != task_id


async def test_a_key_that_comes_with_another_task_is_a_409_that_says_so(client: httpx.AsyncClient) -> None:
    key = {"Idempotency-Key": "run-7"}
    task_id = (await client.post("/tasks", json=TRUE, headers=key)).json()["id"]
    answer = await client.post("/tasks", json={**TRUE, "name": "other"}, headers=key)
    assert answer.status_code == 409
    assert answer.headers["content-type"] == "application/problem+json"
    assert f"'run-7' was sent before with another task, and stands for {task_id}" in answer.json()["detail"]
    assert len((await client.get("/tasks")).json()["tasks"]) == 1


@pytest.mark.parametrize("key", [b"", b"  ", b"a b", b"\xfc", b"a\x7f", b"x" * 256])
async def test_a_key_that_is_none_is_a_400_that_names_the_header(client: httpx.AsyncClient, key: bytes) -> None:
    answer = await client.post("/tasks", json=TRUE, headers={b"Idempotency-Key": key})
    assert answer.status_code == 400
    (error,) = answer.json()["errors"]
    assert (error["field"], error["allowed"]) == ("Idempotency-Key", "1 to 255 visible ASCII characters")
    assert len(answer.content) < 1000
    assert (await client.get("/tasks")).json()["tasks"] == []


async def test_every_visible_character_may_stand_in_a_key(client: httpx.AsyncClient) -> None:
    key = "".join(map(chr, range(0x21, 0x7F)))
    ids = {(await client.post("/tasks", json=TRUE, headers={"Idempotency-Key": key})).json()["id"] for _ in range(2)}
    assert len(ids) == 1


async def test_a_failure_says_why_in_the_full_view(client: httpx.AsyncClient) -> None:
    task = await _run(client, {"executors": [{"image": "alpine", "command": ["sh", "-c", "exit 4"]}]})
    assert task["state"] == "EXECUTOR_ERROR"
    assert task["logs"][0]["logs"][0]["exit_code"] == 4
    assert task["logs"][0]["system_logs"][-1].endswith("Z Executor 0 ended with exit code 4.")


async def test_a_running_executor_has_exit_code_minus_one_and_its_output_so_far(client: httpx.AsyncClient) -> None:
    task_id = await _post(
        client, {"executors": [{"image": "alpine", "command": ["sh", "-c", "echo so far; sleep 60"]}]}
    )
    while True:
        task = await _get(client, task_id)
        runs = task["logs"][0]["logs"] if task["logs"] else []
        if runs and runs[0].get("stdout"):
            break
        await asyncio.sleep(0.05)
    assert task["state"] == "RUNNING"
    assert runs == [{"start_time": runs[0]["start_time"], "stdout": "so far\n", "stderr": "", "exit_code": -1}]
    await client.post(f"/tasks/{task_id}:cancel")
    assert (await _settled(client, task_id))["state"] == "CANCELED"


async def test_a_task_that_fits_nowhere_says_so_at_once(client: httpx.AsyncClient) -> None:
    task = await _run(client, {**TRUE, "resources": {"cpu_cores": 64, "ram_gb": 1}})
    assert task["state"] == "SYSTEM_ERROR"
    sentence = "The task needs 64 CPU cores and 1 GB of memory, and fits nowhere: local gives 4 CPU cores."
    assert task["logs"][0]["system_logs"][0].endswith(sentence)
    assert task["logs"][0]["logs"] == []


async def test_unsupported_backend_parameters_are_warned_of_and_not_kept(client: httpx.AsyncClient) -> None:
    resources = {"backend_parameters": {"VmSize": "big", "x": None}, "backend_parameters_strict": False}
    task = await _run(client, {**TRUE, "resources": resources})
    assert task["state"] == "COMPLETE"
    assert task["resources"] == {"backend_parameters_strict": False}
    assert "does not support the backend_parameters VmSize" in task["logs"][0]["system_logs"][0]


async def test_unsupported_backend_parameters_fail_a_strict_task(client: httpx.AsyncClient) -> None:
    resources = {"backend_parameters": {"VmSize": "big"}, "backend_parameters_strict": True}
    task = await _run(client, {**TRUE, "resources": resources})
    assert task["state"] == "SYSTEM_ERROR"
    assert "does not support the backend_parameters VmSize" in task["logs"][0]["system_logs"][0]


async def test_a_list_is_newest_first_and_pages_hang_together(client: httpx.AsyncClient) -> None:
    ids = [await _post(client, {**TRUE, "name": str(number)}) for number in range(7)]
    for task_id in ids:
        await _settled(client, task_id)
    seen: list[str] = []
    token = ""
    while True:
        answer = await client.get("/tasks", params={"page_size": 3, "page_token": token, "view": "BASIC"})
        page = answer.json()
        seen += [task["name"] for task in page["tasks"]]
        token = page.get("next_page_token", "")
        if not token:
            break
    assert seen == ["6", "5", "4", "3", "2", "1", "0"]
    minimal = (await client.get("/tasks")).json()
    assert minimal == {"tasks": [{"id": task_id, "state": "COMPLETE"} for task_id in reversed(ids)]}
    full = (await client.get("/tasks", params={"view": "FULL"})).json()["tasks"]
    assert [task["logs"][0]["logs"][0]["stdout"] for task in full] == [""] * 7


async def test_a_list_is_filtered_by_name_state_and_tags(client: httpx.AsyncClient) -> None:
    async def listed(query: str) -> list[str]:
        answer = await client.get(f"/tasks?view=BASIC&{query}")
        assert answer.status_code == 200, answer.text
        return [task["name"] for task in answer.json()["tasks"]]

    for name, tags in (
        ("one", {"foo": "bar"}),
        ("on%", {"foo": "bat"}),
        ("two", {"foo": "bar", "baz": "bat"}),
        ("3", {}),
    ):
        await _run(client, {**TRUE, "name": name, "tags": tags})
    failed = await _run(client, {"name": "fails", "executors": [{"image": "alpine", "command": ["false"]}]})
    assert failed["state"] == "EXECUTOR_ERROR"
    assert await listed("name_prefix=on") == ["on%", "one"]
    assert await listed("name_prefix=on%25") == ["on%"]
    assert await listed("state=EXECUTOR_ERROR") == ["fails"]
    assert await listed("state=COMPLETE&name_prefix=o&tag_key=foo&tag_value=bar") == ["one"]
    assert await listed("tag_key=foo") == ["two", "on%", "one"]
    assert await listed("tag_key=foo&tag_value=bar&tag_key=baz&tag_value=bat") == ["two"]
    assert await listed("tag_key=baz&tag_key=foo&tag_value=&tag_value=bar") == ["two"]
    assert await listed("tag_key=none") == []
    assert await listed("unknown=1&page_size=2") == ["fails", "3"]


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"page_size": "0"}, "page_size"),
        ({"page_size": "2048"}, "page_size"),
        ({"page_size": "many"}, "page_size"),
        ({"page_token": "forged"}, "page_token"),
        ({"view": "ALL"}, "view"),
        ({"state": "DONE"}, "state"),
        ({"view": ""}, "view"),
        ({"view": "minimal"}, "view"),
        ({"page_size": "-1"}, "page_size"),
        ({"page_size": "1.0"}, "page_size"),
        ({"page_size": "9" * 5000}, "page_size"),
        ({"page_size": "٣"}, "page_size"),
        ({"page_token": "0-"}, "page_token"),
        ({"page_token": "f" * 5000}, "page_token"),
        ({"tag_key": ["x"] * 65}, "tag_key"),
        ({"tag_value": "x"}, "tag_value"),
    ],
)
async def test_a_wrong_parameter_is_named_with_what_is_allowed(
    client: httpx.AsyncClient, parameters: dict[str, str | list[str]], field: str
) -> None:
    answer = await client.get("/tasks", params=parameters)
    _is_problem(answer, 400)
    (error,) = answer.json()["errors"]
    assert error["field"] == field
    assert error["problem"]
    assert error["allowed"]


@pytest.mark.parametrize(
    ("body", "field", "problem", "allowed"),
    [
        (b"", "the body", "is not valid JSON", "one JSON object"),
        (b"{", "the body", "is not valid JSON", "one JSON object"),
        (b"[]", "the body", "is a list", "a JSON object"),
        (b"null", "the body", "is null", "a JSON object"),
        (b'{"executors": []}', "executors", "is empty", "at least one element"),
        (b"{}", "executors", "is missing", "a list of at least one executor"),
        (
            b'{"executors":[{"image":"a","command":["x"],"workdir":"rel"}]}',
            "executors[0].workdir",
            "not absolute",
            "/data",
        ),
        (b'{"executors":[{"image":"a","command":["x\\u0000"]}]}', "executors[0].command[0]", "NUL", "without NUL"),
        (
            b'{"executors":[{"image":"a","command":["x"]}],"resources":{"ram_gb":NaN}}',
            "resources.ram_gb",
            "is",
            "finite",
        ),
        (b"[" * 100_000, "the body", "is not valid JSON", "one JSON object"),
        (b'{"name": "\\ud800"}', "the body", "is not valid JSON", "one JSON object"),
        (b'{"name": "\xff"}', "the body", "is not valid JSON", "one JSON object"),
    ],
)
async def test_bad_input_is_a_400_that_names_the_field(
    client: httpx.AsyncClient, body: bytes, field: str, problem: str, allowed: str
) -> None:
    answer = await client.post("/tasks", content=body)
    _is_problem(answer, 400)
    error = next(error for error in answer.json()["errors"] if error["field"] == field)
    assert problem in error["problem"]
    assert allowed in error["allowed"]
    assert (await client.get("/tasks")).json() == {"tasks": []}


async def test_what_is_not_there_is_a_json_404(client: httpx.AsyncClient) -> None:
    for answer in (
        await client.get("/tasks/none"),
        await client.get("/tasks/none?view=FULL"),
        await client.get("/tasks/%00%ff"),
        await client.post("/tasks/none:cancel"),
        await client.get("/nowhere"),
        await client.get("/tasks/a/b"),
        await client.get("http://localhost/nowhere"),
        await client.get("http://localhost/v1"),
    ):
        _is_problem(answer, 404)


async def test_cancel_answers_an_empty_object_whatever_is_sent_and_however_often(client: httpx.AsyncClient) -> None:
    task_id = (await _run(client, TRUE))["id"]
    for content in (b"", b"{}", b"not json"):
        answer = await client.post(f"/tasks/{task_id}:cancel", content=content)
        assert (answer.status_code, answer.json()) == (200, {})
    assert (await _get(client, task_id, "MINIMAL"))["state"] == "COMPLETE"


@pytest.mark.parametrize("prefix", ["/ga4gh/tes/v1", "/v1", "/ga4gh/v1"])
async def test_the_api_is_where_clients_look_for_it(client: httpx.AsyncClient, prefix: str) -> None:
    base = f"http://localhost{prefix}"
    task_id = (await client.post(f"{base}/tasks", json=TRUE)).json()["id"]
    assert (await client.get(f"{base}/tasks/{task_id}")).json()["id"] == task_id
    assert [task["id"] for task in (await client.get(f"{base}/tasks")).json()["tasks"]] == [task_id]
    assert (await client.post(f"{base}/tasks/{task_id}:cancel")).json() == {}
    for path in ("service-info", "tasks/service-info"):
        info = (await client.get(f"{base}/{path}")).json()
        assert info["type"] == {"group": "org.ga4gh", "artifact": "tes", "version": "1.1.0"}
        assert {"id", "name", "organization", "version", "storage"} <= set(info)


@pytest.mark.parametrize("path", CLIENTS, ids=lambda path: path.stem)
async def test_what_real_clients_send_is_taken_and_settles(client: httpx.AsyncClient, path: pathlib.Path) -> None:
    document = json.loads(path.read_text("utf-8"))
    for executor in document["executors"]:
        executor["command"] = ["true"]  # taken, not run: their images and data are elsewhere
    task = await _run(client, document)
    assert task["state"] in {"COMPLETE", "SYSTEM_ERROR"}
    if task["state"] == "SYSTEM_ERROR":
        assert task["logs"][0]["system_logs"]


async def test_credentials_that_nobody_asked_for_are_ignored(client: httpx.AsyncClient) -> None:
    for credentials in ("Basic Tm9uZTpOb25l", "Bearer abc"):
        answer = await client.get("/tasks?api_key=K%201%262", headers={"Authorization": credentials})
        assert answer.status_code == 200


def _is_problem(answer: httpx.Response, status: int) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status
    assert body["detail"]
