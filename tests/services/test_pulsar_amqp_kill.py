"""Service, broker and Pulsar stopped and killed at random points: nothing lost, nothing run twice, no lie told."""

from __future__ import annotations

import json
import os
import pathlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import pytest

from tests.conftest import TAKES_MINUTES
from tests.jobs import processes_with, sandboxes, until
from tests.pulsars import Pulsar
from tests.rabbit import Rabbit
from tests.services.server import SETTLED, Server
from tests.services.workload import Counting, Poster, check

SIZE = int(os.environ.get("TESAPI_TEST_SIZE", "20"))
KILLS = int(os.environ.get("TESAPI_TEST_KILLS", "5"))
SEED = int(os.environ.get("TESAPI_TEST_SEED", "1"))

Victims = Mapping[str, Server | Pulsar | Rabbit]


@pytest.fixture
def amqp(
    tmp_path: pathlib.Path, rabbit: Rabbit, pulsar_programs: pathlib.Path, bubblewrap: Mapping[str, object]
) -> Iterator[Victims]:
    """A service, and a Pulsar that it reaches only through a broker."""
    with Pulsar(tmp_path / "pulsar", pulsar_programs, message_queue_url=rabbit.url, web=False) as pulsar:
        with Server(tmp_path, PULSAR__AMQP_URL=rabbit.url, **at_pulsar(tmp_path)) as server:
            yield {"service": server, "broker": rabbit, "Pulsar": pulsar}


@pytest.fixture
def both(
    tmp_path: pathlib.Path, rabbit: Rabbit, pulsar_programs: pathlib.Path, bubblewrap: Mapping[str, object]
) -> Iterator[Victims]:
    """A service, and a Pulsar that it reaches over REST and that tells of its jobs through a broker."""
    url = rabbit.add_vhost("both")
    with Pulsar(tmp_path / "pulsar", pulsar_programs, message_queue_url=url) as pulsar:
        place = {"PULSAR__URL": pulsar.url, "PULSAR__PRIVATE_TOKEN": f'"{pulsar.token}"', "PULSAR__AMQP_URL": url}
        with Server(tmp_path, **place, **at_pulsar(tmp_path)) as server:
            yield {"service": server, "broker": rabbit, "Pulsar": pulsar}


def at_pulsar(folder: pathlib.Path) -> dict[str, object]:
    """What is set of a Pulsar that sees the service's files."""
    return {
        "PULSAR__RUNTIME__KIND": "bubblewrap",
        "PULSAR__RUNTIME__BUBBLEWRAP__IMAGES": '{"alpine" = "host", "debian*" = "host"}',
        "PULSAR__STORAGE__FILE__ROOTS": json.dumps([str(folder / "data" / "files")]),
        "PULSAR__MAX_JOBS": 8,
    }


@TAKES_MINUTES
@pytest.mark.soak
@pytest.mark.timeout(400 + 10 * SIZE)
@pytest.mark.parametrize("kind", ["amqp", "both"])
def test_service_broker_and_pulsar_are_killed_again_and_again(
    request: pytest.FixtureRequest, tmp_path: pathlib.Path, counting: Counting, kind: str
) -> None:
    chance = random.Random(SEED)
    victims: Victims = request.getfixturevalue(kind)
    server, pulsar = victims["service"], victims["Pulsar"]
    assert isinstance(server, Server)
    assert isinstance(pulsar, Pulsar)
    poster = Poster(server, counting, chance, "bubblewrap")
    killed: Counter[str] = Counter()
    for kill in range(KILLS):
        while poster.acknowledged < SIZE * (kill + 1) // (KILLS + 1):
            poster.post()
        name, victim = chance.choice(list(victims.items()))
        how = chance.choice(["stop", "kill"])
        time.sleep(chance.uniform(0, 1.5))
        end: Callable[[], object] = getattr(victim, how)
        end()
        killed[f"{name} {how}"] += 1
        time.sleep(chance.choice([0, 0.5, 3.0]))  # jobs go on, and end, while one of them is away
        victim.start()
    while poster.acknowledged < SIZE:
        poster.post()
    until(
        lambda: all(task["state"] in SETTLED for task in server.all()) or None, "every task to settle", 120 + 5 * SIZE
    )
    tasks = {task["id"]: task for task in server.all("FULL")}
    check(poster, tasks, Counter(counting.said))
    until(lambda: not processes_with(f"{pulsar.staging}/") or None, "runners and watchdogs to be gone")
    job_ids = [log["metadata"]["job_id"] for task in tasks.values() for log in task["logs"] if "metadata" in log]
    assert job_ids
    assert [job_id for job_id in job_ids if sandboxes(job_id)] == []
    until(lambda: not {job.name for job in pulsar.jobs} & set(job_ids), "job folders to be removed", 120)
    # Each job that removes folders leaves its own, which a later one removes; so do other jobs of the service's own.
    assert len(pulsar.jobs) < 20
    print(f"\nkill suite over {kind}: seed {SEED}, {len(tasks)} tasks, killed: {dict(killed)}")
    print(f"states: {dict(Counter(task['state'] for task in tasks.values()))}")
