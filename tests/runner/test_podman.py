"""What is podman's own: everything else is asked of all runtimes alike."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
from typing import Any

import pytest

from tesapi.runner.job import Limits
from tesapi.runner.runtimes.podman import Podman, full_name
from tests.conftest import missing
from tests.jobs import JobPlace, only, outcome, pid_alive, processes_with, script, step, until
from tests.podman import import_busybox
from tests.podman import podman as call
from tests.runner.test_docker import Registry


@pytest.fixture
def settings(podman: dict[str, Any]) -> dict[str, Any]:
    return podman


@pytest.fixture
def place(tmp_path: pathlib.Path, settings: dict[str, Any]) -> JobPlace:
    return JobPlace(tmp_path, settings)


def _stdout(events: list[dict[str, Any]], index: int = 0) -> str:
    return str(only(events, "executor_ended")[index]["stdout"])


def _containers(settings: dict[str, Any]) -> list[str]:
    return call(settings, "ps", "--all", "--format", "{{.Names}}").split()


def _running(settings: dict[str, Any]) -> list[str]:
    return call(settings, "ps", "--format", "{{.Names}}").split()


@pytest.mark.parametrize(
    "value", ["two\nlines\r\n", ' blank "quoted" ', "'quoted'", "#x", "a=b", "", "$HOME\\n*", "ü", "x" * 100_000]
)
def test_a_value_of_the_environment_arrives_as_it_is(place: JobPlace, value: str) -> None:
    events = place.run(
        script('printf %s "$ODD" > /out/value; printf %s "$PLAIN"', env={"ODD": value, "PLAIN": "p"}),
        outputs=[{"path": "/out/value", "url": place.url("value")}],
    )
    assert outcome(events) == ("complete", None)
    assert (place.storage / "value").read_bytes() == value.encode()
    assert _stdout(events) == "p"


def test_no_value_of_the_environment_stands_on_a_command_line(place: JobPlace, settings: dict[str, Any]) -> None:
    place.write(step("sleep", "60", env={"TOKEN": "very-secret-value", "KEY": "very-secret-value\nof two lines"}))
    with place.start() as runner:
        until(lambda: _running(settings), "the container")
        assert processes_with("very-secret-value") == []
        place.cancelled_file.touch()
        runner.communicate(timeout=30)
    assert outcome(place.report()) == ("canceled", None)
    assert _containers(settings) == []


@pytest.mark.parametrize("name", ["LD_PRELOAD", "PATH", "CONTAINERS_CONF"])
def test_what_podman_itself_heeds_is_set_inside_or_refused_but_never_set_for_podman(place: JobPlace, name: str) -> None:
    events = place.run(step("true", env={name: "/nowhere\n/at/all"}))
    kind, reason = outcome(events)
    assert kind == "system_error"
    assert name in str(reason)
    assert only(events, "executor_started") == []


def test_a_library_to_preload_is_only_preloaded_inside(place: JobPlace) -> None:
    events = place.run(
        script('echo "$LD_PRELOAD $CONTAINERS_CONF"', env={"LD_PRELOAD": "/x.so", "CONTAINERS_CONF": "y"})
    )
    assert _stdout(events) == "/x.so y\n"


def test_the_entrypoint_of_the_image_is_never_in_the_way(
    place: JobPlace, settings: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    import_busybox(settings, "entry:1", 'ENTRYPOINT ["/bin/false"]', 'CMD ["x"]', "WORKDIR /var")
    events = place.run(step("echo", "said", image="entry:1"), step("pwd", image="entry:1"))
    assert outcome(events) == ("complete", None)
    assert (_stdout(events, 0), _stdout(events, 1)) == ("said\n", "/var\n")


def test_the_path_of_a_file_may_hold_what_divides_the_fields_of_an_option(place: JobPlace) -> None:
    odd = '/in/a,b="c",target=/etc\nd,readonly'
    events = place.run(step("cat", odd), inputs=[{"path": odd, "content": "there"}])
    assert outcome(events) == ("complete", None)
    assert _stdout(events) == "there"


def test_no_byte_of_standard_input_detaches_from_a_container(place: JobPlace) -> None:
    events = place.run(step("cat", stdin="/in"), inputs=[{"path": "/in", "content": "a\x10\x11b"}])
    assert outcome(events) == ("complete", None)
    assert _stdout(events) == "a\x10\x11b"


def test_files_directly_below_the_root_go_in_and_out(place: JobPlace) -> None:
    events = place.run(
        script("cat /in >> /out; mkdir /folder; echo k > /folder/k; ln -s /folder/k /link; ln -s /nowhere /lost"),
        script("cat /out"),
        inputs=[{"path": "/in", "content": "in\n"}],
        outputs=[
            {"path": "/out", "url": place.url("out")},
            {"path": "/folder", "url": place.url("folder"), "type": "DIRECTORY"},
            {"path": "/link", "url": place.url("link")},
        ],
    )
    assert outcome(events) == ("complete", None)
    assert _stdout(events, 1) == "in\n"
    assert [place.stored(name) for name in ("out", "folder/k", "link")] == ["in\n", "k\n", "k\n"]


def test_a_link_to_nothing_is_told_and_harms_no_other_output(place: JobPlace) -> None:
    events = place.run(
        script("ln -s /nowhere /lost; echo there > /kept"),
        outputs=[{"path": "/lost", "url": place.url("lost")}, {"path": "/kept", "url": place.url("kept")}],
    )
    assert outcome(events)[0] == "system_error"
    assert "/lost" in only(events, "note")[0]["text"]
    assert place.stored("kept") == "there\n"


@pytest.mark.parametrize("workdir", ["/made/deep", "/usr/lib", "/vol/deep", "/vol", "/tmp", "/"])
def test_a_working_directory_is_made_where_it_is_missing(place: JobPlace, workdir: str) -> None:
    events = place.run(script("pwd; ls -ld /tmp /usr | cut -c1-10", workdir=workdir), volumes=["/vol"])
    assert _stdout(events) == f"{workdir}\ndrwxrwxrwt\ndrwxr-xr-x\n"


@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize(
    ("program", "code"), [("no-such", 127), ("/no/such", 127), ("/etc", 126), ("/etc/passwd", 126)]
)
def test_a_program_that_cannot_be_run_ends_as_a_shell_would_say(
    place: JobPlace, program: str, code: int, init: bool
) -> None:
    place.runtime = {**place.runtime, "init": place.runtime["init"] if init else ""}
    events = place.run(step(program))
    assert only(events, "executor_ended")[0]["exit_code"] == code
    assert outcome(events) == ("executor_error", f"Executor 0 ended with exit code {code}.")


def test_memory_that_is_used_up_is_the_probable_reason_of_a_kill(place: JobPlace) -> None:
    events = place.run(script("x=$(yes | head -c 100000000)"), limits={"ram_gb": 0.02})
    kind, reason = outcome(events)
    assert kind == "executor_error"
    assert "exit code 137" in str(reason)
    assert "0.02 GB (resources.ram_gb)" in str(reason)


def test_a_task_cannot_have_more_processes_than_the_site_allows(place: JobPlace) -> None:
    place.runtime = {**place.runtime, "pids_limit": 20}
    events = place.run(script("for i in $(seq 40); do sleep 5 & done; wait"))
    assert "can't fork" in only(events, "executor_ended")[0]["stderr"]


def test_containers_of_a_runner_that_was_killed_are_removed(place: JobPlace, settings: dict[str, Any]) -> None:
    place.write(step("sleep", "600"))
    with place.start() as runner:
        until(lambda: _running(settings), "the container")
        os.kill(runner.pid, signal.SIGKILL)
        runner.communicate(timeout=30)
    assert place.end()["outcome"] == "system_error"
    assert _containers(settings) == []


def test_the_next_runner_removes_what_a_cgroup_kill_left(
    place: JobPlace, settings: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    place.write(step("sleep", "600"))
    with place.start() as runner:
        until(lambda: _running(settings), "the container")
        for pid in processes_with(str(place.directory)):
            if pid != runner.pid:
                os.kill(pid, signal.SIGKILL)  # the watchdog, first
        os.kill(runner.pid, signal.SIGKILL)
        runner.communicate(timeout=30)
    assert _running(settings) != []
    assert outcome(JobPlace(tmp_path, settings).run(step("true"))) == ("complete", None)
    assert place.end()["outcome"] == "system_error"
    assert _containers(settings) == []


@pytest.mark.parametrize(
    "image",
    ["dir:/etc", "oci-archive:/x.tar", "docker-archive:/x", "docker://x", "/x", "a b", "-x", "containers-storage:[x]y"],
)
def test_a_file_of_this_machine_is_no_image(place: JobPlace, image: str) -> None:
    events = place.run(step("true", image=image))
    assert outcome(events) == ("system_error", f"The image {image!r} is not the name of an image.")


@pytest.mark.parametrize(
    ("image", "meant"),
    [
        ("alpine", "docker.io/library/alpine"),
        ("a/b:1", "docker.io/a/b:1"),
        ("quay.io/a/b", "quay.io/a/b"),
        ("localhost/a", "localhost/a"),
        ("r:5000/a@sha256:00", "r:5000/a@sha256:00"),
    ],
)
def test_a_short_name_means_what_docker_means_by_it(image: str, meant: str) -> None:
    assert full_name(image) == meant


def test_an_image_that_is_missing_is_told(place: JobPlace, tmp_path: pathlib.Path) -> None:
    kind, reason = outcome(place.run(step("true", image="127.0.0.1:1/none:1")))
    assert kind == "system_error"
    assert str(reason).startswith("The image 127.0.0.1:1/none:1 cannot be pulled: ")
    (tmp_path / "other").mkdir()
    other = JobPlace(tmp_path / "other", {**place.runtime, "pull": "never"})
    sentence = "The image none:1 is not on this machine, and runtime.pull is never."
    assert outcome(other.run(step("true", image="none:1"))) == ("system_error", sentence)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"program": "/no/podman"}, "podman (/no/podman) cannot be started: No such file or directory."),
        ({"options": ["--root", "/proc/x", "--runroot", "/proc/y"]}, "The image alpine cannot be used: "),
    ],
)
def test_a_podman_that_does_not_work_is_one_sentence(place: JobPlace, changes: dict[str, Any], sentence: str) -> None:
    place.runtime = {**place.runtime, **changes}
    kind, reason = outcome(place.run(step("true")))
    assert kind == "system_error"
    assert str(reason).startswith(sentence)


def test_without_root_only_what_is_delegated_is_enforced(place: JobPlace) -> None:
    settings: dict[str, Any] = {"program": "podman", "options": [], "environment": {}, "rootless": True}
    limits = Limits(cpu_cores=2, ram_gb=1.0, disk_gb=None)
    told = Podman({**settings, "controllers": []}, place.owner, lambda text: None)
    assert [sentence.split()[0] for sentence in told.unenforced(limits)] == ["resources.ram_gb", "resources.cpu_cores"]
    some = Podman({**settings, "controllers": ["memory", "pids"]}, place.owner, lambda text: None)
    assert [sentence.split()[0] for sentence in some.unenforced(limits)] == ["resources.cpu_cores"]


@pytest.mark.parametrize("name", [" A", "#A", "A B"])
def test_a_name_that_is_none_for_a_variable_is_refused(place: JobPlace, name: str) -> None:
    sentence = f"Podman cannot set the environment variable {name!r}."
    assert outcome(place.run(step("true", env={name: "x"}))) == ("system_error", sentence)


def test_an_image_is_pulled_with_what_podman_login_left_and_once(
    place: JobPlace, settings: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    if shutil.which("docker-registry") is None:
        missing("needs a registry (apt-get install docker-registry)")
    folder = tmp_path / "registry"
    folder.mkdir()
    # The password is "secret", hashed by bcrypt.
    users = "me:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"
    with Registry(folder, users=users) as registry:
        image = f"{registry.host}/one/two:1"
        conf, auth = tmp_path / "registries.conf", tmp_path / "auth.json"
        conf.write_text(f'[[registry]]\nlocation = "{registry.host}"\ninsecure = true\n', "ascii")
        login = base64.b64encode(b"me:secret").decode("ascii")
        auth.write_text(json.dumps({"auths": {registry.host: {"auth": login}}}), "ascii")
        own = {**settings["environment"], "CONTAINERS_REGISTRIES_CONF": str(conf)}
        known = {**own, "REGISTRY_AUTH_FILE": str(auth)}
        call({**settings, "environment": known}, "push", "alpine", f"docker://{image}")
        kind, reason = outcome(JobPlace(tmp_path, {**settings, "environment": own}).run(step("true", image=image)))
        assert kind == "system_error"
        assert str(reason).startswith(f"The image {image} cannot be pulled: ")
        place.runtime = {**settings, "environment": known}
        events = place.run(step("true", image=image))
        assert outcome(events) == ("complete", None)
        used = only(events, "executor_started")[0]["image_used"]
        assert re.fullmatch(re.escape(image) + r" \(sha256:[0-9a-f]{64}, podman\)", used)
    # The registry is gone, and not missed.
    events = JobPlace(tmp_path, place.runtime).run(step("true", image=image))
    assert outcome(events) == ("complete", None)


def test_a_job_is_canceled_while_it_pulls(place: JobPlace) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        image = f"127.0.0.1:{silent.getsockname()[1]}/x"
        place.write(step("true", image=image))
        with place.start() as runner:
            connection, _ = silent.accept()
            place.cancelled_file.touch()
            runner.communicate(timeout=20)
        connection.close()
    assert outcome(place.report()) == ("canceled", None)
    assert [pid for pid in processes_with(image) if pid_alive(pid)] == []


def test_a_podman_that_is_killed_takes_its_container_with_it(place: JobPlace, settings: dict[str, Any]) -> None:
    place.write(step("sleep", "600"))
    with place.start() as runner:
        until(lambda: _running(settings), "the container")
        for pid in processes_with(f"tesapi-{place.job_id}-0"):
            with contextlib.suppress(ProcessLookupError):
                if b"--attach" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        runner.communicate(timeout=30)
    sentence = "podman ended with -9 while the container of executor 0 ran."
    assert outcome(place.report()) == ("system_error", sentence)
    assert _containers(settings) == []
