"""Programs that misbehave, on each runtime: the job ends, says how, and nothing of it is left."""

from __future__ import annotations

import os
import pathlib

import pytest

from tests.jobs import Place, only, outcome, script, step, until

_MUCH_MB = int(os.environ.get("TESAPI_TEST_PRINTED_MB", "300"))


def _cancel(place: Place) -> None:
    """Start the job that was written, and cancel it when it says that it has begun."""
    tails = place.directory / "metadata" / "tails.json"
    with place.start() as runner:
        until(lambda: tails.exists() and "begun" in tails.read_text("ascii"), "the command")
        place.cancel()
        runner.communicate(timeout=60)
    assert outcome(place.report()) == ("canceled", None)
    assert place.remains() == []


def test_a_program_that_ignores_signals_is_canceled(place: Place) -> None:
    place.write(script("trap '' TERM INT HUP QUIT; echo begun; while :; do sleep 0.1; done"))
    _cancel(place)


def test_a_program_that_has_daemons_is_canceled(place: Place) -> None:
    place.write(script("for i in 1 2 3; do setsid sh -c 'trap \"\" TERM; sleep 1000' & done; echo begun; sleep 1000"))
    _cancel(place)


@pytest.mark.soak
def test_a_program_that_prints_very_much_takes_neither_memory_nor_disk(place: Place) -> None:
    place.write(script(f"head -c {_MUCH_MB}000000 /dev/zero | tr '\\000' x; echo; echo the end; echo begun; sleep 3"))
    largest_kb = most_blocks = 0
    with place.start() as runner:
        stdout = place.directory / "tes" / "exec" / "0" / "stdout"
        while runner.poll() is None:
            largest_kb = max(largest_kb, _resident_kb(runner.pid))
            if stdout.exists():
                most_blocks = stdout.stat().st_blocks
        runner.communicate()
    assert outcome(place.report()) == ("complete", None)
    tail = only(place.report(), "executor_ended")[0]["stdout"]
    assert tail.endswith("x\nthe end\nbegun\n")
    assert 30_000 < len(tail) <= 65536
    assert largest_kb < 100_000
    assert most_blocks * 512 < 20 << 20  # as it was when the program had printed everything


def test_a_program_that_prints_very_much_to_a_file_has_it_all(place: Place) -> None:
    events = place.run(
        script("head -c 40000000 /dev/zero | tr '\\000' x; echo begun", stdout="/out/log"),
        outputs=[{"path": "/out/log", "url": place.url("log")}],
    )
    assert outcome(events) == ("complete", None)
    text = (place.storage / "log").read_bytes()
    assert text == b"x" * 40_000_000 + b"begun\n"


def test_a_program_that_prints_bytes_that_are_no_text_is_told(place: Place) -> None:
    events = place.run(script("head -c 200000 /dev/urandom; printf end"))
    assert outcome(events) == ("complete", None)
    assert only(events, "executor_ended")[0]["stdout"].endswith("end")
    assert len(place.report_file.read_bytes()) < 100_000


def test_a_program_that_closes_its_streams_goes_on(place: Place) -> None:
    events = place.run(
        script("echo before; exec <&- >&- 2>&-; sleep 0.5; exec sh -c 'echo late > /out/o; exit 7'"),
        outputs=[{"path": "/out/o", "url": place.url("o")}],
    )
    assert outcome(events) == ("executor_error", "Executor 0 ended with exit code 7.")
    assert only(events, "executor_ended")[0]["stdout"] == "before\n"
    assert place.stored("o") == "late\n"


def test_a_background_program_that_holds_the_streams_does_not_hold_the_job(place: Place) -> None:
    events = place.run(script("sleep 1000 & echo begun; exit 0"))
    assert outcome(events) == ("complete", None)
    assert place.remains() == []


def test_a_program_that_reads_nothing_of_much_input_ends(place: Place) -> None:
    with (place.storage / "much").open("wb") as file:
        file.truncate(50_000_000)
    events = place.run(script("exit 5", stdin="/in/much"), inputs=[{"path": "/in/much", "url": place.url("much")}])
    assert outcome(events) == ("executor_error", "Executor 0 ended with exit code 5.")


def test_much_input_is_read_whole(place: Place) -> None:
    (place.storage / "much").write_bytes(os.urandom(20_000_000))
    events = place.run(
        script("cat > /out/copy", stdin="/in/much"),
        inputs=[{"path": "/in/much", "url": place.url("much")}],
        outputs=[{"path": "/out/copy", "url": place.url("copy")}],
    )
    assert outcome(events) == ("complete", None)
    assert (place.storage / "copy").read_bytes() == (place.storage / "much").read_bytes()


def test_files_that_a_task_has_closed_go_with_the_job(place: Place) -> None:
    events = place.run(
        script("mkdir -p /out/d/e; echo x > /out/d/e/f; chmod 000 /out/d/e/f /out/d/e /out/d; echo o > /out/o"),
        outputs=[{"path": "/out/o", "url": place.url("o")}],
    )
    assert outcome(events) == ("complete", None)


def test_two_executors_may_leave_the_same_names(place: Place) -> None:
    events = place.run(
        script("mkdir /x /tmp/x; touch /x/y"), script("mkdir /x /tmp/x; touch /x/y"), step("true", workdir="/x")
    )
    assert outcome(events) == ("complete", None)


def _resident_kb(pid: int) -> int:
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
