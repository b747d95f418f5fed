"""What the service says and does while a part of it is away."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tesapi.api import health, requests
from tesapi.api.door import Door
from tesapi.api.tasks import TesOperations
from tesapi.app import running
from tesapi.backends import runtimes
from tesapi.settings import Settings, load
from tesapi.store.sqlite import SqliteStore
from tesapi.tasks import Tasks
from tesapi.tes.models import TaskDocument

TRUE = {"executors": [{"image": "alpine", "command": ["true"]}]}


class _Dispatcher:
    def __init__(self, alive: bool) -> None:
        self.alive = alive


def _client(app: Callable[..., Any]) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


def _settings(folder: pathlib.Path) -> Settings:
    return load(environ={"TESAPI_RUNTIME__KIND": "bubblewrap"}, cwd=folder).settings


@pytest.mark.parametrize(
    ("closed", "alive", "said"),
    [(False, True, None), (True, True, "is closed"), (False, False, "does not come round any more")],
)
async def test_the_service_is_unready_without_its_store_or_its_dispatcher(
    tmp_path: pathlib.Path, closed: bool, alive: bool, said: str | None
) -> None:
    app = FastAPI()
    store = SqliteStore(tmp_path / "db")
    async with store:
        app.include_router(health.routes(Tasks(store, {}), _Dispatcher(alive), list))
        async with _client(app) as client:
            if not closed:
                answer = await client.get("/readyz")
    if closed:
        async with _client(app) as client:
            answer = await client.get("/readyz")
    assert answer.status_code == (200 if said is None else 503)
    assert said is None or said in answer.text


async def test_a_store_that_is_away_is_a_503_that_says_when_to_come_again(tmp_path: pathlib.Path) -> None:
    settings = _settings(tmp_path)
    async with SqliteStore(tmp_path / "db") as store:
        operations = TesOperations(settings, Tasks(store, {}), {}, requests.anonymous)
    async with _client(Door(settings, operations, FastAPI())) as client:
        for answer in (
            await client.post("/v1/tasks", json=TRUE),
            await client.get("/v1/tasks"),
            await client.get("/v1/tasks/x"),
            await client.get("/v1/tasks/x?view=FULL"),
            await client.post("/v1/tasks/x:cancel"),
            await client.post("/v1/tasks", json=TRUE, headers={"Idempotency-Key": "k"}),
        ):
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "5"
            assert "is closed" in answer.json()["detail"]


async def test_a_full_queue_is_a_429_that_says_when_to_come_again(tmp_path: pathlib.Path) -> None:
    environ = {"TESAPI_SERVER__MAX_QUEUED_TASKS": "2", "TESAPI_LOCAL__ENABLE": "false"}
    async with running(load(environ=environ, cwd=tmp_path).settings) as app, _client(app) as client:
        for _ in range(2):
            assert (await client.post("/v1/tasks", json=TRUE)).status_code == 200
        answer = await client.post("/v1/tasks", json=TRUE)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "5"
        assert "As many tasks are queued as server.max_queued_tasks allows, 2" in answer.json()["detail"]
        assert len((await client.get("/v1/tasks")).json()["tasks"]) == 2


async def test_a_task_waits_with_a_reason_until_containers_can_be_run(
    tmp_path: pathlib.Path, bubblewrap: Mapping[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtimes, "_LOOK_AGAIN_S", 0.0)
    found = runtimes._bwraps()
    monkeypatch.setattr(runtimes, "_bwraps", lambda: ["/bin/false"])
    async with running(_settings(tmp_path)) as app, _client(app) as client:
        ready = await client.get("/readyz")
        assert ready.status_code == 200  # tasks wait for a destination; the service takes them
        assert ready.json()["destinations"][0]["ok"] is False
        task_id = (await client.post("/v1/tasks", json=TRUE)).json()["id"]
        task: dict[str, Any] = {}
        while not task.get("logs"):
            task = (await client.get(f"/v1/tasks/{task_id}?view=FULL")).json()
            await asyncio.sleep(0.02)
        assert task["state"] == "QUEUED"
        assert (
            "Waiting: No container can be run on this machine. bubblewrap (/bin/false):"
            in task["logs"][0]["system_logs"][0]
        )
        monkeypatch.setattr(runtimes, "_bwraps", lambda: found)
        while task["state"] in {"QUEUED", "INITIALIZING", "RUNNING"}:
            task = (await client.get(f"/v1/tasks/{task_id}?view=FULL")).json()
            await asyncio.sleep(0.02)
    assert task["state"] == "COMPLETE"


async def test_a_task_that_waits_for_its_destination_is_canceled_at_once(
    tmp_path: pathlib.Path, bubblewrap: Mapping[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtimes, "_bwraps", lambda: ["/bin/false"])
    async with running(_settings(tmp_path)) as app, _client(app) as client:
        task_id = (await client.post("/v1/tasks", json=TRUE)).json()["id"]
        await client.post(f"/v1/tasks/{task_id}:cancel")
        assert (await client.get(f"/v1/tasks/{task_id}")).json()["state"] == "CANCELED"


async def test_a_bug_on_one_task_does_not_hold_up_the_others(
    tmp_path: pathlib.Path, bubblewrap: Mapping[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tesapi.dispatch import drive

    plan = drive.plan

    def plan_with_a_bug(record: Any, *rest: Any, **more: Any) -> Any:
        if record.document.name == "poison":
            raise ZeroDivisionError("a bug")
        return plan(record, *rest, **more)

    monkeypatch.setattr(drive, "plan", plan_with_a_bug)
    async with running(_settings(tmp_path)) as app, _client(app) as client:
        poison = (await client.post("/v1/tasks", json={**TRUE, "name": "poison"})).json()["id"]
        healthy = (await client.post("/v1/tasks", json=TRUE)).json()["id"]
        while (await client.get(f"/v1/tasks/{healthy}")).json()["state"] != "COMPLETE":
            await asyncio.sleep(0.02)
        while True:
            task = (await client.get(f"/v1/tasks/{poison}?view=FULL")).json()
            if task["logs"] and task["logs"][0]["system_logs"]:
                break
            await asyncio.sleep(0.02)
        sentence = "Waiting: the dispatcher failed on this task (ZeroDivisionError: a bug)."
        assert task["logs"][0]["system_logs"][0].endswith(sentence)
        await client.post(f"/v1/tasks/{poison}:cancel")
        assert (await client.get(f"/v1/tasks/{poison}")).json()["state"] == "CANCELED"


async def test_a_dispatcher_that_dies_of_a_bug_takes_the_service_with_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def claim_with_a_bug(*rest: object, **more: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(SqliteStore, "claim", claim_with_a_bug)
    with pytest.raises(ExceptionGroup) as failed:
        async with running(_settings(tmp_path)):
            await asyncio.Event().wait()
    assert failed.group_contains(ZeroDivisionError, match="a bug")


async def test_shutting_down_gives_back_every_lease(tmp_path: pathlib.Path, bubblewrap: Mapping[str, object]) -> None:
    document = TaskDocument.model_validate({"executors": [{"image": "alpine", "command": ["sleep", "1"]}]})
    async with running(_settings(tmp_path)) as app, _client(app) as client:
        task_id = (await client.post("/v1/tasks", content=document.model_dump_json())).json()["id"]
        while (await client.get(f"/v1/tasks/{task_id}")).json()["state"] != "RUNNING":
            await asyncio.sleep(0.02)
    import sqlite3

    with sqlite3.connect(tmp_path / "data" / "tesapi.db") as db:
        assert db.execute("SELECT state, holder FROM tasks").fetchall() == [("RUNNING", None)]
    db.close()
    async with running(_settings(tmp_path)) as app, _client(app) as client:
        while (await client.get(f"/v1/tasks/{task_id}")).json()["state"] != "COMPLETE":
            await asyncio.sleep(0.02)
