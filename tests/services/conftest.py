"""A running server, and somebody who counts what executors tell."""

from __future__ import annotations

import pathlib
import threading
from collections.abc import Iterator, Mapping

import pytest

from tests.services.server import Server
from tests.services.workload import Counting


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


@pytest.fixture
def counting() -> Iterator[Counting]:
    """What the executors of a fault suite tell, counted outside of the service."""
    with Counting() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
