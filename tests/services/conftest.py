"""A running server."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping

import pytest

from tests.services.server import Server


@pytest.fixture
def server(tmp_path: pathlib.Path, bubblewrap: Mapping[str, object]) -> Iterator[Server]:
    """A server with room for eight jobs."""
    with Server(tmp_path, LOCAL__CPU_CORES=8, LOCAL__MAX_JOBS=8) as server:
        yield server


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that takes tasks, up to 1 MiB, and runs none."""
    with Server(tmp_path_factory.mktemp("idle"), LOCAL__ENABLE="false", SERVER__MAX_BODY_MB=1) as server:
        yield server
