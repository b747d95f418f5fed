"""The whole application in this process, and a client of it."""

from __future__ import annotations

import pathlib
from collections.abc import AsyncIterator, Mapping

import httpx
import pytest

from tesapi.app import running
from tesapi.settings import load


@pytest.fixture
async def client(tmp_path: pathlib.Path, bubblewrap: Mapping[str, object]) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application with its defaults, and room for four jobs."""
    environ = {
        "TESAPI_LOCAL__CPU_CORES": "4",
        "TESAPI_SERVER__MAX_BODY_MB": "1",
        "TESAPI_RUNTIME__KIND": "bubblewrap",
    }
    settings = load(environ=environ, cwd=tmp_path).settings
    async with running(settings) as app:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost/ga4gh/tes/v1") as client:
            yield client
