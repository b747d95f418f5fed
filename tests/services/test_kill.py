"""The service killed with -9 at random points: nothing lost, nothing run twice, nothing left, no lie told."""

from __future__ import annotations

import os
import pathlib
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping

import pytest

from tests.conftest import RUNTIMES
from tests.engines import DockerEngine
from tests.jobs import processes_with, sandboxes, until
from tests.services.server import SETTLED, Server
from tests.services.workload import Counting, Poster, check

SIZE = int(os.environ.get("TESAPI_TEST_SIZE", "20"))
KILLS = int(os.environ.get("TESAPI_TEST_KILLS", "5"))
SEED = int(os.environ.get("TESAPI_TEST_SEED", "1"))


@pytest.fixture
def on_bubblewrap(tmp_path: pathlib.Path, bubblewrap: Mapping[str, object]) -> Server:
    return Server(tmp_path, LOCAL__CPU_CORES=8, LOCAL__MAX_JOBS=8)


@pytest.fixture
def on_docker(tmp_path: pathlib.Path, docker_engine: DockerEngine) -> Iterator[Server]:
    yield Server(
        tmp_path,
        LOCAL__CPU_CORES=8,
        LOCAL__MAX_JOBS=8,
        RUNTIME__KIND="docker",
        RUNTIME__DOCKER__HOST=f"unix://{docker_engine.socket}",
        RUNTIME__NETWORK="host",
        RUNTIME__PULL="never",
    )
    assert docker_engine.containers("tesapi.job") == []


@pytest.mark.soak
@pytest.mark.timeout(300 + 10 * SIZE)
@pytest.mark.parametrize("runtime", [name for name in ("bubblewrap", "docker") if name in RUNTIMES])
def test_the_service_is_killed_again_and_again(
    tmp_path: pathlib.Path, request: pytest.FixtureRequest, counting: Counting, runtime: str
) -> None:
    chance = random.Random(SEED)
    server: Server = request.getfixturevalue(f"on_{runtime}")
    with server:
        poster = Poster(server, counting, chance, runtime)
        for kill in range(KILLS):
            while poster.acknowledged < SIZE * (kill + 1) // (KILLS + 1):
                poster.post()
            if kill % 2:  # inside of a POST
                server.all()  # the connection is there, so that the time goes into the POST itself
                victim = threading.Thread(target=poster.post)
                victim.start()
                time.sleep(chance.uniform(0, 0.01))
                server.kill()
                victim.join()
            else:
                time.sleep(chance.uniform(0, 1.0))
                server.kill()
            time.sleep(chance.choice([0, 0, 0.5, 1.5]))  # jobs go on, and end, while nobody looks
            server.start()
        while poster.acknowledged < SIZE:
            poster.post()
        until(
            lambda: all(task["state"] in SETTLED for task in server.all()) or None,
            "every task to settle",
            60 + 2 * SIZE,
        )
        tasks = {task["id"]: task for task in server.all("FULL")}
        until(lambda: not server.jobs, "job directories to be removed")
    check(poster, tasks, Counter(counting.said))
    until(lambda: not processes_with(str(tmp_path)), "runners and watchdogs to be gone")
    job_ids = [log["metadata"]["job_id"] for task in tasks.values() for log in task["logs"] if "metadata" in log]
    assert job_ids
    assert [job_id for job_id in job_ids if sandboxes(job_id)] == []
    print(f"\nkill suite on {runtime}: seed {SEED}, {KILLS} kills, {len(poster.posted)} tasks posted,", end=" ")
    print(f"{len(tasks)} stored,", end=" ")
    print(f"{poster.acknowledged} acknowledged")
    print(f"states: {dict(Counter(task['state'] for task in tasks.values()))}")
