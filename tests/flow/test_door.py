"""Who is let in, by which paths and methods, and what is told to those who are not."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

import httpx
import pytest

from tesapi.app import running
from tesapi.settings import load

TRUE = {"executors": [{"image": "alpine", "command": ["true"]}]}
Open = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture
def opened(tmp_path: pathlib.Path) -> Open:
    """A client of an application with some settings, which runs no tasks."""

    @contextlib.asynccontextmanager
    async def opened(**settings: object) -> AsyncIterator[httpx.AsyncClient]:
        environ = {f"TESAPI_SERVER__{name.upper()}": json.dumps(value) for name, value in settings.items()}
        loaded = load(environ={"TESAPI_LOCAL__ENABLE": "false", **environ}, cwd=tmp_path)
        async with running(loaded.settings) as app:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as client:
                yield client

    return opened


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "LOCALHOST.", "127.0.0.1:8080", "127.1.2.3", "[::1]:80"])
async def test_this_machine_is_known_by_its_loopback_names(opened: Open, host: str) -> None:
    async with opened() as client:
        assert (await client.get("/v1/tasks", headers={"Host": host})).status_code == 200


@pytest.mark.parametrize("path", ["/v1/tasks", "/docs", "/livez", "/"])
@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8080", "192.0.2.1", "[::2]", "", "\xff"])
async def test_a_name_that_somebody_made_to_lead_here_is_not_let_in(opened: Open, host: str, path: str) -> None:
    async with opened() as client:
        answer = await client.get(path, headers={b"Host": host.encode("latin-1")})
    _is_problem(answer, 421)
    assert "server.allowed_hosts" in answer.json()["detail"]


async def test_names_that_the_operator_lists_are_let_in(opened: Open) -> None:
    async with opened(allowed_hosts=["TES.example.org", "fd00::1"]) as client:
        for host in ("tes.example.org", "tes.EXAMPLE.org:443", "[fd00::1]:80", "localhost"):
            assert (await client.get("/v1/tasks", headers={"Host": host})).status_code == 200
        _is_problem(await client.get("/v1/tasks", headers={"Host": "example.org"}), 421)


async def test_a_server_that_is_open_to_everybody_goes_by_any_name(opened: Open) -> None:
    async with opened(allow_anonymous=True) as client:
        assert (await client.get("/v1/tasks", headers={"Host": "tes.example.org"})).status_code == 200
    async with opened(allow_anonymous=True, allowed_hosts=["tes.example.org"]) as client:
        _is_problem(await client.get("/v1/tasks", headers={"Host": "evil.example"}), 421)


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil.example", "http://[", ""])
async def test_pages_of_elsewhere_may_read_nothing_and_change_nothing(opened: Open, origin: str) -> None:
    async with opened() as client:
        _is_problem(await client.post("/v1/tasks", json=TRUE, headers={"Origin": origin}), 403)
        _is_problem(await client.post("/v1/tasks/x:cancel", headers={"Origin": origin}), 403)
        answer = await client.get("/v1/tasks", headers={"Origin": origin})
        assert answer.json() == {"tasks": []}
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_pages_of_elsewhere_change_nothing_on_an_open_server_either_that_knows_its_names(opened: Open) -> None:
    page = {"Origin": "https://evil.example"}
    async with opened(allow_anonymous=True) as client:
        assert (await client.post("/v1/tasks", json=TRUE, headers=page)).status_code == 200
    async with opened(allow_anonymous=True, allowed_hosts=["tes.example.org"]) as client:
        _is_problem(await client.post("/v1/tasks", json=TRUE, headers=page), 403)
        assert (await client.post("/v1/tasks", json=TRUE)).status_code == 200


@pytest.mark.parametrize("origin", ["http://localhost:8080", "http://127.0.0.1:8080", "http://[::1]:8080"])
async def test_pages_of_this_machine_may_make_tasks(opened: Open, origin: str) -> None:
    async with opened() as client:
        assert (await client.post("/v1/tasks", json=TRUE, headers={"Origin": origin})).status_code == 200


async def test_our_own_pages_may_make_tasks_under_each_of_our_names(opened: Open) -> None:
    headers = {"Host": "tes.example.org", "Origin": "http://tes.example.org"}
    async with opened(allowed_hosts=["tes.example.org"]) as client:
        assert (await client.post("/v1/tasks", json=TRUE, headers=headers)).status_code == 200
        _is_problem(await client.post("/v1/tasks", json=TRUE, headers=headers | {"Origin": "http://example.org"}), 403)


async def test_pages_that_the_operator_lists_may_use_the_api(opened: Open) -> None:
    page = "https://workbench.example.org"
    asks = {"Origin": page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    async with opened(cors_origins=[page]) as client:
        preflight = await client.options("/v1/tasks", headers=asks)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == page
        assert "POST" in preflight.headers["access-control-allow-methods"]
        answer = await client.post("/v1/tasks", json=TRUE, headers={"Origin": page})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, page)
        assert (await client.options("/v1/tasks", headers=asks | {"Origin": "https://a.example"})).status_code == 400
        _is_problem(await client.post("/v1/tasks", json=TRUE, headers={"Origin": "https://a.example"}), 403)


@pytest.mark.parametrize("base", ["/tes", ""])
async def test_a_proxy_may_show_it_below_a_path_and_cut_that_off_or_not(opened: Open, base: str) -> None:
    async with opened(root_path="/tes") as client:
        assert (await client.get(f"{base}/ga4gh/tes/v1/tasks")).json() == {"tasks": []}
        assert (await client.get(f"{base}/livez")).status_code == 200
        assert 'data-openapi="/tes/openapi.json"' in (await client.get(f"{base}/docs")).text
        assert (await client.get(f"{base}/openapi.json")).json()["servers"] == [{"url": "/tes"}]
        assert (await client.get(f"{base}/")).json()["docs"] == "/tes/docs"
        _is_problem(await client.get("/test/livez"), 404)


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/tasks", {"GET", "HEAD", "POST", "OPTIONS"}),
        ("/v1/tasks/x", {"GET", "HEAD", "OPTIONS"}),
        ("/v1/tasks/x:cancel", {"POST", "OPTIONS"}),
        ("/v1/service-info", {"GET", "HEAD", "OPTIONS"}),
        ("/livez", {"GET", "OPTIONS"}),
        ("/docs", {"GET", "HEAD", "OPTIONS"}),
    ],
)
async def test_a_method_that_a_path_has_not_is_answered_with_those_it_has(
    opened: Open, path: str, allowed: set[str]
) -> None:
    async with opened() as client:
        for method in ("PUT", "DELETE", "PATCH"):
            answer = await client.request(method, path)
            _is_problem(answer, 405)
            assert set(answer.headers["allow"].split(", ")) == allowed
        answer = await client.options(path)
        assert (answer.status_code, answer.content) == (204, b"")
        assert set(answer.headers["allow"].split(", ")) == allowed


async def test_the_first_page_says_where_things_are_to_people_and_to_programs(opened: Open) -> None:
    async with opened() as client:
        data = (await client.get("/")).json()
        page = await client.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "<script" not in page.text
        for name in ("tasks", "service_info", "docs", "openapi", "ready"):
            assert f'href="{data[name]}"' in page.text
            assert (await client.get(data[name])).status_code == 200


async def test_the_docs_need_no_other_site(opened: Open) -> None:
    async with opened() as client:
        page = await client.get("/docs/")
        assert "http" not in page.text.partition("<body>")[0]
        assert "script-src 'self'" in page.headers["content-security-policy"]
        for name in ("swagger-ui.css", "swagger-ui-bundle.js", "start.js"):
            assert f"/docs/{name}" in page.text
            assert (await client.get(f"/docs/{name}")).status_code == 200
        for name in ("redoc.standalone.js", "..%2f__init__.py", "x"):
            _is_problem(await client.get(f"/docs/{name}"), 404)


def _is_problem(answer: httpx.Response, status: int) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == status
    assert answer.json()["detail"]
