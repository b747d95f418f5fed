"""Taking tasks and driving them apart from each other, on one store, each hearing of the other by the store alone."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import pytest

from tesapi.app import Role, at_work, running
from tesapi.errors import ConfigurationProblem
from tesapi.settings import Settings, load
from tesapi.store.sqlite import SqliteStore

TRUE = {"executors": [{"image": "alpine", "command": ["true"]}]}
SLEEP = {"executors": [{"image": "alpine", "command": ["sh", "-c", "echo begun; sleep 60"]}]}


def _client(app: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


@pytest.fixture
def settings(tmp_path: pathlib.Path, bubblewrap: Mapping[str, object]) -> Settings:
    environ = {"TESAPI_RUNTIME__KIND": "bubblewrap", "TESAPI_LOCAL__CPU_CORES": "4"}
    return load(environ=environ, cwd=tmp_path).settings


@pytest.fixture
async def store(settings: Settings) -> AsyncIterator[SqliteStore]:
    async with SqliteStore(settings.sqlite_path) as store:
        yield store


@pytest.fixture
async def api(settings: Settings, store: SqliteStore) -> AsyncIterator[httpx.AsyncClient]:
    async with at_work(settings, store, Role.API) as app, _client(app) as client:
        yield client


async def _until(client: httpx.AsyncClient, task_id: str, state: str) -> dict[str, Any]:
    async with asyncio.timeout(30):
        while (task := (await client.get(f"/v1/tasks/{task_id}?view=FULL")).json())["state"] != state:
            await asyncio.sleep(0.02)
    return dict(task)


@contextlib.contextmanager
def _within(seconds: float) -> Any:
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < seconds


async def test_tasks_wait_until_another_process_drives_them(
    settings: Settings, store: SqliteStore, api: httpx.AsyncClient
) -> None:
    waiting = (await api.post("/v1/tasks", json=TRUE)).json()["id"]
    ready = await api.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["dispatcher"] == "Other processes drive the tasks."
    assert ready.json()["destinations"] == []
    assert (await api.get(f"/v1/tasks/{waiting}")).json()["state"] == "QUEUED"
    async with at_work(settings, store, Role.DISPATCHER):
        await _until(api, waiting, "COMPLETE")
        later = (await api.post("/v1/tasks", json=TRUE)).json()["id"]
        with _within(5):  # a poll interval, and the task itself
            await _until(api, later, "COMPLETE")


async def test_a_cancel_reaches_whoever_drives_the_task_in_about_a_second(
    settings: Settings, store: SqliteStore, api: httpx.AsyncClient
) -> None:
    async with at_work(settings, store, Role.DISPATCHER):
        task_id = (await api.post("/v1/tasks", json=SLEEP)).json()["id"]
        await _until(api, task_id, "RUNNING")
        await api.post(f"/v1/tasks/{task_id}:cancel")
        assert (await api.get(f"/v1/tasks/{task_id}")).json()["state"] == "CANCELING"
        with _within(4):  # leases are renewed every 5 s; on a busy machine the end itself takes a while
            await _until(api, task_id, "CANCELED")


async def test_the_api_alone_shows_what_is_stored_and_asks_no_destination(
    settings: Settings, store: SqliteStore, api: httpx.AsyncClient
) -> None:
    assert not (settings.server.data_dir / "jobs").exists()
    async with at_work(settings, store, Role.DISPATCHER):
        task_id = (await api.post("/v1/tasks", json=SLEEP)).json()["id"]
        task = await _until(api, task_id, "RUNNING")
        assert task["logs"][0]["logs"][0]["exit_code"] == -1
        assert task["logs"][0]["logs"][0]["stdout"] == ""
        await api.post(f"/v1/tasks/{task_id}:cancel")
        task = await _until(api, task_id, "CANCELED")
        assert task["logs"][0]["logs"][0]["stdout"] == "begun\n"


async def test_a_dispatcher_answers_how_it_is_and_nothing_else(settings: Settings, store: SqliteStore) -> None:
    async with at_work(settings, store, Role.DISPATCHER) as app, _client(app) as client:
        assert (await client.get("/livez")).json() == {"status": "ok"}
        ready = await client.get("/readyz")
        assert ready.status_code == 200
        assert ready.json()["dispatcher"] == "Tasks are being driven."
        assert [each["name"] for each in ready.json()["destinations"]] == ["local"]
        for path in ("/ga4gh/tes/v1/tasks", "/v1/service-info", "/docs", "/openapi.json"):
            assert (await client.get(path)).status_code == 404
        assert (await client.post("/v1/tasks", json=TRUE)).status_code == 404


async def test_two_dispatchers_on_one_store_drive_every_task_once(
    settings: Settings, store: SqliteStore, api: httpx.AsyncClient
) -> None:
    async with at_work(settings, store, Role.DISPATCHER), at_work(settings, store, Role.DISPATCHER):
        root = settings.file_roots[0]
        ids = []
        for number in range(12):
            document = {
                "executors": [{"image": "alpine", "command": ["sh", "-c", "echo run >> /out/log"]}],
                "outputs": [{"path": "/out/log", "url": f"file://{root}/{number}"}],
            }
            ids.append((await api.post("/v1/tasks", json=document)).json()["id"])
        for task_id in ids:
            task = await _until(api, task_id, "COMPLETE")
            assert len(task["logs"]) == 1
    assert [(root / str(number)).read_text("ascii") for number in range(12)] == ["run\n"] * 12


@pytest.mark.parametrize("role", [Role.API, Role.DISPATCHER])
async def test_what_needs_a_store_for_several_processes_is_refused_on_sqlite(settings: Settings, role: Role) -> None:
    with pytest.raises(ConfigurationProblem, match=r"SQLite serves one: set db\.mongodb_uri, or use tesapi serve"):
        async with running(settings, role):
            pass
    assert not settings.sqlite_path.exists()


async def test_a_dispatcher_that_dies_of_a_bug_ends_its_process(
    settings: Settings, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def claim_with_a_bug(*rest: object, **more: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(store, "claim", claim_with_a_bug)
    with pytest.raises(ExceptionGroup) as failed:
        async with at_work(settings, store, Role.DISPATCHER):
            await asyncio.Event().wait()
    assert failed.group_contains(ZeroDivisionError, match="a bug")
