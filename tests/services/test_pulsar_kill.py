"""The service and two Pulsars killed at random points: nothing lost, nothing run twice, nothing left, no lie told."""

from __future__ import annotations

import os
import pathlib
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping

import pytest

from tests.conftest import RUNTIMES, TAKES_MINUTES
from tests.engines import DockerEngine
from tests.jobs import processes_with, sandboxes, until
from tests.pulsars import Pulsar
from tests.services.server import SETTLED, Server
from tests.services.workload import Counting, Poster, check

SIZE = int(os.environ.get("TESAPI_TEST_SIZE", "20"))
KILLS = int(os.environ.get("TESAPI_TEST_KILLS", "5"))
SEED = int(os.environ.get("TESAPI_TEST_SEED", "1"))


@pytest.fixture
def pulsars(tmp_path: pathlib.Path, pulsar_programs: pathlib.Path) -> Iterator[list[Pulsar]]:
    with Pulsar(tmp_path / "a", pulsar_programs) as first, Pulsar(tmp_path / "b", pulsar_programs) as second:
        yield [first, second]


def served_by(folder: pathlib.Path, pulsars: list[Pulsar], runtime: str, **runtime_settings: object) -> Server:
    """A server with each Pulsar as a destination, `p0`, `p1` and so on."""
    settings: dict[str, object] = {}
    for number, pulsar in enumerate(pulsars):
        own = {
            "URL": pulsar.url,
            "PRIVATE_TOKEN": f'"{pulsar.token}"',
            "MAX_JOBS": 8,
            "RUNTIME__KIND": runtime,
            "STORAGE__FILE__ROOTS": f'["{folder}/data/files"]',
            **runtime_settings,
        }
        settings |= {f"DESTINATIONS__P{number}__{key}": value for key, value in own.items()}
    return Server(folder, **settings)


@pytest.fixture
def on_bubblewrap(tmp_path: pathlib.Path, pulsars: list[Pulsar], bubblewrap: Mapping[str, object]) -> Server:
    images = '{ alpine = "host", "debian:*" = "host" }'
    return served_by(tmp_path, pulsars, "bubblewrap", RUNTIME__BUBBLEWRAP__IMAGES=images)


@pytest.fixture
def on_docker(tmp_path: pathlib.Path, pulsars: list[Pulsar], docker_engine: DockerEngine) -> Iterator[Server]:
    host = f"unix://{docker_engine.socket}"
    yield served_by(
        tmp_path, pulsars, "docker", RUNTIME__DOCKER__HOST=host, RUNTIME__NETWORK="host", RUNTIME__PULL="never"
    )
    assert docker_engine.containers("tesapi.job") == []


@pytest.mark.soak
@pytest.mark.timeout(400 + 20 * SIZE)
@pytest.mark.parametrize(
    "runtime", ["bubblewrap", *(pytest.param(name, marks=TAKES_MINUTES) for name in ("docker",) if name in RUNTIMES)]
)
def test_the_service_and_its_pulsars_are_killed_again_and_again(
    tmp_path: pathlib.Path, request: pytest.FixtureRequest, counting: Counting, pulsars: list[Pulsar], runtime: str
) -> None:
    chance = random.Random(SEED)
    server: Server = request.getfixturevalue(f"on_{runtime}")
    killed: Counter[str] = Counter()
    with server:
        poster = Poster(server, counting, chance, runtime)
        for kill in range(KILLS):
            while poster.acknowledged < SIZE * (kill + 1) // (KILLS + 1):
                poster.post()
            time.sleep(chance.uniform(0, 1.0))
            victims = _victims(kill, chance, server, pulsars)
            how = chance.choice(["kill", "stop"])
            killed[f"{how} {' and '.join(sorted(name for name, _ in victims))}"] += 1
            enders = [threading.Thread(target=getattr(victim, how)) for _, victim in victims]
            for ender in enders:
                ender.start()
            for ender in enders:
                ender.join()
            time.sleep(chance.choice([0, 0, 0.5, 1.5, 3.0]))  # jobs go on, and end, while nobody looks
            for _, victim in chance.sample(victims, len(victims)):
                victim.start()
        while poster.acknowledged < SIZE:
            poster.post()
        until(
            lambda: all(task["state"] in SETTLED for task in server.all()) or None,
            "every task to settle",
            120 + 4 * SIZE,
        )
        tasks = {task["id"]: task for task in server.all("FULL")}
        until(lambda: not [job for pulsar in pulsars for job in pulsar.jobs], "job directories to be removed", 120)
        active = [path for pulsar in pulsars for path in (pulsar.folder / "persisted").glob("*-jobs/*")]
        assert active == [], "Pulsar has forgotten them, too"
    check(poster, tasks, Counter(counting.said))
    for pulsar in pulsars:
        until(lambda p=pulsar: not processes_with(f"{p.staging}/") or None, "runners and watchdogs to be gone")
    job_ids = [log["metadata"]["job_id"] for task in tasks.values() for log in task["logs"] if "metadata" in log]
    assert job_ids
    assert [job_id for job_id in job_ids if sandboxes(job_id)] == []
    print(
        f"\nPulsar fault suite on {runtime}: seed {SEED}, {dict(killed)}, {len(poster.posted)} tasks posted,", end=" "
    )
    print(f"{len(tasks)} stored, {poster.acknowledged} acknowledged")
    print(f"states: {dict(Counter(task['state'] for task in tasks.values()))}")


def _victims(
    kill: int, chance: random.Random, server: Server, pulsars: list[Pulsar]
) -> list[tuple[str, Server | Pulsar]]:
    """The service, one Pulsar, or both, in turn."""
    one = ("Pulsar", chance.choice(pulsars))
    choices: list[list[tuple[str, Server | Pulsar]]] = [[one], [("service", server)], [("service", server), one]]
    return choices[kill % len(choices)]
