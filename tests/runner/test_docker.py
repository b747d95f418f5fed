"""What only an engine does: containers that outlive their runners, images that are pulled, limits, and an engine that
dies itself."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from tests.conftest import missing
from tests.engines import DockerEngine
from tests.jobs import JobPlace, kill_at_start, only, outcome, parse, pid_alive, processes_with, script, step, until

_KILLS = int(os.environ.get("TESAPI_TEST_SIZE", "20"))
_SEED = int(os.environ.get("TESAPI_TEST_SEED", "1"))


@pytest.fixture
def place(tmp_path: pathlib.Path, docker_engine: DockerEngine) -> JobPlace:
    return JobPlace(tmp_path, docker_engine.settings())


def _stdout(events: list[dict[str, object]], index: int = 0) -> str:
    return str(only(events, "executor_ended")[index]["stdout"])


def _another(place: JobPlace, **settings: object) -> JobPlace:
    """A job beside `place`."""
    return JobPlace(place.storage.parent, {**place.runtime, **settings})


@contextlib.contextmanager
def _running(place: JobPlace) -> Iterator[subprocess.Popen[bytes]]:
    """A runner whose container says that it runs."""
    with place.start() as runner:
        tails = place.directory / "metadata" / "tails.json"
        until(lambda: tails.exists() and "begun" in tails.read_text("ascii"), "the container")
        yield runner


def _kill_with_watchdog(place: JobPlace) -> None:
    """Start the job, and end all of its own processes at once, as a cgroup does."""
    with _running(place) as runner:
        all_of_it = processes_with(str(place.directory))
        assert len(all_of_it) == 2
        for pid in all_of_it:
            os.kill(pid, signal.SIGKILL)
        runner.communicate(timeout=30)
    until(lambda: not any(pid_alive(pid) for pid in all_of_it), "their end")


# Orphans.


@pytest.mark.soak
@pytest.mark.timeout(60 + 5 * _KILLS)
def test_a_runner_that_is_killed_while_its_container_is_made_leaves_none(place: JobPlace) -> None:
    chance = random.Random(_SEED)
    for number in range(_KILLS):
        killed = _another(place)
        kill_at_start(killed, chance.uniform(0, 0.15))
        for _ in range(10):  # the engine may be making one still
            assert killed.remains() == [], f"the kill {number} of seed {_SEED}"
            time.sleep(0.02)


def test_the_next_runner_removes_what_a_runner_killed_with_its_watchdog_left(place: JobPlace) -> None:
    place.write(script("echo begun; sleep 1000"))
    _kill_with_watchdog(place)
    assert place.remains()
    assert outcome(_another(place).run(step("true"))) == ("complete", None)
    assert place.remains() == []
    assert "was killed while executor 0 ran" in place.end()["reason"]
    assert only(place.report(), "executor_ended")[0]["stdout"] == "begun\n"


def test_a_container_whose_job_was_discarded_is_removed(place: JobPlace) -> None:
    place.write(script("echo begun; sleep 1000"))
    _kill_with_watchdog(place)
    shutil.rmtree(place.directory)
    assert outcome(_another(place).run(step("true"))) == ("complete", None)
    assert place.remains() == []


def test_a_container_that_somebody_looks_after_stays(place: JobPlace) -> None:
    place.write(script("echo begun; sleep 1000"))
    with _running(place) as runner:
        assert outcome(_another(place).run(step("true"))) == ("complete", None)
        assert len(place.remains()) == 1
        place.cancelled_file.touch()
        runner.communicate(timeout=30)
    assert outcome(place.report()) == ("canceled", None)
    assert place.remains() == []


def test_containers_of_another_store_or_another_place_stay(place: JobPlace, tmp_path: pathlib.Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    elsewhere = JobPlace(tmp_path / "elsewhere", place.runtime)
    for other, fields in ((place, {"store_id": "another-store"}), (elsewhere, {})):
        other.write(script("echo begun; sleep 1000"), **fields)
        _kill_with_watchdog(other)
    assert outcome(_another(place).run(step("true"))) == ("complete", None)
    for other in (place, elsewhere):
        assert len(other.remains()) == 1
        command = other.command()
        subprocess.run([*command[:4], "--sweep", *command[4:]], stdout=subprocess.DEVNULL, timeout=30, check=True)
        assert other.remains() == []
        assert "was killed while executor 0 ran" in other.end()["reason"]


def test_a_container_tells_whose_it_is(place: JobPlace, docker_engine: DockerEngine) -> None:
    place.write(script("echo begun; sleep 1000"))
    with _running(place) as runner:
        found = docker_engine.engine.call("GET", f"/containers/tesapi-{place.job_id}-0/json")["Config"]["Labels"]
        assert (found["tesapi.store"], found["tesapi.task"]) == ("a-store", f"task-of-{place.job_id}")
        assert (found["tesapi.job"], found["tesapi.lock"]) == (place.job_id, f"{place.directory}/metadata/lock")
        place.cancelled_file.touch()
        runner.communicate(timeout=30)


# An engine that dies, and what others do to its containers.


@pytest.fixture
def restarted(docker_engine: DockerEngine) -> Iterator[DockerEngine]:
    """The engine; it is there again after the test."""
    yield docker_engine
    docker_engine.kill()
    docker_engine.start()


def test_an_engine_that_was_killed_and_restarted_costs_no_task(place: JobPlace, restarted: DockerEngine) -> None:
    place.write(script("echo begun; while ! test -e /vol/go; do sleep 0.1; done; echo done; exit 3"), volumes=["/vol"])
    with _running(place) as runner:
        restarted.kill()
        until(lambda: "does not answer" in str(place.report()), "the note")
        restarted.start()
        until(lambda: "was restarted" in str(place.report()), "the note")
        (place.directory / "tes" / "files" / "0" / "go").touch()
        runner.communicate(timeout=30)
    assert outcome(place.report()) == ("executor_error", "Executor 0 ended with exit code 3.")
    assert "begun\n" in _stdout(place.report())
    assert place.remains() == []


def test_a_container_that_ended_while_its_engine_was_away_is_told_as_it_ended(
    place: JobPlace, restarted: DockerEngine
) -> None:
    place.write(
        script(f"echo begun; while ! test -e /vol/go; do sleep 0.1; done; : {place.job_id}; exit 4"), volumes=["/vol"]
    )
    with _running(place) as runner:
        restarted.kill()
        (place.directory / "tes" / "files" / "0" / "go").touch()
        until(lambda: processes_with(f": {place.job_id}") == [], "the command's end")
        restarted.start()
        runner.communicate(timeout=30)
    assert outcome(place.report()) == ("executor_error", "Executor 0 ended with exit code 4.")


def test_a_job_that_finds_no_engine_waits_for_it(place: JobPlace, restarted: DockerEngine) -> None:
    restarted.kill()
    place.write(step("true"))
    with place.start() as runner:
        until(lambda: "Waiting for it." in str(place.report()), "the note")
        restarted.start()
        runner.communicate(timeout=60)
    assert outcome(place.report()) == ("complete", None)


def test_a_cancel_while_the_engine_is_away_is_canceling_until_the_container_is_seen_gone(
    place: JobPlace, restarted: DockerEngine
) -> None:
    place.write(script("echo begun; sleep 1000"))
    with _running(place) as runner:
        restarted.kill()
        place.cancelled_file.touch()
        until(lambda: "to see the job's containers gone" in str(place.report()), "the note")
        assert only(place.report(), "ended") == []
        restarted.start()
        runner.communicate(timeout=60)
    assert outcome(place.report()) == ("canceled", None)
    assert place.remains() == []


def test_a_container_that_somebody_removed_is_told(place: JobPlace, docker_engine: DockerEngine) -> None:
    place.write(script("echo begun; sleep 1000"))
    with _running(place) as runner:
        docker_engine.engine.call("DELETE", f"/containers/tesapi-{place.job_id}-0", None, {"force": "1"})
        runner.communicate(timeout=60)
    kind, reason = outcome(place.report())
    assert kind == "system_error"
    assert str(reason).startswith("The container of executor 0 is gone: ")


# Images, users, limits.


def test_an_entrypoint_of_the_image_is_not_in_the_way(place: JobPlace) -> None:
    events = place.run(step("echo", "mine", image="with-entrypoint"))
    assert _stdout(events) == "mine\n"


def test_an_image_whose_user_is_not_root_reads_inputs_and_writes_outputs(place: JobPlace) -> None:
    (place.storage / "closed").write_text("read", "ascii")
    (place.storage / "closed").chmod(0o600)
    (place.storage / "folder").mkdir(mode=0o700)
    (place.storage / "folder" / "b").write_text("b", "ascii")
    events = place.run(
        script("id -u; cat /in/a /in/d/b; echo more >> /both/x; echo o > /out/deep/o; echo t > /tmp/t; echo v > /v/v"),
        inputs=[
            {"path": "/in/a", "url": place.url("closed")},
            {"path": "/in/d", "url": place.url("folder"), "type": "DIRECTORY"},
            {"path": "/both/x", "content": "x"},
        ],
        outputs=[{"path": "/out/deep/o", "url": place.url("o")}, {"path": "/both/x", "url": place.url("x")}],
        volumes=["/v"],
    )
    assert only(events, "executor_ended")[0]["stderr"] == ""
    place_with_user = _another(place)
    assert outcome(events) == ("complete", None)
    events = place_with_user.run(
        script("id -u; cat /in/a; echo o > /out/o; echo t > /tmp/t", image="with-user"),
        inputs=[{"path": "/in/a", "url": place.url("closed")}],
        outputs=[{"path": "/out/o", "url": place.url("o2")}],
    )
    assert outcome(events) == ("complete", None)
    assert _stdout(events) == "1234\nread"
    assert place.stored("o2") == "o\n"


def test_the_operator_may_choose_the_user_and_capabilities(place: JobPlace) -> None:
    place.runtime = {**place.runtime, "user": "4321:99", "capabilities": ["CHOWN"]}
    text = _stdout(place.run(script("id -u; id -g; grep CapBnd /proc/self/status")))
    assert text == "4321\n99\nCapBnd:\t0000000000000001\n"


def test_a_network_is_there_or_not(place: JobPlace) -> None:
    assert _stdout(place.run(script("ls /sys/class/net"))).split() == ["lo"]
    assert "eth0" in _stdout(_another(place, network="default").run(script("ls /sys/class/net")))
    before = _interfaces()
    host = set(_stdout(_another(place, network="host").run(script("ls /sys/class/net"))).split())
    after = _interfaces()  # other tests' containers come and go
    assert before & after <= host <= before | after
    assert host > {"lo"}


def _interfaces() -> set[str]:
    return {path.name for path in pathlib.Path("/sys/class/net").iterdir()}


def test_limits_are_what_the_task_asked_for(place: JobPlace) -> None:
    events = place.run(
        script(
            "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null;"
            "cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu.max 2>/dev/null; true"
        ),
        limits={"cpu_cores": 1, "ram_gb": 0.1, "disk_gb": 10},
    )
    memory, cpu = _stdout(events).splitlines()
    assert int(memory) == pytest.approx(100e6, abs=8192)
    assert cpu.split()[0] == "100000"
    assert [note["text"] for note in only(events, "note")] == [
        "resources.disk_gb is not enforced here: Docker cannot limit a container's disk."
    ]


def test_running_out_of_memory_is_told_as_such(place: JobPlace) -> None:
    events = place.run(script("exec tail < /dev/zero"), limits={"ram_gb": 0.05})
    kind, reason = outcome(events)
    assert kind == "executor_error"
    assert reason == (
        "Executor 0 ended with exit code 137: "
        "it ran out of memory; the limit of 0.05 GB (resources.ram_gb) was used up."
    )


def test_a_child_that_ran_out_of_memory_is_noted(place: JobPlace) -> None:
    events = _another(place).run(script("tail < /dev/zero; exit 0"), limits={"ram_gb": 0.05})
    assert outcome(events) == ("complete", None)
    assert "a process of it ran out of memory" in only(events, "note")[0]["text"]


def test_a_container_that_forks_without_end_is_held_by_its_limit(place: JobPlace) -> None:
    place.runtime = {**place.runtime, "pids_limit": 32}
    place.write(script("echo begun; f() { f | f & }; f; exec sleep 1000"))  # which needs no further process
    with _running(place) as runner:
        place.cancelled_file.touch()
        runner.communicate(timeout=60)
    assert outcome(place.report()) == ("canceled", None)
    assert place.remains() == []


@pytest.mark.parametrize("image", ["", "-it", "--privileged", "a b", "a\nb", "UPPER", "a//b", "../x", "x:y:z"])
def test_a_name_that_is_no_image_is_told(place: JobPlace, image: str) -> None:
    kind, reason = outcome(place.run(step("true", image=image)))
    assert kind == "system_error"
    assert repr(image) in str(reason) or f"The image {image} " in str(reason)


# Pulling.


class Registry:
    """A registry of the tests' own, at `host`; `log` has its requests."""

    def __init__(self, folder: pathlib.Path, *, users: str = "") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.host = f"127.0.0.1:{free.getsockname()[1]}"
        auth = f"auth:\n  htpasswd:\n    realm: tests\n    path: {folder}/users\n" if users else ""
        (folder / "users").write_text(users, "ascii")
        (folder / "config.yml").write_text(
            f"version: 0.1\nhttp:\n  addr: {self.host}\nstorage:\n  filesystem:\n    rootdirectory: {folder}/data\n"
            + auth,
            "ascii",
        )
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Registry:
        with (self._folder / "log").open("wb") as log:
            command = ["docker-registry", "serve", str(self._folder / "config.yml")]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until(self._answers, "the registry")
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def push(self, engine: DockerEngine, name: str, credentials: str = "e30=") -> str:
        """Push the engine's alpine as `name`, and remove it there; the image's full name."""
        image = f"{self.host}/{name}"
        engine.engine.call("POST", "/images/alpine/tag", b"", {"repo": image, "tag": "latest"})
        pushed = engine.engine.open(
            "POST", f"/images/{image}/push", b"", {"tag": "latest"}, {"X-Registry-Auth": credentials}
        )
        assert b"errorDetail" not in pushed.read()
        pushed.close()
        engine.engine.call("DELETE", f"/images/{image}")
        return image

    def _answers(self) -> bool:
        host, _, port = self.host.partition(":")
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) == 0


@pytest.fixture
def registry_folder(tmp_path: pathlib.Path) -> pathlib.Path:
    if shutil.which("docker-registry") is None:
        missing("needs a registry (apt-get install docker-registry)")
    folder = tmp_path / "registry"
    folder.mkdir()
    return folder


def test_an_image_is_pulled_once_and_its_digest_is_told(
    place: JobPlace, docker_engine: DockerEngine, registry_folder: pathlib.Path
) -> None:
    with Registry(registry_folder) as registry:
        image = registry.push(docker_engine, "one/two")
        jobs = [_another(place, pull="missing") for _ in range(3)]
        for job in jobs:
            job.write(step("true", image=image))
        runners = [job.start() for job in jobs]
        for runner in runners:
            runner.communicate(timeout=60)
        for job in jobs:
            assert outcome(job.report()) == ("complete", None)
            used = only(job.report(), "executor_started")[0]["image_used"]
            assert used.startswith(f"{image} (sha256:")
        log = (registry_folder / "log").read_text("utf-8")
        assert log.count("GET /v2/one/two/blobs") <= 2  # the configuration and the one layer
        again = _another(place, pull="always").run(step("true", image=image))
        assert outcome(again) == ("complete", None)


def test_a_private_image_is_pulled_with_what_docker_login_left(
    place: JobPlace, docker_engine: DockerEngine, registry_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    # The password is "secret", hashed by bcrypt.
    users = "me:$2b$05$nu4kWZ69r15oaOYki9/T5u327oW8/QG/0Hi.BK3wxmdoFkQOvnRni\n"
    with Registry(registry_folder, users=users) as registry:
        account = {"username": "me", "password": "secret", "serveraddress": registry.host}
        image = registry.push(docker_engine, "mine", base64.urlsafe_b64encode(json.dumps(account).encode()).decode())
        kind, reason = outcome(_another(place, pull="missing").run(step("true", image=image)))
        assert kind == "system_error"
        assert str(reason).startswith(f"The image {image} cannot be pulled: ")
        config = tmp_path / "config.json"
        login = base64.b64encode(b"me:secret").decode()
        config.write_text(json.dumps({"auths": {registry.host: {"auth": login}}}), "ascii")
        events = _another(place, pull="missing", config=str(config)).run(step("true", image=image))
        assert outcome(events) == ("complete", None)
        docker_engine.engine.call("DELETE", f"/images/{image}")


def test_an_image_that_nobody_has_is_told_before_anything_is_staged(
    place: JobPlace, registry_folder: pathlib.Path
) -> None:
    with Registry(registry_folder) as registry:
        image = f"{registry.host}/none:1"
        job = _another(place, pull="missing")
        kind, reason = outcome(job.run(step("true", image=image), inputs=[{"path": "/in", "url": place.url("none")}]))
        assert kind == "system_error"
        assert str(reason).startswith(f"The image {image} cannot be pulled: manifest for {image} not found")


@contextlib.contextmanager
def _silent_registry() -> Iterator[str]:
    """Something that takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def hold() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(server.accept()[0])

        thread = threading.Thread(target=hold)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in held:
            connection.close()


def test_a_job_is_canceled_while_it_pulls(place: JobPlace) -> None:
    with _silent_registry() as host:
        job = _another(place, pull="missing")
        job.write(step("true", image=f"{host}/x"))
        with job.start() as runner:
            until(lambda: only(job.report(), "started"), "the start")
            job.cancelled_file.touch()
            stdout, _ = runner.communicate(timeout=20)
        assert outcome(parse(stdout)) == ("canceled", None)
