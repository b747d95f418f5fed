"""Many tasks canceled at once: none is CANCELED before its container is gone, and none is left."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.conftest import RUNTIMES
from tests.engines import DockerEngine
from tests.jobs import sandboxes, until
from tests.services.server import Server

CANCELS = int(os.environ.get("TESAPI_TEST_CANCELS", "16"))
_LOOK_S = 0.05
_SLEEPER = {
    "executors": [{"image": "alpine", "command": ["sh", "-c", "trap '' TERM; echo begun; while :; do sleep 1; done"]}]
}


@pytest.mark.soak
@pytest.mark.timeout(120 + 5 * CANCELS)
@pytest.mark.parametrize("runtime", [name for name in ("bubblewrap", "docker") if name in RUNTIMES])
def test_no_container_survives_its_canceled(
    tmp_path: pathlib.Path, request: pytest.FixtureRequest, runtime: str
) -> None:
    settings: dict[str, object] = {"LOCAL__CPU_CORES": CANCELS, "LOCAL__MAX_JOBS": CANCELS}
    if runtime == "docker":
        engine: DockerEngine = request.getfixturevalue("docker_engine")
        settings |= {"RUNTIME__KIND": "docker", "RUNTIME__DOCKER__HOST": f"unix://{engine.socket}"}
        settings |= {"RUNTIME__NETWORK": "none", "RUNTIME__PULL": "never"}
    else:
        found: Mapping[str, object] = request.getfixturevalue("bubblewrap")
        assert found

    def containers(job_id: str) -> list[object]:
        return [*engine.containers(f"tesapi.job={job_id}")] if runtime == "docker" else [*sandboxes(job_id)]

    with Server(tmp_path, **settings) as server:
        task_ids = [server.post(_SLEEPER) for _ in range(CANCELS)]
        until(lambda: all(_has_begun(task) for task in map(server.get, task_ids)), "all to run", 60 + 2 * CANCELS)
        jobs = {task["id"]: task["logs"][0]["metadata"]["job_id"] for task in server.all("FULL")}
        asked = time.monotonic()
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(server.cancel, task_ids))
        took: dict[str, float] = {}
        while len(took) < CANCELS:
            states = {task["id"]: task["state"] for task in server.all()}
            for task_id in states.keys() - took.keys():
                assert states[task_id] in {"CANCELING", "CANCELED"}
                if states[task_id] == "CANCELED":
                    took[task_id] = time.monotonic() - asked
                    assert containers(jobs[task_id]) == []
            assert time.monotonic() - asked < 60 + 2 * CANCELS
            time.sleep(_LOOK_S)  # whoever asks takes time from what is measured
        until(lambda: not server.jobs, "job directories to be removed")
    slowest = sorted(took.values())[int(0.99 * (CANCELS - 1))]
    print(f"\n{CANCELS} tasks canceled at once on {runtime}: p99 {slowest:.2f} s until CANCELED")


def _has_begun(task: Mapping[str, Any]) -> bool:
    return any("begun" in run.get("stdout", "") for log in task["logs"] for run in log["logs"])
