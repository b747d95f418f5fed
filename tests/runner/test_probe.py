"""What a probe job tells of the place where it runs."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from tesapi import __version__
from tesapi.backends.runtimes import RuntimeOptions
from tesapi.jobs.bundle import runner_text
from tests.engines import DockerEngine


def _probe(folder: pathlib.Path, options: RuntimeOptions, environment: Mapping[str, str]) -> dict[str, Any]:
    (folder / "runner.py").write_text(runner_text(__version__), "ascii")
    (folder / "options.json").write_text(json.dumps(options.document()), "ascii")
    command = [sys.executable, "-I", "-S", str(folder / "runner.py"), "--probe", str(folder / "options.json")]
    run = subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True, timeout=60, check=True
    )
    return dict(json.loads(run.stdout))


def _docker(engine: DockerEngine) -> RuntimeOptions:
    return RuntimeOptions("docker", docker_host=f"unix://{engine.socket}", pull="never", network="none")


def test_outside_of_a_batch_system_there_is_none(tmp_path: pathlib.Path, docker_engine: DockerEngine) -> None:
    answer = _probe(tmp_path, _docker(docker_engine), {})
    assert answer["batch"] is None
    assert answer["found"]["kind"] == "docker"
    assert "watchdog" not in answer["sentence"]


@pytest.mark.parametrize(
    ("variable", "name"),
    [("SLURM_JOB_ID", "Slurm"), ("PBS_JOBID", "PBS"), ("LSB_JOBID", "LSF"), ("_CONDOR_JOB_AD", "HTCondor")],
)
def test_a_batch_system_is_named_with_what_it_may_leave_of_an_engine(
    tmp_path: pathlib.Path, docker_engine: DockerEngine, variable: str, name: str
) -> None:
    answer = _probe(tmp_path, _docker(docker_engine), {variable: "1"})
    assert answer["batch"] == name
    assert f" Jobs run in {name}, which may kill a runner together with its watchdog: a" in answer["sentence"]


def test_where_nothing_can_be_left_nothing_is_said_of_it(tmp_path: pathlib.Path, bubblewrap: object) -> None:
    images = [("alpine", "host")]
    answer = _probe(tmp_path, RuntimeOptions("bubblewrap", images=images), {"SLURM_JOB_ID": "1"})
    assert answer["batch"] == "Slurm"
    assert "watchdog" not in answer["sentence"]
