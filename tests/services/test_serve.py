"""`tesapi serve` as its operator and its users meet it."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Mapping

import httpx
import pytest

from tests.jobs import pid_alive, processes_with, sandboxes, until
from tests.services.server import Server

ROOT = pathlib.Path(__file__).parents[2]


def _sleeper() -> dict[str, object]:
    return {"executors": [{"image": "alpine", "command": ["sh", "-c", "trap '' TERM; while :; do sleep 0.05; done"]}]}


def _job_id(server: Server, task_id: str) -> str:
    return str(server.get(task_id)["logs"][0]["metadata"]["job_id"])


def test_a_running_task_is_canceling_until_its_sandbox_is_gone(server: Server) -> None:
    task_id = server.post(_sleeper())
    server.wait_for(task_id, "RUNNING")
    job_id = _job_id(server, task_id)
    boxes = sandboxes(job_id)
    assert boxes
    runner = next(pid for pid in processes_with(job_id) if os.getsid(pid) == pid and pid not in boxes)
    os.kill(runner, signal.SIGSTOP)  # so that nothing can be proved for the moment
    server.cancel(task_id)
    assert server.get(task_id)["state"] == "CANCELING"
    server.cancel(task_id)
    assert server.get(task_id)["state"] == "CANCELING"
    assert all(pid_alive(pid) for pid in boxes)
    os.kill(runner, signal.SIGCONT)
    server.wait_for(task_id, "CANCELED")
    assert not any(pid_alive(pid) for pid in boxes)
    assert "Canceled by its user; nothing of it runs any more." in server.get(task_id)["logs"][0]["system_logs"][-1]
    server.cancel(task_id)
    assert server.get(task_id)["state"] == "CANCELED"
    until(lambda: not server.jobs, "its directory to be removed")


def test_a_task_that_waits_for_room_is_canceled_and_never_runs(tmp_path: pathlib.Path, bubblewrap: object) -> None:
    with Server(tmp_path, LOCAL__MAX_JOBS=1) as server:
        first = server.post(_sleeper())
        server.wait_for(first, "RUNNING")
        second = server.post({"executors": [{"image": "alpine", "command": ["touch", "/tmp/x"]}]})
        assert server.get(second)["state"] == "QUEUED"
        server.cancel(second)
        assert server.get(second)["state"] == "CANCELED"
        assert server.get(second)["logs"][0]["logs"] == []
        server.cancel(first)
        assert server.wait_for(first) == "CANCELED"


def test_a_runner_that_was_killed_is_told_as_a_system_error(server: Server) -> None:
    task_id = server.post(_sleeper())
    server.wait_for(task_id, "RUNNING")
    job_id = _job_id(server, task_id)
    boxes = sandboxes(job_id)
    runner = next(pid for pid in processes_with(job_id) if os.getsid(pid) == pid and pid not in boxes)
    os.kill(runner, signal.SIGKILL)
    assert server.wait_for(task_id) == "SYSTEM_ERROR"
    assert not any(pid_alive(pid) for pid in boxes)
    sentence = f"(process {runner}) was killed while executor 0 ran; nothing of it runs any more."
    assert sentence in server.get(task_id)["logs"][0]["system_logs"][-1]


def test_a_clean_stop_changes_no_task_and_the_next_start_goes_on_at_once(server: Server) -> None:
    task_id = server.post({"executors": [{"image": "alpine", "command": ["sh", "-c", "sleep 2; echo done"]}]})
    server.wait_for(task_id, "RUNNING")
    job_id = _job_id(server, task_id)
    assert server.stop() == 0
    assert sandboxes(job_id)
    server.start()
    assert server.get(task_id)["state"] == "RUNNING"
    assert server.wait_for(task_id) == "COMPLETE"
    assert server.get(task_id)["logs"][0]["logs"][0]["stdout"] == "done\n"


def test_a_second_service_on_the_same_database_says_so_and_ends(server: Server) -> None:
    run = _serve(server.folder, TESAPI_SERVER__PORT="0")
    assert run.returncode == 2
    assert f"is in use by process {server.process.pid if server.process else None}" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("command", ["api", "dispatcher"])
def test_a_process_of_several_says_on_sqlite_what_to_set(tmp_path: pathlib.Path, command: str) -> None:
    run = _tesapi(tmp_path, command, TESAPI_SERVER__PORT="0")
    assert run.returncode == 2
    assert (
        f"tesapi {command} shares its store with other processes, and SQLite serves one: set db.mongodb_uri"
        in run.stderr
    )
    assert "Traceback" not in run.stderr


def test_a_port_that_is_taken_is_one_sentence(server: Server, tmp_path: pathlib.Path) -> None:
    (tmp_path / "other").mkdir()
    run = _serve(tmp_path / "other", TESAPI_SERVER__PORT=str(server.settings["SERVER__PORT"]))
    assert run.returncode == 2
    assert "Address already in use" in run.stderr
    assert "Traceback" not in run.stderr


def test_it_does_not_listen_beyond_loopback_unless_told_that_everybody_may(tmp_path: pathlib.Path) -> None:
    run = _serve(tmp_path, TESAPI_SERVER__HOST="0.0.0.0")
    assert run.returncode == 2
    assert "server.host" in run.stderr
    assert "server.allow_anonymous" in run.stderr
    with Server(tmp_path, SERVER__HOST="0.0.0.0", SERVER__ALLOW_ANONYMOUS="true") as server:
        assert "WARNING" in server.log.read_text("utf-8")


def test_an_image_is_mapped_by_default_only_where_nobody_else_can_ask_for_it(
    tmp_path: pathlib.Path, bubblewrap: object
) -> None:
    with Server(tmp_path, SERVER__HOST="0.0.0.0", SERVER__ALLOW_ANONYMOUS="true") as server:
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        task_id = server.post({"executors": [{"image": "alpine", "command": ["true"]}]})
        assert server.wait_for(task_id) == "SYSTEM_ERROR"
        assert "runtime.bubblewrap.images in settings.toml" in server.get(task_id)["logs"][0]["system_logs"][-1]


def test_a_mistyped_setting_keeps_it_from_starting(tmp_path: pathlib.Path) -> None:
    (tmp_path / "settings.toml").write_text("[default.server]\nprot = 8080\n", "ascii")
    run = _serve(tmp_path)
    assert run.returncode == 2
    assert "server.prot" in run.stderr
    assert "settings.toml" in run.stderr
    assert "Traceback" not in run.stderr


def test_check_settings_shows_what_they_come_to(tmp_path: pathlib.Path) -> None:
    run = _tesapi(tmp_path, "check-settings", TESAPI_SERVER__PORT="9000")
    assert run.returncode == 0
    line = next(line for line in run.stdout.splitlines() if line.startswith("server.port"))
    assert line.split(maxsplit=2) == ["server.port", "9000", "environment variable TESAPI_SERVER__PORT"]


@pytest.mark.timeout(120)
def test_the_readmes_first_task_works_word_for_word(server: Server) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    commands = re.search(r"```console first task\n(.*?)```", readme, re.DOTALL)
    assert commands is not None
    lines = commands[1].replace("localhost:8080", server.url.removeprefix("http://"))
    steps = "\n".join(line[2:] for line in lines.splitlines() if line.startswith(("$ ", "> ")))
    run = subprocess.run(["bash", "-euc", steps], cwd=server.folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    said = [line for line in lines.splitlines() if line and not line.startswith(("$ ", "> "))]
    patterns = [re.escape(line).replace("…", ".*") for line in said]
    assert re.fullmatch("\n".join(patterns), run.stdout.strip(), re.DOTALL), run.stdout


def test_a_task_finds_this_machine_as_its_users_do_and_no_more(server: Server) -> None:
    secret = server.folder / "secret"
    secret.write_text("very secret", "ascii")
    look = f"cat {secret} {server.folder}/data/tesapi.db; find / -name 'tesapi.db' 2>/dev/null; true"
    task_id = server.post({"executors": [{"image": "alpine", "command": ["sh", "-c", look]}]})
    assert server.wait_for(task_id) == "COMPLETE"
    log = server.get(task_id)["logs"][0]["logs"][0]
    assert log["stdout"] == ""
    assert log["stderr"].count("No such file or directory") == 2


def test_readyz_lists_the_destinations_with_a_sentence_each(server: Server) -> None:
    answer = httpx.get(f"{server.url}/readyz")
    assert answer.status_code == 200
    (local,) = answer.json()["destinations"]
    assert (local["name"], local["ok"]) == ("local", True)
    assert "at most 8 jobs, 8 CPU cores" in local["sentence"]
    assert httpx.get(f"{server.url}/livez").json() == {"status": "ok"}


def _serve(folder: pathlib.Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return _tesapi(folder, "serve", **variables)


def _tesapi(folder: pathlib.Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean: Mapping[str, str] = {k: v for k, v in os.environ.items() if not k.startswith(("TESAPI_", "TESP_"))}
    return subprocess.run(
        [sys.executable, "-m", "tesapi", *arguments],
        cwd=folder,
        env={**clean, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
