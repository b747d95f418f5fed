"""Tasks whose files lie on web servers, from POST to the end."""

from __future__ import annotations

import asyncio
import pathlib
import ssl
from typing import Any

import httpx
import pytest
import trustme

from tests.web import Web, answer


async def _settled(client: httpx.AsyncClient, document: dict[str, Any]) -> dict[str, Any]:
    created = await client.post("/tasks", json={"executors": [{"image": "alpine", "command": ["true"]}], **document})
    assert created.status_code == 200, created.text
    while True:
        task = (await client.get(f"/tasks/{created.json()['id']}", params={"view": "FULL"})).json()
        if task["state"] in ("COMPLETE", "EXECUTOR_ERROR", "SYSTEM_ERROR"):
            return dict(task)
        await asyncio.sleep(0.02)


async def test_files_come_from_web_servers_that_the_service_trusts_and_go_there(
    client: httpx.AsyncClient, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(tls)
    with Web(tls) as secure, Web() as plain:
        secure.on("/in", answer("200 OK", b"hello"))
        url = plain.on("/out", answer("201 Created"))
        task = await _settled(
            client,
            {
                "inputs": [{"path": "/data/f", "url": f"https://localhost:{secure.port}/in"}],
                "outputs": [{"path": "/data/f", "url": url.replace("://", "://user:secret@")}],
            },
        )
    assert task["state"] == "COMPLETE", task["logs"]
    assert task["logs"][0]["outputs"] == [{"url": url, "path": "/data/f", "size_bytes": "5"}]
    assert plain.requests[0].body == b"hello"


async def test_a_url_that_may_not_be_reached_is_taken_and_told_in_the_task(client: httpx.AsyncClient) -> None:
    url = "http://user:secret@169.254.169.254/latest/meta-data"
    task = await _settled(client, {"inputs": [{"path": "/data/f", "url": url}]})
    assert task["state"] == "SYSTEM_ERROR"
    told = "\n".join(task["logs"][0]["system_logs"])
    sentence = "http://169.254.169.254/latest/meta-data: the host 169.254.169.254 is refused"
    assert sentence in told
    assert "secret" not in told


async def test_service_info_names_the_schemes(client: httpx.AsyncClient) -> None:
    storage = (await client.get("/service-info")).json()["storage"]
    assert storage[-2:] == ["http://", "https://"]
