"""What only bubblewrap does: images that are mapped, sandboxes that are processes of this machine."""

from __future__ import annotations

import ctypes
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping

import pytest

from tesapi.runner.processes import boot_id, start_time
from tesapi.runner.runtimes import bubblewrap as bubblewrap_runtime
from tesapi.runner.runtimes.base import make
from tests.jobs import (
    JobPlace,
    children_of,
    kill_at_start,
    only,
    outcome,
    pid_alive,
    sandboxes,
    script,
    step,
    until,
)

_PTRACE_SEIZE = 0x4206
_WALL = 0x40000000
_KILLS = int(os.environ.get("TESAPI_TEST_SIZE", "20"))
_SEED = int(os.environ.get("TESAPI_TEST_SEED", "1"))


@pytest.fixture
def place(tmp_path: pathlib.Path, bubblewrap: Mapping[str, object]) -> JobPlace:
    return JobPlace(tmp_path, bubblewrap)


def _stdout(events: list[dict[str, object]], index: int = 0) -> str:
    return str(only(events, "executor_ended")[index]["stdout"])


def test_streams_that_go_to_one_file_keep_their_order(place: JobPlace) -> None:
    events = place.run(
        script("echo a; echo b >&2; echo c", stdout="/tmp/both", stderr="/tmp/both"),
        outputs=[{"path": "/tmp/both", "url": place.url("both")}],
    )
    assert outcome(events) == ("complete", None)
    assert place.stored("both") == "a\nb\nc\n"


def test_a_program_that_prints_what_bwrap_prints_is_not_mistaken_for_it(place: JobPlace) -> None:
    events = place.run(script("echo 'bwrap: execvp x: No such file or directory' >&2; exit 5"))
    assert only(events, "executor_ended")[0]["exit_code"] == 5


def test_an_image_that_is_not_mapped_is_refused_with_what_to_set(place: JobPlace) -> None:
    kind, reason = outcome(place.run(step("true", image="quay.io/biocontainers/samtools:1.9")))
    assert kind == "system_error"
    assert "quay.io/biocontainers/samtools:1.9 is not mapped" in str(reason)
    assert "runtime.bubblewrap.images in settings.toml" in str(reason)


@pytest.mark.parametrize("image", ["alpine", "alpine:3.19", "docker.io/library/alpine:latest", "alpine@sha256:00"])
def test_an_image_is_found_by_each_of_its_names(place: JobPlace, image: str) -> None:
    events = place.run(step("true", image=image))
    assert outcome(events) == ("complete", None)
    assert only(events, "executor_started")[0]["image_used"] == f"{image} is this machine's /usr (bubblewrap)"


def test_an_image_may_be_a_directory_with_a_root_file_system(place: JobPlace, tmp_path: pathlib.Path) -> None:
    root = tmp_path / "rootfs"
    for name in ("etc", "data"):
        (root / name).mkdir(parents=True)
    (root / "etc" / "os-release").write_text("NAME=mine\n", "ascii")
    (root / "data" / "file").write_text("of the image\n", "ascii")
    (root / "usr").symlink_to("/nowhere")
    place.runtime = {**place.runtime, "images": [["mine", str(root)], ["*", "host"]]}
    events = place.run(
        script("true", image="mine"),
        script("cat /in/a"),
        inputs=[{"path": "/in/a", "content": "x"}],
    )
    # There is no shell in that directory, and this machine's is not there either.
    assert only(events, "executor_ended")[0]["exit_code"] == 127


def test_a_root_file_system_in_a_directory_is_read_only_with_inputs_beside_it(
    place: JobPlace, tmp_path: pathlib.Path
) -> None:
    root = tmp_path / "rootfs"
    (root / "data").mkdir(parents=True)
    (root / "data" / "file").write_text("of the image\n", "ascii")
    for name in ("usr", "bin", "lib", "lib64"):
        place_of = pathlib.Path("/", name)
        if name == "usr":
            (root / "usr").mkdir()
        elif place_of.is_symlink():
            (root / name).symlink_to(place_of.readlink())
    place.runtime = {**place.runtime, "images": [["mine:*", str(root)]]}
    events = place.run(
        step("/own/true", image="mine:1"),
        inputs=[{"path": "/data/in", "content": "x"}, {"path": "/own/true", "content": "#!/data/missing\n"}],
    )
    assert only(events, "executor_started")[0]["image_used"] == f"mine:1 is the root file system {root} (bubblewrap)"
    assert only(events, "executor_ended")[0]["exit_code"] == 126
    assert sorted(path.name for path in (root / "data").iterdir()) == ["file"]


def test_host_never_means_the_whole_machine(place: JobPlace) -> None:
    events = place.run(
        script(
            "ls -A / | sort | tr '\\n' ' '; cat /etc/shadow ~/.bashrc 2>/dev/null; ls /home 2>/dev/null;"
            "touch /usr/x /etc/x 2>/dev/null && echo writable; exit 0"
        )
    )
    tops = _stdout(events).split()
    assert set(tops) <= {
        "bin",
        "sbin",
        "lib",
        "lib32",
        "lib64",
        "libx32",
        "usr",
        "etc",
        "proc",
        "dev",
        "tmp",
        "var",
        "root",
    }
    assert {"usr", "etc", "tmp"} <= set(tops)


def _inner_and_command(job_id: str) -> tuple[int, int] | None:
    """The first process of a job's sandbox, and the command that runs in it."""
    boxes = sandboxes(job_id)
    found = [(box, child) for box in boxes for child in children_of(box) if child not in boxes]
    return found[0] if len(boxes) == 2 and found else None


def test_the_end_is_not_told_while_a_killed_sandbox_is_still_dying(place: JobPlace) -> None:
    place.write(step("sleep", "1000"))
    with place.start() as runner:
        inner, sleeper = until(lambda: _inner_and_command(place.job_id), "the command")
        # A traced process is gone only when its tracer has seen its end, and its namespace's first one waits for it.
        if ctypes.CDLL(None).ptrace(_PTRACE_SEIZE, sleeper, 0, 0) != 0:
            pytest.skip("needs to be allowed to trace")
        try:
            runner.kill()
            until(lambda: pathlib.Path(f"/proc/{inner}/cmdline").read_bytes() == b"", "the sandbox's last moments")
            time.sleep(0.5)  # nothing to wait for: the end must not come
            assert pid_alive(inner)
            assert only(place.report(), "ended") == []
        finally:
            os.waitpid(sleeper, _WALL)
    place.end()
    assert not pid_alive(inner)


def test_a_sandbox_is_ended_by_its_number_whatever_it_shows_of_itself(place: JobPlace) -> None:
    metadata = place.directory / "metadata"
    metadata.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"]) as hidden, subprocess.Popen(["sleep", "60"]) as another:
        (metadata / "boxes").write_text(
            f"{hidden.pid} {start_time(hidden.pid)} {boot_id()}\n"
            f"{another.pid} {(start_time(another.pid) or 0) + 1} {boot_id()}\n"
            f"{another.pid} {start_time(another.pid)} another-boot\n{another.pid}",
            "ascii",
        )
        make(dict(place.runtime), place.owner, print).remove()
        assert hidden.wait(10) == -9
        assert another.poll() is None
        another.kill()


def test_the_first_process_of_a_sandbox_is_noted_before_the_command_runs(place: JobPlace) -> None:
    place.write(step("sleep", "1000"))
    with place.start() as runner:
        first, _ = until(lambda: _inner_and_command(place.job_id), "the command")
        noted = (place.directory / "metadata" / "boxes").read_text("ascii").split()
        assert noted == [str(first), str(start_time(first)), boot_id()]
        place.cancelled_file.touch()
        runner.communicate(timeout=30)


def test_a_process_that_only_mentions_the_job_is_not_swept(place: JobPlace) -> None:
    marks = ["--hostname", place.job_id]
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen([*command, *marks]) as one, subprocess.Popen([*command, "--", *marks]) as other:
        make(dict(place.runtime), place.owner, print).remove()
        assert (one.poll(), other.poll()) == (None, None)
        one.kill()
        other.kill()


@pytest.mark.soak
@pytest.mark.timeout(60 + 2 * _KILLS)
def test_a_runner_that_is_killed_while_it_makes_a_sandbox_leaves_none(place: JobPlace, tmp_path: pathlib.Path) -> None:
    chance = random.Random(_SEED)
    for number in range(_KILLS):
        killed = place.another(tmp_path / str(number))
        kill_at_start(killed, chance.uniform(0, 0.01))
        assert sandboxes(killed.job_id) == [], f"the kill {number} of seed {_SEED}"


def test_a_child_that_does_not_show_yet_what_it_will_be_is_found_by_its_gate(
    place: JobPlace, tmp_path: pathlib.Path
) -> None:
    """As one that was forked, and has not begun to be bwrap when its runner is killed."""
    place.write(step("true"))
    children = []
    for directory in (place.directory, tmp_path / "another"):
        scratch = directory / "tes" / "exec" / "0"
        scratch.mkdir(parents=True)
        gate = bubblewrap_runtime._gate(str(scratch / "gate"))
        os.dup2(gate, bubblewrap_runtime.GATE_FD)
        children.append(subprocess.Popen(["sleep", "1000"], pass_fds=[bubblewrap_runtime.GATE_FD]))
        for descriptor in (gate, bubblewrap_runtime.GATE_FD):
            os.close(descriptor)
    make(dict(place.runtime), place.owner, lambda text: None).remove()
    with children[0] as its, children[1] as anothers:
        assert (its.wait(timeout=30), anothers.poll()) == (-signal.SIGKILL, None)
        anothers.kill()
