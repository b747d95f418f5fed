"""What containers of root and others leave to a runner that is an ordinary user and may use a Docker engine."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping

import pytest

from tests.engines import DockerEngine, busybox_archive
from tests.jobs import Event, JobPlace, only, outcome, parse, processes_with, script, step, until

NOBODY = 65534
_CLOSE = "mkdir -p /vol/d/e /tmp/t; echo x > /vol/d/e/f; chmod 000 /vol/d/e/f /vol/d/e /vol/d /tmp/t"


@pytest.fixture
def place(docker_engine: DockerEngine) -> Iterator[JobPlace]:
    """A place for jobs of an ordinary user who may use the engine; it is outside of pytest's folder, root's alone."""
    if shutil.which("python3", path="/usr/bin") is None:
        pytest.skip("needs a Python that everybody can read")
    socket = pathlib.Path(docker_engine.socket)
    socket.parent.chmod(0o711)
    os.chown(socket, -1, NOBODY)
    with tempfile.TemporaryDirectory(prefix="tesapi-nobody-") as folder:
        pathlib.Path(folder).chmod(0o755)
        yield JobPlace(pathlib.Path(folder), docker_engine.settings())


@contextlib.contextmanager
def _started(place: JobPlace, *steps: Mapping[str, object], **fields: object) -> Iterator[subprocess.Popen[bytes]]:
    """The place's runner as an ordinary user, who has nothing but the place."""
    place.write(*steps, **fields)
    folder = place.directory.parent.parent
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    with subprocess.Popen(
        place.command("/usr/bin/python3"), stdout=subprocess.PIPE, cwd="/", env={}, user=NOBODY, group=NOBODY,
        extra_groups=[], start_new_session=True,
    ) as runner:  # fmt: skip
        yield runner


def _run(place: JobPlace, *steps: Mapping[str, object], **fields: object) -> list[Event]:
    with _started(place, *steps, **fields) as runner:
        stdout, _ = runner.communicate(timeout=60)
    assert place.remains() == []
    return parse(stdout)


def _begun(place: JobPlace) -> None:
    tails = place.directory / "metadata" / "tails.json"
    until(lambda: tails.exists() and "begun" in tails.read_text("ascii"), "the container")


def _removed_by_its_user(place: JobPlace) -> bool:
    """Whether the runner's user can remove the job's folder, as a service or a Pulsar does."""
    remove = "import shutil, sys; shutil.rmtree(sys.argv[1])"
    subprocess.run(
        ["/usr/bin/python3", "-c", remove, place.directory], user=NOBODY, group=NOBODY, extra_groups=[], check=False
    )
    return not place.directory.exists()


def _containers_made(place: JobPlace, engine: DockerEngine) -> int:
    query = {"since": "0", "until": str(time.time()), "filters": f'{{"label": ["tesapi.job={place.job_id}"]}}'}
    answer = engine.engine.open("GET", "/events", None, query)
    try:
        return answer.read().count(b'"Action":"create"')
    finally:
        answer.close()


def _without_chmod(engine: DockerEngine) -> str:
    """An image that has no chmod: a busybox that goes by no name but those of a shell and three commands."""
    data = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(busybox_archive())) as all_of_it, tarfile.open(fileobj=data, mode="w") as some:
        for member in all_of_it:
            if member.name == "bin/busybox":
                program = all_of_it.extractfile(member)
                for name in ("sh", "mkdir", "true"):
                    member.name = f"bin/{name}"
                    assert program is not None
                    program.seek(0)
                    some.addfile(member, program)
    engine.engine.call("POST", "/images/create", data.getvalue(), [("fromSrc", "-"), ("repo", "without-chmod")])
    return "without-chmod"


def test_what_root_closed_is_stored_and_its_owner_stays(place: JobPlace) -> None:
    events = _run(
        place,
        script("umask 077; echo one > /out/f; mkdir -p /out/d/e; echo two > /out/d/e/g"),
        outputs=[
            {"path": "/out/f", "url": place.url("f")},
            {"path": "/out/d", "url": place.url("d"), "type": "DIRECTORY"},
        ],
    )
    assert outcome(events) == ("complete", None)
    assert (place.stored("f"), place.stored("d/e/g")) == ("one\n", "two\n")
    assert only(events, "note") == []
    assert next((place.directory / "tes" / "files").glob("*/f")).stat().st_uid == 0


def test_what_executors_of_several_users_closed_is_removed(place: JobPlace) -> None:
    other = script("mkdir -p /vol/o/p; touch /vol/o/p/q; chmod 1777 /vol/o/p; chmod 000 /vol/o", image="with-user")
    events = _run(place, script(_CLOSE), other, volumes=["/vol"])
    assert outcome(events) == ("complete", None)
    assert only(events, "note") == []
    assert _removed_by_its_user(place)


def test_a_tidy_job_leaves_nothing(place: JobPlace) -> None:
    assert outcome(_run(place, script(_CLOSE), volumes=["/vol"], tidy=True)) == ("complete", None)
    assert not (place.directory / "tes").exists()


def test_very_many_closed_files_are_opened(place: JobPlace) -> None:
    many = "umask 077; cd /out; mkdir d; for i in $(seq 6000); do echo $i > file-with-a-long-name-$i; done"
    events = _run(
        place,
        script(many),
        outputs=[{"path": "/out/*-[1-6]000", "path_prefix": "/out", "url": place.url("o")}],
    )
    assert outcome(events) == ("complete", None)
    assert len(only(events, "output")) == 6
    assert only(events, "note") == []


def test_what_the_next_executor_finds_is_as_it_was_left(place: JobPlace) -> None:
    events = _run(place, script("umask 077; echo k > /vol/key"), script("stat -c %a:%u /vol/key"), volumes=["/vol"])
    assert only(events, "executor_ended")[1]["stdout"] == "600:0\n"


def test_files_that_were_given_to_another_user_are_opened_too(place: JobPlace) -> None:
    place.runtime = {**place.runtime, "capabilities": ["CHOWN"]}
    give = "mkdir -p /vol/d; touch /vol/d/f; chmod 700 /vol/d; chown -R 4321:99 /vol/d; chown 0 /v; chmod 700 /v"
    events = _run(place, script(give), volumes=["/vol", "/v"])
    assert only(events, "note") == []
    assert _removed_by_its_user(place)


def test_a_failed_and_a_canceled_job_can_be_removed(place: JobPlace) -> None:
    assert outcome(_run(place, script(f"{_CLOSE}; exit 3"), volumes=["/vol"]))[0] == "executor_error"
    assert _removed_by_its_user(place)
    canceled = JobPlace(place.storage.parent, place.runtime)
    with _started(canceled, script(f"{_CLOSE}; echo begun; sleep 1000"), volumes=["/vol"]) as runner:
        _begun(canceled)
        canceled.cancelled_file.touch()
        runner.communicate(timeout=30)
    assert outcome(canceled.report()) == ("canceled", None)
    assert canceled.remains() == []
    assert _removed_by_its_user(canceled)


def test_the_watchdog_opens_what_the_job_of_a_killed_runner_left(place: JobPlace) -> None:
    with _started(place, script(f"{_CLOSE}; echo begun; sleep 1000"), volumes=["/vol"]) as runner:
        _begun(place)
        runner.send_signal(signal.SIGKILL)
        assert "was killed while executor 0 ran" in place.end()["reason"]
    until(lambda: processes_with(str(place.directory)) == [], "the watchdog's end")
    assert place.remains() == []
    assert _removed_by_its_user(place)


def test_an_image_without_chmod_is_told_and_the_outcome_stays(place: JobPlace, docker_engine: DockerEngine) -> None:
    image = _without_chmod(docker_engine)
    events = _run(place, script("umask 077; mkdir /vol/d; echo x > /vol/d/f", image=image), volumes=["/vol"])
    assert outcome(events) == ("complete", None)
    (note,) = only(events, "note")
    assert note["text"] == (
        "The task left files closed to the runner, which may stay on its machine: /vol/d (of user 0); "
        "no image of the task has chmod."
    )


def test_another_image_of_the_task_opens_what_one_without_chmod_left(
    place: JobPlace, docker_engine: DockerEngine
) -> None:
    events = _run(
        place,
        script("umask 077; mkdir /vol/d; echo o > /out/o", image=_without_chmod(docker_engine)),
        step("true", image="with-user"),
        volumes=["/vol"],
        outputs=[{"path": "/out/o", "url": place.url("o")}],
    )
    assert outcome(events) == ("complete", None)
    assert only(events, "note") == []
    assert place.stored("o") == "o\n"
    assert _removed_by_its_user(place)


def test_a_link_out_of_the_task_opens_nothing_there(place: JobPlace) -> None:
    outside = place.storage / "outside"
    outside.write_text("x", "ascii")
    outside.chmod(0o600)
    events = _run(place, script(f"{_CLOSE}; ln -s {outside} /vol/l; ln -s {place.storage} /vol/m"), volumes=["/vol"])
    assert outcome(events) == ("complete", None)
    assert outside.stat().st_mode & 0o777 == 0o600
    assert outside.stat().st_uid == NOBODY
    assert place.storage.stat().st_mode & 0o777 == 0o755


def test_nothing_more_is_run_where_all_is_open(place: JobPlace, docker_engine: DockerEngine) -> None:
    _run(place, script("echo x > /vol/x"), volumes=["/vol"])
    assert _containers_made(place, docker_engine) == 1
    closed = JobPlace(place.storage.parent, place.runtime)
    _run(closed, script(_CLOSE), volumes=["/vol"])
    assert _containers_made(closed, docker_engine) == 2
