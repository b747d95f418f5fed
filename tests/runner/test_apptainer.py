"""How apptainer is called. It is not to be had where this is developed, so it is the words that are tested here.

Where a process is needed, a shell script stands in for the program: it is started, and ended, as apptainer would be.
"""

from __future__ import annotations

import os
import pathlib
import signal
from typing import Any

import pytest

from tesapi.runner.job import Limits, Refused, Step
from tesapi.runner.mounts import Mount
from tesapi.runner.runtimes.apptainer import Apptainer
from tesapi.runner.runtimes.base import Room
from tests.jobs import JobPlace, only, outcome, pid_alive, script, step, until

CONTROLLERS = ["cpu", "memory", "pids"]


@pytest.fixture
def settings(tmp_path: pathlib.Path) -> dict[str, Any]:
    return {
        "kind": "apptainer",
        "program": "/usr/bin/apptainer",
        "options": [],
        "environment": {"HOME": "/home/me"},
        "network": "none",
        "pull": "missing",
        "pids_limit": 100,
        "cache": str(tmp_path / "cache"),
        "image_folders": [],
        "controllers": CONTROLLERS,
    }


@pytest.fixture
def place(tmp_path: pathlib.Path, settings: dict[str, Any]) -> JobPlace:
    return JobPlace(tmp_path, settings)


def _apptainer(place: JobPlace, **other: object) -> Apptainer:
    return Apptainer({**place.runtime, **other}, place.owner, lambda text: None)


def _room(scratch: pathlib.Path, *mounts: Mount, limits: Limits | None = None) -> Room:
    scratch.mkdir(exist_ok=True)
    blank = Limits(None, None, None)
    return Room(mounts, limits or blank, str(scratch), 0, 1, 2, False, (), lambda: None)


def _step(*command: str, env: dict[str, str] | None = None, workdir: str = "") -> Step:
    return Step(0, "alpine:3", list(command), env or {}, workdir, "", "", "", False)


def test_a_command_is_run_in_a_container_that_shares_nothing(place: JobPlace, tmp_path: pathlib.Path) -> None:
    runtime = _apptainer(place)
    scratch = tmp_path / "scratch"
    odd = 'source=/a,b:"c'
    room = _room(scratch, Mount("/job/in", f"/{odd}", False), Mount("/job/vol", "/vol", True))
    argv, environment = runtime.command(_step("sh", "-c", "echo $HOME", env={"A": "x\n$(id)"}, workdir="/work"), room)
    assert argv[argv.index("--mount") :] == [
        *("--mount", 'type=bind,source=/job/in,"destination=/source=/a,b:""c",ro'),
        *("--mount", "type=bind,source=/job/vol,destination=/vol"),
        *("--mount", f"type=bind,source={scratch}/tmp,destination=/tmp"),
        *("--mount", f"type=bind,source={scratch}/var-tmp,destination=/var/tmp"),
        *("--pwd", "/work", runtime.file_of("alpine:3"), "sh", "-c", "echo $HOME"),
    ]
    flags = argv[1 : argv.index("--mount")]
    assert flags[0] == "exec"
    assert {"--containall", "--cleanenv", "--no-home", "--no-eval", "--writable-tmpfs"} <= set(flags)
    assert flags[flags.index("--net") :] == ["--net", "--network", "none", "--pids-limit", "100"]
    assert environment["APPTAINERENV_A"] == "x\n$(id)"
    assert environment["HOME"] == "/home/me"
    assert not any("$(id)" in argument for argument in argv)


def test_singularity_finds_the_environment_under_its_own_names(place: JobPlace, tmp_path: pathlib.Path) -> None:
    runtime = _apptainer(place, program="/opt/singularity")
    _, environment = runtime.command(_step("true", env={"A": "1"}), _room(tmp_path / "scratch"))
    assert environment["SINGULARITYENV_A"] == "1"


@pytest.mark.parametrize("name", ["A B", "A-B", "", "1"])
def test_a_name_that_is_none_for_a_variable_is_refused(place: JobPlace, tmp_path: pathlib.Path, name: str) -> None:
    with pytest.raises(Refused, match="environment variable"):
        _apptainer(place).command(_step("true", env={name: "x"}), _room(tmp_path / "scratch"))


def test_limits_are_set_where_they_may_be_and_told_where_not(place: JobPlace, tmp_path: pathlib.Path) -> None:
    limits = Limits(cpu_cores=1, ram_gb=0.5, disk_gb=None)
    argv, _ = _apptainer(place).command(_step("true"), _room(tmp_path / "a", limits=limits))
    assert argv[argv.index("--cpus") :][:8] == [
        *("--cpus", "1", "--memory", "500000000", "--memory-swap", "500000000", "--pids-limit", "100"),
    ]
    assert _apptainer(place).unenforced(limits) == []
    without = _apptainer(place, controllers=[])
    argv, _ = without.command(_step("true"), _room(tmp_path / "b", limits=limits))
    assert not {"--cpus", "--memory", "--pids-limit"} & set(argv)
    told = without.unenforced(limits)
    assert [sentence.split()[0] for sentence in told] == ["resources.ram_gb", "resources.cpu_cores"]


@pytest.mark.parametrize(
    "image", ["docker-archive:///x", "https://host/x.sif", "docker-daemon://x", "-x", "/etc/x.sif", ""]
)
def test_files_of_this_machine_and_unknown_urls_are_no_images(place: JobPlace, image: str) -> None:
    assert _apptainer(place).unsupported(image) is not None


def test_an_image_may_be_a_file_in_a_folder_for_them(place: JobPlace, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "tool.sif").write_bytes(b"")
    (folder / "out.sif").symlink_to("/etc/passwd")
    runtime = _apptainer(place, image_folders=[str(folder)])
    assert runtime.unsupported(f"{folder}/tool.sif") is None
    assert runtime.file_of(f"{folder}/tool.sif") == f"{folder}/tool.sif"
    for bad in ("none.sif", "out.sif", "../x.sif", "tool.img"):
        assert runtime.unsupported(f"{folder}/{bad}") is not None


@pytest.mark.parametrize("image", ["alpine", "quay.io/a/b:1", "docker://alpine", "oras://host/x:1", "library://a/b"])
def test_an_image_is_taken_from_where_it_is_said_to_be(place: JobPlace, image: str) -> None:
    assert _apptainer(place).unsupported(image) is None


def test_one_image_by_two_names_is_one_file(place: JobPlace) -> None:
    runtime = _apptainer(place)
    assert runtime.file_of("alpine:3") == runtime.file_of("docker://alpine:3")
    assert runtime.file_of("alpine:3") != runtime.file_of("alpine:4")


def test_a_missing_program_is_one_sentence(place: JobPlace) -> None:
    place.runtime = {**place.runtime, "program": "/no/apptainer"}
    sentence = "/no/apptainer cannot be started: No such file or directory."
    assert outcome(place.run(step("true"))) == ("system_error", sentence)


def test_an_image_is_pulled_once_and_what_a_container_leaves_is_ended(place: JobPlace, tmp_path: pathlib.Path) -> None:
    place.runtime = {**place.runtime, "program": _stand_in(tmp_path)}
    left = tmp_path / "left"
    pulls = tmp_path / "pulls"
    events = place.run(script(f"sleep 600 & echo $! > {left}; exit 3", ignore_error=True), script("exit 0"))
    assert outcome(events) == ("complete", None)
    assert [event["exit_code"] for event in only(events, "executor_ended")] == [3, 0]
    assert not pid_alive(int(left.read_text("ascii")))
    assert pulls.read_text("ascii") == "docker://alpine\n"


def test_what_a_killed_runner_leaves_is_ended(place: JobPlace, tmp_path: pathlib.Path) -> None:
    place.runtime = {**place.runtime, "program": _stand_in(tmp_path)}
    left = tmp_path / "left"
    place.write(script(f"sleep 600 & echo $! > {left}.new; mv {left}.new {left}; wait"))
    with place.start() as runner:
        until(left.exists, "the command")
        os.kill(runner.pid, signal.SIGKILL)
        runner.communicate(timeout=30)
    assert place.end()["outcome"] == "system_error"
    assert not pid_alive(int(left.read_text("ascii")))


@pytest.mark.parametrize(
    ("said", "code", "kind"),
    [
        ('FATAL:   "tool": executable file not found in $PATH', 127, "executor_error"),
        ("FATAL:   stat tool: no such file or directory", 127, "executor_error"),
        ("FATAL:   exec tool failed: permission denied", 126, "executor_error"),
        ("FATAL:   container creation failed: no space", 255, "system_error"),
        ("the command's own words", 255, "executor_error"),
    ],
)
def test_its_own_failures_are_told_from_those_of_the_command(
    place: JobPlace, tmp_path: pathlib.Path, said: str, code: int, kind: str
) -> None:
    place.runtime = {**place.runtime, "program": _stand_in(tmp_path, f"cat >&2 <<'END'\n{said}\nEND\nexit 255")}
    events = place.run(step("tool"))
    assert only(events, "executor_ended")[0]["exit_code"] == code
    assert outcome(events)[0] == kind


def _stand_in(folder: pathlib.Path, instead: str = "") -> str:
    """A program that takes `pull --force FILE URL`, and runs whatever follows the image of `exec` where it is."""
    program = folder / "apptainer"
    program.write_text(
        f"""#!/bin/sh
if [ "$1" = pull ]; then echo "$4" >> {folder}/pulls; : > "$3"; exit; fi
{instead}
while [ "${{1%.sif}}" = "$1" ]; do shift; done
shift
exec "$@"
""",
        "utf-8",
    )
    program.chmod(0o755)
    return str(program)
