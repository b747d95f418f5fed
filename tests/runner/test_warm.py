"""Runners forked from a warm one: each is a runner like any other, and none depends on the one that it came from."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
from collections.abc import Iterator, Mapping

import pytest

from tesapi.backends.runners import Runner, Runners
from tesapi.runner.job import Places
from tests.jobs import JobPlace, outcome, pid_alive, processes_with, sandboxes, script, step, until


@pytest.fixture
def runners(tmp_path: pathlib.Path) -> Iterator[Runners]:
    runners = Runners(tmp_path)
    yield runners
    runners.close()


@pytest.fixture
def place(tmp_path: pathlib.Path, bubblewrap: Mapping[str, object]) -> JobPlace:
    return JobPlace(tmp_path, bubblewrap)


def _start(runners: Runners, place: JobPlace) -> Runner:
    return runners.start(Places(str(place.directory / "inputs" / "job.json")), "bubblewrap")


def _warm(folder: pathlib.Path) -> list[int]:
    return [pid for pid in processes_with("--warm") if pid in processes_with(str(folder))]


def _running(runners: Runners, place: JobPlace) -> Runner:
    """A runner whose step runs until the job is canceled."""
    place.write(step("sleep", "1000"))
    runner = _start(runners, place)
    until(lambda: sandboxes(place.job_id), "the sandbox")
    return runner


def _canceled(place: JobPlace, runner: Runner) -> None:
    place.cancelled_file.touch()
    place.end()
    until(lambda: not runner.lives(), "the runner's end")
    assert outcome(place.report()) == ("canceled", None)


def test_a_forked_runner_runs_its_job_and_is_gone(runners: Runners, place: JobPlace) -> None:
    place.write(script("echo out; exit 3"))
    runner = _start(runners, place)
    until(lambda: not runner.lives(), "the runner's end")
    assert not pid_alive(runner.pid)
    assert [line["event"] for line in place.report()] == ["started", "executor_started", "executor_ended", "ended"]
    assert (place.directory / "metadata" / "runner.stderr").read_bytes() == b""


def test_it_is_listed_with_its_job_and_leads_a_session(runners: Runners, place: JobPlace) -> None:
    runner = _running(runners, place)
    arguments = pathlib.Path(f"/proc/{runner.pid}/cmdline").read_bytes().decode().split("\0")
    assert arguments[-3:-1] == [str(place.directory / "inputs" / name) for name in ("runner.py", "job.json")]
    assert os.getsid(runner.pid) == runner.pid
    _canceled(place, runner)


def test_it_holds_nothing_of_the_one_it_came_from(runners: Runners, place: JobPlace) -> None:
    runner = _running(runners, place)
    open_files = []
    for link in pathlib.Path(f"/proc/{runner.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since
            open_files.append(str(link.readlink()))
    assert not [name for name in open_files if name.startswith("socket:")]
    assert pathlib.Path(f"/proc/{runner.pid}/fd/1").readlink() == pathlib.Path("/dev/null")
    _canceled(place, runner)


def test_it_obeys_signals(runners: Runners, place: JobPlace) -> None:
    runner = _running(runners, place)
    os.kill(runner.pid, signal.SIGTERM)
    assert "SIGTERM" in str(place.end()["reason"])


def test_jobs_go_on_when_no_more_are_started(runners: Runners, place: JobPlace, tmp_path: pathlib.Path) -> None:
    runner = _running(runners, place)
    runners.close()
    assert _warm(tmp_path) == []
    assert runner.lives()
    _canceled(place, runner)


def test_jobs_go_on_and_others_start_when_the_warm_runner_is_killed(
    runners: Runners, place: JobPlace, tmp_path: pathlib.Path, bubblewrap: Mapping[str, object]
) -> None:
    runner = _running(runners, place)
    for round_number in range(2):
        for pid in until(lambda: _warm(tmp_path), "the warm runner"):
            os.kill(pid, signal.SIGKILL)
        for name in ("at once", "warm again"):
            other = JobPlace(tmp_path / f"{round_number} {name}", bubblewrap)
            other.write(step("true"))
            another = _start(runners, other)
            assert other.end()["outcome"] == "complete"
            until(lambda another=another: not another.lives(), "the runner's end")  # type: ignore[misc]
    _canceled(place, runner)


def test_a_job_of_another_version_is_run_by_its_own_runner(runners: Runners, place: JobPlace) -> None:
    place.write(step("true"))
    (place.directory / "inputs" / "runner.py").write_text("open(__file__ + '.ran', 'w').close()", "ascii")
    runner = _start(runners, place)
    until(lambda: not runner.lives(), "the runner's end")
    assert (place.directory / "inputs" / "runner.py.ran").exists()
    assert not place.report_file.exists()
