"""What a sandbox of bubblewrap may use, and who says so where nobody can hold it to that."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping

import pytest

from tesapi.runner.job import Limits
from tesapi.runner.runtimes import cgroups
from tests.conftest import RUNTIMES, Way, missing
from tests.jobs import JobPlace, Place, only, outcome, parse, script, step, until

NOBODY = 65534


@pytest.fixture(params=[name for name in RUNTIMES if name.startswith("bubblewrap")])
def place(request: pytest.FixtureRequest, tmp_path: pathlib.Path, bubblewrap: Mapping[str, object]) -> Iterator[Place]:
    lacking = set(cgroups.CONTROLLERS) - set(cgroups.places())
    if lacking and os.getuid() != 0:
        pytest.skip("needs root, or a delegated cgroup")
    if lacking:
        missing(f"needs cgroups for {', '.join(sorted(lacking))}")
    pulsar = request.getfixturevalue("pulsar_of_places") if request.param == "bubblewrap-pulsar" else None
    with Way({**bubblewrap, "pids_limit": 40}, pulsar).place(tmp_path) as place:
        yield place


@pytest.fixture
def nobodys(bubblewrap: Mapping[str, object]) -> Iterator[JobPlace]:
    """A place that belongs to an ordinary user, outside of pytest's folder, which is root's alone."""
    if os.getuid() != 0 or shutil.which("python3", path="/usr/bin") is None:
        pytest.skip("needs root, to be somebody else, and a Python that everybody can read")
    with tempfile.TemporaryDirectory(prefix="tesapi-nobody-") as folder:
        pathlib.Path(folder).chmod(0o755)
        program = shutil.which("bwrap", path="/usr/bin") or bubblewrap["program"]
        yield JobPlace(pathlib.Path(folder), {**bubblewrap, "program": program, "pids_limit": 40})


def _groups(place: Place) -> list[str]:
    return [group.directory for group in cgroups.places().values() if _group(group, place).exists()]


def _group(group: cgroups.Place, place: Place) -> pathlib.Path:
    return pathlib.Path(group.directory, f"tesapi-{place.job_id}")


def _run_as_nobody(place: JobPlace, *steps: Mapping[str, object], **fields: object) -> list[dict[str, object]]:
    place.write(*steps, **fields)
    folder = place.directory.parent.parent
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    run = subprocess.run(
        place.command("/usr/bin/python3"), capture_output=True, cwd="/", env={}, user=NOBODY, group=NOBODY,
        extra_groups=[], timeout=60, check=True,
    )  # fmt: skip
    return parse(run.stdout)


def test_a_step_that_uses_up_its_memory_is_killed_and_told_why(place: Place) -> None:
    events = place.run(script("x=$(yes | head -c 100000000)"), limits={"ram_gb": 0.02})
    sentence = "it ran out of memory; the limit of 0.02 GB (resources.ram_gb) was used up."
    assert outcome(events) == ("executor_error", f"Executor 0 ended with exit code 137: {sentence}")
    assert _groups(place) == []


def test_a_killed_child_is_told_though_its_parent_goes_on(place: Place) -> None:
    hungry = 'sh -c "x=\\$(yes | head -c 100000000)"; exit 0'
    events = place.run(script(hungry), script("true"), limits={"ram_gb": 0.02})
    assert outcome(events) == ("complete", None)
    notes = [event["text"] for event in only(events, "note")]
    sentence = "a process of it ran out of memory; the limit of 0.02 GB (resources.ram_gb) was used up."
    assert notes == [f"Executor 0: {sentence}"]


def test_what_fits_its_limits_does_not_feel_them(place: Place) -> None:
    events = place.run(script("x=$(yes | head -c 1000000); nproc >&2"), limits={"ram_gb": 0.5, "cpu_cores": 1})
    assert outcome(events) == ("complete", None)
    assert only(events, "note") == []


@pytest.mark.skipif(os.cpu_count() == 1, reason="needs more cores than a task asks for")
def test_all_cores_together_give_no_more_than_was_asked_for(place: Place) -> None:
    place.write(script("yes > /dev/null & yes > /dev/null & wait"), limits={"cpu_cores": 1})
    with place.start() as runner:
        until(lambda: _throttled(place), "the kernel's hand")
        place.cancel()
        runner.communicate(timeout=30)
    assert outcome(place.report()) == ("canceled", None)
    assert _groups(place) == []


def _throttled(place: Place) -> bool:
    try:
        text = (_group(cgroups.places()["cpu"], place) / "cpu.stat").read_text("ascii")
    except OSError:
        return False
    return int(dict(line.split() for line in text.splitlines())["nr_throttled"]) > 0


def test_a_fork_bomb_ends_at_the_limit(place: Place) -> None:
    events = place.run(script("bomb() { bomb | bomb & bomb; }; bomb"))
    assert outcome(events)[0] == "executor_error"
    assert "Cannot fork" in only(events, "executor_ended")[0]["stderr"]
    assert _groups(place) == []


def test_a_killed_runner_leaves_no_cgroup(place: Place) -> None:
    place.write(step("sleep", "600"))
    with place.start() as runner:
        until(lambda: _groups(place), "the cgroups")
        os.kill(runner.pid, signal.SIGKILL)
        runner.communicate(timeout=30)
    assert place.end()["outcome"] == "system_error"
    assert _groups(place) == []


def test_a_fork_bomb_of_an_ordinary_user_ends_at_the_limit(nobodys: JobPlace) -> None:
    events = _run_as_nobody(nobodys, script("bomb() { bomb | bomb & bomb; }; bomb"))
    assert outcome(events)[0] == "executor_error"
    assert "Cannot fork" in only(events, "executor_ended")[0]["stderr"]


def test_a_limit_that_an_ordinary_user_cannot_set_is_told(nobodys: JobPlace) -> None:
    events = _run_as_nobody(nobodys, step("true"), limits={"ram_gb": 1, "cpu_cores": 1, "disk_gb": 1})
    assert outcome(events) == ("complete", None)
    told = [str(event["text"]) for event in only(events, "note")]
    assert [text.split(" is not enforced here: ")[0] for text in told] == [
        *("resources.ram_gb", "resources.cpu_cores", "resources.disk_gb"),
    ]


def test_in_version_2_a_group_lies_beside_that_of_the_runner(tmp_path: pathlib.Path) -> None:
    root = _unified(tmp_path, "slice/own", {"slice": "memory pids io", "slice/own": ""})
    found = cgroups.places(f"30 1 0:9 / {root} rw - cgroup2 cgroup rw", "0::/slice/own\n")
    assert found == {name: cgroups.Place(f"{root}/slice", 2) for name in ("memory", "pids")}


def test_in_version_2_the_root_of_a_namespace_may_hold_groups_itself(tmp_path: pathlib.Path) -> None:
    root = _unified(tmp_path, ".", {".": "cpu memory pids"})
    found = cgroups.places(f"30 1 0:9 /docker/x {root} rw - cgroup2 cgroup rw", "0::/docker/x\n")
    assert set(found) == {"cpu", "memory", "pids"}
    assert {place.directory for place in found.values()} == {str(root)}


def test_the_files_of_version_2_are_written(tmp_path: pathlib.Path) -> None:
    group = tmp_path / "job"
    group.mkdir()
    for name in ("memory.max", "memory.swap.max", "cpu.max", "pids.max", "cgroup.procs"):
        (group / name).write_text("", "ascii")
    (group / "memory.events").write_text("low 0\noom 1\noom_kill 0\n", "ascii")
    made = cgroups.Group({name: cgroups.Place(str(tmp_path), 2) for name in cgroups.CONTROLLERS}, "job")
    assert made.directories == [str(group)]
    made.make(Limits(cpu_cores=2, ram_gb=0.5, disk_gb=None), 100)
    made.add(7)
    assert {name: (group / name).read_text("ascii") for name in ("memory.max", "memory.swap.max", "pids.max")} == {
        "memory.max": "500000000",
        "memory.swap.max": "0",
        "pids.max": "100",
    }
    assert (group / "cpu.max").read_text("ascii") == "200000 100000"
    assert not made.ran_out_of_memory()
    (group / "memory.events").write_text("low 0\noom 1\noom_kill 2\n", "ascii")
    assert made.ran_out_of_memory()


def _unified(folder: pathlib.Path, own: str, enabled: Mapping[str, str]) -> pathlib.Path:
    root = folder / "cgroup"
    (root / own).mkdir(parents=True)
    for path, controllers in enabled.items():
        (root / path / "cgroup.subtree_control").write_text(controllers + "\n", "ascii")
        (root / path / "cgroup.procs").write_text("", "ascii")
    return root
