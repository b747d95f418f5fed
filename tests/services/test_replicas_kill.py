"""Two processes that take tasks, three that drive them, a Pulsar and a MongoDB, each killed or held up now and then."""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest

from tests.conftest import TAKES_MINUTES
from tests.jobs import processes_with, sandboxes, until
from tests.mongod import Mongod, ReplicaSet
from tests.pulsars import Pulsar
from tests.services.server import SETTLED, Server
from tests.services.workload import Counting, Poster, check

SIZE = 2 * int(os.environ.get("TESAPI_TEST_SIZE", "20"))
SEED = int(os.environ.get("TESAPI_TEST_SEED", "1"))
AWAY_S = float(os.environ.get("TESAPI_TEST_AWAY_S", "5"))


class Replicas:
    """Any of the processes that take tasks, as a poster sees them; one that is down or busy did not take it."""

    def __init__(self, folder: pathlib.Path, apis: list[Server], chance: random.Random) -> None:
        self.folder = folder
        self.process = None
        self._apis = apis
        self._chance = chance

    def post(self, document: Mapping[str, Any]) -> str:
        """Create a task at one of them."""
        with _or_not():
            return self._chance.choice(self._apis).post(document)
        raise AssertionError

    def cancel(self, task_id: str) -> None:
        """Cancel a task at one of them."""
        with _or_not():
            self._chance.choice(self._apis).cancel(task_id)


@contextlib.contextmanager
def _or_not() -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        if "503" not in str(error):
            raise
        raise httpx.NetworkError(str(error)) from error


@pytest.fixture(params=["one server", "three servers"])
def own_mongod(
    request: pytest.FixtureRequest, tmp_path: pathlib.Path, mongod_program: pathlib.Path
) -> Iterator[Mongod | ReplicaSet]:
    """A MongoDB that may be killed: one server, or whichever of three takes the writes."""
    start = Mongod if request.param == "one server" else ReplicaSet
    with start(tmp_path / "mongod", mongod_program) as servers:
        yield servers


@TAKES_MINUTES
@pytest.mark.soak
@pytest.mark.timeout(600 + 20 * SIZE)
def test_whoever_dies_and_whenever_nothing_is_lost_doubled_or_left(
    tmp_path: pathlib.Path,
    own_mongod: Mongod | ReplicaSet,
    pulsar: Pulsar,
    counting: Counting,
    bubblewrap: Mapping[str, object],
) -> None:
    assert bubblewrap
    chance = random.Random(SEED)
    size = SIZE if isinstance(own_mongod, Mongod) else SIZE // 2
    images = '{ alpine = "host", "debian:*" = "host" }'
    settings: dict[str, object] = {
        "DB__MONGODB_URI": own_mongod.database_url(f"test-{uuid.uuid4().hex}"),
        "SERVER__DATA_DIR": str(tmp_path / "data"),
        "DISPATCHER__LEASE_S": 3,
        "LOCAL__ENABLE": "true",
        "RUNTIME__BUBBLEWRAP__IMAGES": images,
        "LOCAL__CPU_CORES": 4,
        "LOCAL__MAX_JOBS": 4,
        "DESTINATIONS__SITE__URL": pulsar.url,
        "DESTINATIONS__SITE__PRIVATE_TOKEN": f'"{pulsar.token}"',
        "DESTINATIONS__SITE__MAX_JOBS": 6,
        "DESTINATIONS__SITE__RUNTIME__KIND": "bubblewrap",
        "DESTINATIONS__SITE__RUNTIME__BUBBLEWRAP__IMAGES": images,
        "DESTINATIONS__SITE__STORAGE__FILE__ROOTS": f'["{tmp_path}/data/files"]',
    }
    killed: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        apis, dispatchers = (
            [stack.enter_context(_server(tmp_path / f"{role}{number}", role, settings)) for number in range(count)]
            for role, count in (("api", 2), ("dispatcher", 3))
        )
        poster = Poster(Replicas(tmp_path, apis, chance), counting, chance, "bubblewrap")  # type: ignore[arg-type]
        held_up = {size // 3, 2 * size // 3}
        while poster.acknowledged < size:
            poster.post()
            if poster.acknowledged in held_up:
                held_up.discard(poster.acknowledged)
                _hold_up(own_mongod, poster, chance, killed)
            elif len(poster.posted) % 5 == 0:
                name, victim = chance.choice(
                    [("API", one) for one in apis]
                    + [("dispatcher", one) for one in dispatchers]
                    + [("Pulsar", pulsar), ("MongoDB", own_mongod)]
                )
                killed[name] += 1
                victim.kill()
                time.sleep(chance.choice([0, 0.5, 2.0]))
                victim.start()
        until(lambda: _all_settled(apis[0]) or None, "every task to settle", 180 + 4 * size)
        tasks = {task["id"]: task for task in apis[0].all("FULL")}
        logs = [*(one.log for one in dispatchers), pulsar.log]
        until(lambda: not _left(tmp_path, pulsar) or None, lambda: _told(_left(tmp_path, pulsar), tasks, logs), 180)
    check(poster, tasks, Counter(counting.said))
    until(lambda: not processes_with(f"{pulsar.staging}/") or None, "the runners at the Pulsar to be gone")
    job_ids = [log["metadata"]["job_id"] for task in tasks.values() for log in task["logs"] if "metadata" in log]
    assert job_ids
    assert [job_id for job_id in job_ids if sandboxes(job_id)] == []
    placed = [log["metadata"] for task in tasks.values() for log in task["logs"][-1:] if "metadata" in log]
    where = Counter(metadata["destination"].partition("@")[0] for metadata in placed)
    assert set(where) == {"local", "site"}
    print(
        f"\nreplicas: seed {SEED}, killed {dict(killed)}, {len(poster.posted)} tasks posted, {len(tasks)} stored,",
        end=" ",
    )
    print(f"{poster.acknowledged} acknowledged, at {dict(where)}")
    print(f"states: {dict(Counter(task['state'] for task in tasks.values()))}")


def _server(folder: pathlib.Path, role: str, settings: Mapping[str, object]) -> Server:
    folder.mkdir()
    return Server(folder, role, **settings)


def _hold_up(mongod: Mongod | ReplicaSet, poster: Poster, chance: random.Random, killed: Counter[str]) -> None:
    """MongoDB stands still for a while, in which tasks are posted in vain."""
    killed["MongoDB stood still"] += 1
    with mongod.suspended():
        until_then = time.monotonic() + AWAY_S
        while time.monotonic() < until_then:
            poster.post()
            time.sleep(chance.uniform(0, 1))


def _left(folder: pathlib.Path, pulsar: Pulsar) -> list[pathlib.Path]:
    """The job directories that are there."""
    return [*pulsar.jobs, *(folder / "data" / "jobs").glob("*/*")]


def _told(left: list[pathlib.Path], tasks: Mapping[str, Mapping[str, Any]], logs: list[pathlib.Path]) -> str:
    """All that is known of job directories that should have been removed."""
    words = ["job directories to be removed"]
    for place in left:
        words += [f"\n== {place}: {sorted(str(path.relative_to(place)) for path in place.rglob('*'))}"]
        words += [f"its task: {task}" for task in tasks.values() if place.name in str(task)]
        for log in logs:
            lines = log.read_text("utf-8", "replace").splitlines()
            words += [f"{log.parent.name}: {line[:300]}" for line in lines if place.name in line][-20:]
    return "\n".join(words)


def _all_settled(server: Server) -> bool:
    try:
        return all(task["state"] in SETTLED for task in server.all())
    except (httpx.TransportError, KeyError):
        return False
