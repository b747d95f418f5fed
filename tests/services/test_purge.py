"""Removing tasks that are over: by the service, as its settings say, and by hand."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.jobs import until
from tests.services.server import Server

TRUE = {"executors": [{"image": "alpine", "command": ["true"]}], "tags": {"lab": "x"}}


@pytest.fixture
def stopped(tmp_path: pathlib.Path, bubblewrap: object) -> Iterator[tuple[Server, list[str]]]:
    """A service that was stopped when three tasks were over, and one was not; their ids."""
    with Server(tmp_path, LOCAL__MAX_JOBS=1, LOCAL__CPU_CORES=4) as server:
        ids = []
        for _ in range(3):
            ids.append(server.post(TRUE))
            server.wait_for(ids[-1])
        until(lambda: not server.jobs, "the jobs' directories to be removed")
        ids.append(server.post({"executors": [{"image": "alpine", "command": ["sleep", "30"]}]}))
        server.wait_for(ids[-1], "RUNNING")
        server.stop()
        yield server, ids


def _purge(folder: pathlib.Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TESAPI_", "TESP_"))}
    command = [sys.executable, "-m", "tesapi", "purge", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment | settings, capture_output=True, text=True, timeout=60, check=False
    )


def _ids(server: Server) -> list[str]:
    return [str(task["id"]) for task in server.all()]


def test_an_operator_removes_all_but_the_tasks_that_ended_last(stopped: tuple[Server, list[str]]) -> None:
    server, (*_, third, running) = stopped
    dry = _purge(server.folder, "--keep", "1", "--dry-run")
    assert (dry.returncode, dry.stdout) == (0, "2 tasks would be removed.\n")
    done = _purge(server.folder, "--keep", "1")
    assert (done.returncode, done.stdout) == (0, "2 tasks were removed.\n"), done.stderr
    server.start()
    assert _ids(server) == [running, third]
    server.cancel(running)
    assert server.wait_for(running) == "CANCELED"


def test_an_operator_removes_tasks_by_their_age(stopped: tuple[Server, list[str]]) -> None:
    server, ids = stopped
    assert _purge(server.folder, "--older-than", "1").stdout == "0 tasks were removed.\n"
    assert _purge(server.folder, "--older-than", "0").stdout == "3 tasks were removed.\n"
    server.start()
    assert _ids(server) == ids[3:]
    server.cancel(ids[3])
    server.wait_for(ids[3])


def test_purging_without_options_does_what_the_settings_say(stopped: tuple[Server, list[str]]) -> None:
    server, _ = stopped
    nothing = _purge(server.folder)
    assert nothing.returncode == 2
    assert "--older-than or --keep" in nothing.stderr
    done = _purge(server.folder, TESAPI_RETENTION__MAX_TASKS="2")
    assert (done.returncode, done.stdout) == (0, "1 tasks were removed.\n")


def test_the_service_removes_what_its_settings_do_not_keep(stopped: tuple[Server, list[str]]) -> None:
    server, (*_, third, running) = stopped
    server.settings["RETENTION__MAX_TASKS"] = 1
    server.start()
    assert until(lambda: (ids := _ids(server)) == [running, third] and ids, "two tasks to be removed")
    until(lambda: "Removed 2 tasks that were done" in server.log.read_text("utf-8"), "a word on it in the log")
    server.cancel(running)
    assert server.wait_for(running) == "CANCELED"


def test_purging_beside_a_service_on_sqlite_says_what_to_do(stopped: tuple[Server, list[str]]) -> None:
    server, ids = stopped
    server.start()
    for arguments in (["--keep", "0"], ["--keep", "0", "--dry-run"]):
        run = _purge(server.folder, *arguments)
        assert run.returncode == 2
        assert f"is in use by process {server.process.pid if server.process else None}" in run.stderr
        assert "stop the service before purging, or have it purge by itself" in run.stderr
        assert "Traceback" not in run.stderr
    assert len(_ids(server)) == 4
    server.cancel(ids[3])
    server.wait_for(ids[3])


def test_purging_where_there_is_no_database_makes_none(tmp_path: pathlib.Path) -> None:
    run = _purge(tmp_path, "--keep", "0")
    assert run.returncode == 2
    assert f"There is no database at {tmp_path}/data/tesapi.db" in run.stderr
    assert not (tmp_path / "data").exists()
