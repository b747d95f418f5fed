"""What keeps a job true when its runner is killed, started twice, or told to stop."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pathlib
import re
import signal
import subprocess
from typing import Any

import pytest

from tesapi.runner import guard
from tesapi.runner.job import Refused
from tests.jobs import (
    JobPlace,
    Place,
    children_of,
    only,
    outcome,
    parse,
    pid_alive,
    sandboxes,
    script,
    step,
    until,
)

_PTRACE_SEIZE = 0x4206
_WALL = 0x40000000


@pytest.fixture
def place(place: Place) -> JobPlace:
    if not isinstance(place, JobPlace):
        pytest.skip("starts runners by itself, twice and in odd ways; what Pulsar starts is in the backends' contract")
    return place


def _started(place: JobPlace) -> dict[str, Any]:
    """The first event of the report; the watchdog watches by then."""
    return until(place.report, "the start")[0]


def _counting(place: JobPlace) -> dict[str, Any]:
    """A step that leaves a line outside for every time it runs, and then waits to be told to go on."""
    return script("cat /dev/null > /vol/ran.$$; echo ran >> /count/lines; until test -e /count/go; do sleep 0.02; done")


@pytest.fixture
def counter(place: JobPlace) -> pathlib.Path:
    """Where the counting step's lines lie."""
    return place.directory / "tes" / "files" / "0" / "lines"


def _lines(path: pathlib.Path) -> int:
    return len(path.read_text("ascii").splitlines()) if path.exists() else 0


def _write_counting(place: JobPlace) -> None:
    place.write(_counting(place), volumes=["/count", "/vol"])


def _watchdog(place: JobPlace, runner: subprocess.Popen[bytes]) -> int:
    """The process that is no child of the runner's any more and shows its command line."""
    found = [
        int(entry.name)
        for entry in pathlib.Path("/proc").iterdir()
        if entry.name.isdigit()
        and int(entry.name) != runner.pid
        and str(place.directory).encode() in _bytes(entry / "cmdline")
        and b"runner.py" in _bytes(entry / "cmdline")
    ]
    assert len(found) == 1
    return found[0]


def _bytes(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_second_start_attaches_says_the_same_and_runs_nothing(place: JobPlace, counter: pathlib.Path) -> None:
    _write_counting(place)
    with place.start() as first:
        until(counter.exists, "the first start's command")
        with place.start() as second, place.start() as third:
            (counter.parent / "go").touch()
            said = [runner.communicate(timeout=30) for runner in (first, second, third)]
    assert {runner.returncode for runner in (first, second, third)} == {0}
    assert said[0] == said[1] == said[2]
    assert outcome(parse(said[0][0])) == ("complete", None)
    assert _lines(counter) == 1


def test_of_many_starts_at_once_one_runs(place: JobPlace, counter: pathlib.Path) -> None:
    _write_counting(place)
    runners = [place.start() for _ in range(8)]
    until(counter.exists, "the command")
    (counter.parent / "go").touch()
    said = {runner.communicate(timeout=60) for runner in runners}
    assert len(said) == 1
    assert _lines(counter) == 1


def test_a_start_after_the_end_repeats_the_report(place: JobPlace) -> None:
    events = place.run(step("true"))
    with place.start() as again:
        stdout, stderr = again.communicate(timeout=30)
    assert (parse(stdout), stderr, again.returncode) == (events, b"", 0)


def test_a_killed_runner_is_noticed_and_its_sandbox_is_gone(place: JobPlace) -> None:
    place.write(step("true"), script("echo before; sleep 1000"))
    with place.start() as runner:
        until(lambda: (place.directory / "metadata" / "tails.json").exists(), "tails")
        assert place.remains()
        runner.kill()
    end = place.end()
    host = os.uname().nodename
    assert end["outcome"] == "system_error"
    assert end["reason"] == (
        f"The job's runner on {host} (process {runner.pid}) was killed while executor 1 ran; "
        "nothing of it runs any more."
    )
    killed = only(place.report(), "executor_ended")[1]
    assert (killed["exit_code"], killed["stdout"]) == (137, "before\n")
    assert place.remains() == []


def test_a_runner_that_is_killed_while_it_stages_is_noticed(place: JobPlace) -> None:
    place.write(step("true"), inputs=[{"path": "/in", "url": place.url("big")}])
    with (place.storage / "big").open("wb") as file:
        file.truncate(40 << 30)  # a hole, which takes a while to copy
    with place.start() as runner:
        _started(place)
        runner.kill()
    end = place.end()
    assert end["outcome"] == "system_error"
    assert "was killed before any executor" in end["reason"]


def test_a_runner_killed_together_with_its_watchdog_is_noticed_by_the_next_start(
    place: JobPlace, counter: pathlib.Path
) -> None:
    _write_counting(place)
    with place.start() as runner:
        until(counter.exists, "the command")
        watchdog = _watchdog(place, runner)
        os.kill(watchdog, signal.SIGKILL)
        runner.kill()
    until(lambda: not pid_alive(watchdog), "the watchdog's end")
    assert only(place.report(), "ended") == []
    with place.start() as second:
        stdout, _ = second.communicate(timeout=30)
    kind, reason = outcome(parse(stdout))
    assert kind == "system_error"
    assert f"(process {runner.pid}) was killed while executor 0 ran" in str(reason)
    assert place.remains() == []
    assert _lines(counter) == 1


def test_a_sweep_ends_what_a_dead_runner_left_and_reports_it(place: JobPlace, counter: pathlib.Path) -> None:
    _write_counting(place)
    with place.start() as runner:
        until(counter.exists, "the command")
        for pid in sandboxes(place.job_id):
            os.kill(pid, signal.SIGSTOP)
        os.kill(_watchdog(place, runner), signal.SIGKILL)
        runner.kill()
    command = place.command()
    sweep = subprocess.run([*command[:4], "--sweep", *command[4:]], capture_output=True, timeout=30, check=True)
    assert outcome(parse(sweep.stdout) if sweep.stdout else place.report())[0] == "system_error"
    assert place.remains() == []


def test_a_machine_that_went_down_is_named(place: JobPlace) -> None:
    place.write(step("true"))
    metadata = place.directory / "metadata"
    metadata.mkdir()
    who = {"host": os.uname().nodename, "boot_id": "of another day", "pid": 1, "start_time": 1}
    (metadata / "started").write_text(json.dumps(who), "ascii")
    with place.start() as runner:
        runner.communicate(timeout=30)
    assert outcome(place.report()) == (
        "system_error",
        f"The machine {os.uname().nodename} went down before any executor; nothing of it runs any more.",
    )


def test_a_line_that_was_cut_off_when_its_writer_died_is_removed(place: JobPlace) -> None:
    place.write(step("true"))
    metadata = place.directory / "metadata"
    metadata.mkdir()
    (metadata / "started").touch()
    first = '{"seq": 1, "at": "2026-01-01T00:00:00Z", "event": "started", "host": "h"}\n'
    place.report_file.write_text(first + '{"seq": 2, "at": "2026', "ascii")
    with place.start() as runner:
        stdout, _ = runner.communicate(timeout=30)
    assert [event["event"] for event in parse(place.report_file.read_bytes())] == ["started", "ended"]
    assert parse(stdout) == place.report()
    assert outcome(place.report())[1] == (
        "The job's runner died at its start, before any executor; nothing of it runs any more."
    )


def test_a_job_that_is_canceled_before_its_start_runs_nothing(place: JobPlace, counter: pathlib.Path) -> None:
    _write_counting(place)
    place.cancelled_file.touch()
    with place.start() as runner:
        runner.communicate(timeout=30)
    assert [event["event"] for event in place.report()] == ["ended"]
    assert outcome(place.report()) == ("canceled", None)
    assert not counter.exists()
    assert not (place.directory / "metadata" / "started").exists()


@pytest.mark.parametrize("how", ["marker", "marker and signal"])
def test_a_running_job_is_canceled_and_nothing_of_it_runs_after_that(
    place: JobPlace, counter: pathlib.Path, how: str
) -> None:
    place.write(
        script("trap '' TERM; echo ran >> /count/lines; while :; do sleep 0.01; done"), step("true"), volumes=["/count"]
    )
    with place.start() as runner:
        until(counter.exists, "the command")
        boxes = sandboxes(place.job_id)
        place.cancelled_file.touch()
        if how == "marker and signal":
            runner.terminate()
        place.end()
        assert not any(pid_alive(pid) for pid in boxes)  # gone when it is told, not some time after
        runner.communicate(timeout=30)
    assert outcome(place.report()) == ("canceled", None)
    assert [event["exit_code"] for event in only(place.report(), "executor_ended")] == [137]


def test_a_job_is_canceled_while_it_stages_in(place: JobPlace) -> None:
    place.write(step("true"), inputs=[{"path": "/in", "url": place.url("big")}])
    with (place.storage / "big").open("wb") as file:
        file.truncate(200 << 30)
    with place.start() as runner:
        _started(place)
        place.cancelled_file.touch()
        runner.communicate(timeout=60)
    assert outcome(place.report()) == ("canceled", None)


def test_a_job_is_canceled_while_it_stores_its_outputs(place: JobPlace) -> None:
    place.write(
        script("truncate -s 200G /out/big; echo x > /out/next"),
        outputs=[{"path": "/out/big", "url": place.url("big")}, {"path": "/out/next", "url": place.url("next")}],
    )
    with place.start() as runner:
        until(lambda: only(place.report(), "executor_ended") and len(list(place.storage.iterdir())), "the upload")
        place.cancelled_file.touch()
        runner.communicate(timeout=60)
    assert outcome(place.report()) == ("canceled", None)
    assert not (place.storage / "next").exists()
    assert not (place.storage / "big").exists()
    assert place.remains() == []


def test_what_takes_long_says_how_far_it_is(place: JobPlace) -> None:
    place.write(step("true"), inputs=[{"path": "/in", "url": place.url("big")}])
    with (place.storage / "big").open("wb") as file:
        file.truncate(900 << 30)
    with place.start() as runner:
        text = until(lambda: only(place.report(), "note"), "a note")[0]["text"]
        place.cancelled_file.touch()
        runner.communicate(timeout=60)
    done, total = re.fullmatch(
        re.escape(f"Staging in input 1 of 1 ({place.url('big')}): ") + r"(\d+) of (\d+) MB\.", text
    ).groups()
    assert 0 < int(done) < int(total) == 966368


def test_a_signal_that_nobody_announced_is_a_system_error(place: JobPlace, counter: pathlib.Path) -> None:
    _write_counting(place)
    with place.start() as runner:
        until(counter.exists, "the command")
        runner.terminate()
        runner.communicate(timeout=30)
    assert outcome(place.report()) == ("system_error", "The runner was told to stop by SIGTERM.")
    assert place.remains() == []


def test_the_watchdog_goes_with_the_job(place: JobPlace, counter: pathlib.Path) -> None:
    _write_counting(place)
    with place.start() as runner:
        until(counter.exists, "the command")
        watchdog = _watchdog(place, runner)
        assert watchdog not in children_of(runner.pid)
        (counter.parent / "go").touch()
        runner.communicate(timeout=30)
    until(lambda: not pid_alive(watchdog), "the watchdog's end")


def test_the_lock_is_held_until_the_watchdog_is_done(place: JobPlace, counter: pathlib.Path) -> None:
    _write_counting(place)
    with place.start() as runner:
        until(counter.exists, "the command")
        watchdog = _watchdog(place, runner)
        os.kill(watchdog, signal.SIGSTOP)
        runner.kill()
        runner.wait()
    assert guard.take_lock(str(place.directory / "metadata" / "lock")) is None
    with place.start() as second:  # waits for the watchdog, and does not take its place
        os.kill(watchdog, signal.SIGCONT)
        second.communicate(timeout=30)
    assert len(only(place.report(), "ended")) == 1
    assert _lines(counter) == 1


def test_a_file_system_without_locks_is_refused_with_a_sentence(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    with pytest.raises(Refused, match=r"The file system of .*lock has no locks \(No locks available\)"):
        guard.take_lock(str(tmp_path / "lock"))
