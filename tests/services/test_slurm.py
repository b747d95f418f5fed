"""A batch system behind a Pulsar: a real Slurm, which queues jobs, cancels them, and kills whole groups of processes.

A part of it runs always; with TESAPI_TEST_SLURM=all every test does, with each way in which Slurm finds processes.
"""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass

import pytest

from tesapi.backends.base import Backend, Capacity
from tesapi.backends.health import Health
from tesapi.backends.pulsar_jobs import PulsarOptions
from tesapi.backends.pulsar_rest import PulsarRestBackend
from tesapi.backends.pulsar_wire import PulsarAddress, PulsarServer
from tesapi.backends.runtimes import RuntimeOptions
from tesapi.errors import BackendUnavailable
from tesapi.tes.events import ExecutorEnded, JobEnded, Outcome
from tests.backends import end_of, events_of, make_job, runtime_of, started_job, until_running
from tests.conftest import running_slurm
from tests.contract.test_backend import Make
from tests.engines import DockerEngine
from tests.jobs import Place, outcome, processes_with, script, step, until
from tests.pulsar_places import PulsarPlace
from tests.pulsars import Pulsar
from tests.services.server import Server
from tests.slurm import Slurm

ALL = os.environ.get("TESAPI_TEST_SLURM") == "all"

only_all = pytest.mark.skipif(not ALL, reason="runs with TESAPI_TEST_SLURM=all, as in CI")

# What every backend promises, and what every runtime does, here behind Slurm.
from tests.contract.test_backend import (  # noqa: E402
    test_a_job_runs_once_however_often_it_is_started,  # noqa: F401
    test_a_running_job_is_canceled_and_the_end_is_told_when_nothing_of_it_runs,  # noqa: F401
)
from tests.runner.test_steps import test_nothing_of_the_runners_environment_reaches_the_task  # noqa: E402, F401

if ALL:
    from tests.contract.test_backend import (
        test_a_canceled_job_whose_runner_is_killed_is_canceled,  # noqa: F401
        test_a_job_is_prepared_started_followed_and_discarded,  # noqa: F401
        test_a_job_that_ended_while_nobody_looked_is_told_by_the_next_one,  # noqa: F401
        test_a_job_that_is_canceled_before_its_start_never_runs,  # noqa: F401
        test_a_job_that_is_known_to_have_begun_is_found_without_a_start,  # noqa: F401
        test_a_job_that_may_have_been_prepared_is_discarded_by_its_address,  # noqa: F401
        test_a_job_that_was_prepared_but_not_started_can_be_started_by_the_next_one,  # noqa: F401
        test_a_job_whose_place_is_gone_is_lost,  # noqa: F401
        test_a_runner_that_does_not_obey_a_cancel_is_killed,  # noqa: F401
        test_a_runner_that_was_killed_is_noticed_and_its_sandbox_is_gone,  # noqa: F401
        test_canceling_a_job_that_has_ended_changes_nothing,  # noqa: F401
        test_canceling_right_after_the_start_ends_the_job,  # noqa: F401
        test_following_tells_everything_from_the_first_event_as_often_as_asked,  # noqa: F401
        test_leaving_the_backend_ends_no_job_and_the_next_one_finds_it,  # noqa: F401
        test_preparing_starts_nothing_and_gives_the_same_place_again,  # noqa: F401
        test_runner_and_watchdog_killed_together_are_noticed,  # noqa: F401
        test_what_a_running_executor_has_printed_can_be_asked_for,  # noqa: F401
    )
    from tests.runner.test_steps import (
        test_arguments_reach_the_program_as_they_are,  # noqa: F401
        test_executors_run_in_order_and_share_volumes_and_output_folders,  # noqa: F401
        test_files_come_in_by_url_by_plain_path_and_by_content,  # noqa: F401
        test_nothing_in_the_background_outlives_its_executor,  # noqa: F401
        test_outputs_are_stored_after_an_executors_error_which_wins_over_a_missing_one,  # noqa: F401
        test_streams_go_from_and_to_the_files_that_are_named,  # noqa: F401
        test_the_exit_code_says_what_happened_to_the_program,  # noqa: F401
        test_the_streams_so_far_can_be_read_while_an_executor_runs,  # noqa: F401
        test_what_is_not_text_becomes_text_in_the_report,  # noqa: F401
    )


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Pulsar and the Slurm to which its manager `slurm` gives jobs; its node is this machine."""

    pulsar: Pulsar
    slurm: Slurm
    proctrack: str

    def close(self) -> None:
        """Let no more jobs begin."""
        assert self.slurm.command("scontrol", "update", "partitionname=main", "state=down") == []
        until(lambda: self.slurm.command("sinfo", "--noheader", "--format=%a") == ["down"], "a closed partition")

    def open(self) -> None:
        """Let jobs begin."""
        self.slurm.command("scontrol", "update", "partitionname=main", "state=up")

    def has_no_jobs(self) -> bool:
        return not self.slurm.queue()


@pytest.fixture(scope="module", params=["cgroup", "linuxproc"] if ALL else ["cgroup"])
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pulsar_programs: pathlib.Path
) -> Iterator[Cluster]:
    managers = {
        "_default_": {"type": "queued_python"},
        "slurm": {"type": "queued_cli", "job_plugin": "Slurm", "shell_plugin": "LocalShell", "job_ncpus": 1},
    }
    folder = tmp_path_factory.mktemp("pulsar")
    with (
        running_slurm(request.param) as slurm,
        Pulsar(folder, pulsar_programs, managers=managers, environment=slurm.environment) as pulsar,
    ):
        yield Cluster(pulsar, slurm, request.param)


def _backend(cluster: Cluster, runtime: RuntimeOptions, notes: pathlib.Path | None = None) -> Backend:
    address = PulsarAddress("site", cluster.pulsar.url, manager="slurm", token=cluster.pulsar.token)
    health = Health()
    options = PulsarOptions(runtime=runtime.document(), gone_s=0.0, notes=notes)
    return PulsarRestBackend(PulsarServer(address, health), health, Capacity(8), options)


@pytest.fixture
def make(cluster: Cluster, bubblewrap: Mapping[str, object]) -> Make:
    return lambda: _backend(cluster, RuntimeOptions("bubblewrap", images=[("alpine", "host")]))


@pytest.fixture
def make_telling_at_once(make: Make) -> Make:
    return make


@pytest.fixture
async def backend(make: Make) -> AsyncIterator[Backend]:
    async with make() as backend:
        yield backend


@pytest.fixture
async def with_docker(cluster: Cluster, docker_engine: DockerEngine) -> AsyncIterator[Backend]:
    runtime = RuntimeOptions("docker", docker_host=f"unix://{docker_engine.socket}", pull="never", network="none")
    async with _backend(cluster, runtime) as backend:
        yield backend
    assert docker_engine.containers("tesapi.job") == []


@pytest.fixture(params=["docker", "bubblewrap"])
def place(request: pytest.FixtureRequest, tmp_path: pathlib.Path, cluster: Cluster) -> Iterator[Place]:
    if request.param == "docker":
        engine: DockerEngine = request.getfixturevalue("docker_engine")
        place = PulsarPlace(tmp_path, engine.settings(), cluster.pulsar, "slurm")
    else:
        place = PulsarPlace(tmp_path, request.getfixturevalue("bubblewrap"), cluster.pulsar, "slurm")
    yield place
    place.discard()


@pytest.fixture(autouse=True)
def nothing_stays(cluster: Cluster) -> Iterator[None]:
    """After each test Slurm has no job any more, as whoever pays for it expects."""
    yield
    cluster.open()
    until(cluster.has_no_jobs, "the end of all jobs", 60)


async def _until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.05)


async def test_a_job_that_waits_in_slurms_queue_is_canceled_and_never_begins(
    cluster: Cluster, backend: Backend
) -> None:
    job = await make_job(backend, step("true"))
    cluster.close()
    handle = await backend.prepare(job)
    await backend.start(handle, job)
    await _until(lambda: list(cluster.slurm.queue().values()) == ["PENDING"])
    await backend.cancel(handle)
    events = await events_of(backend, handle)
    assert [event.event for event in events] == ["ended"]
    assert isinstance(events[0], JobEnded)
    assert events[0].outcome is Outcome.CANCELED
    assert cluster.has_no_jobs()
    cluster.open()
    assert not pathlib.Path(handle["directory"], "metadata", "started").exists()
    await backend.discard(handle)
    assert not pathlib.Path(handle["directory"]).exists()


async def test_a_canceled_job_leaves_neither_a_container_nor_a_job_of_slurm(
    cluster: Cluster, with_docker: Backend, docker_engine: DockerEngine
) -> None:
    job, handle = await started_job(with_docker, script("trap '' TERM INT; while :; do sleep 0.1; done"))
    await until_running(with_docker, handle, job)
    assert docker_engine.containers(f"tesapi.job={job.job_id}")
    await with_docker.cancel(handle)
    assert (await end_of(with_docker, handle)).outcome is Outcome.CANCELED
    assert docker_engine.containers(f"tesapi.job={job.job_id}") == []
    await _until(cluster.has_no_jobs)
    await with_docker.discard(handle)
    assert processes_with(job.job_id) == []


async def test_a_pulsar_that_is_killed_finds_its_jobs_in_slurm_again(cluster: Cluster, make: Make) -> None:
    text = "echo ran >> /tmp/ran; sleep 1; cat /tmp/ran"
    async with make() as backend:
        running = await started_job(backend, script(text))
        await until_running(backend, running[1], running[0])
        cluster.close()
        queued = [await started_job(backend, script(text)) for _ in range(2)]
        await _until(lambda: list(cluster.slurm.queue().values()).count("PENDING") == 2)
        cluster.pulsar.kill()
        await _until(lambda: not processes_with(running[0].job_id))  # the first one ends meanwhile
        cluster.open()
        cluster.pulsar.start()
        for _, handle in (running, *queued):
            events = await events_of(backend, handle)
            assert [event.stdout for event in events if isinstance(event, ExecutorEnded)] == ["ran\n"]
            assert isinstance(events[-1], JobEnded)
            assert events[-1].outcome is Outcome.COMPLETE
            await backend.discard(handle)


@pytest.mark.parametrize(
    "how", [pytest.param("", id="scancel", marks=only_all), pytest.param("--signal=KILL --full", id="kill")]
)
async def test_a_job_that_somebody_else_ends_in_slurm_is_told_and_its_container_is_removed(
    cluster: Cluster, with_docker: Backend, docker_engine: DockerEngine, how: str
) -> None:
    job, handle = await started_job(with_docker, step("sleep", "1000"))
    await until_running(with_docker, handle, job)
    cluster.slurm.command("scancel", *how.split(), *cluster.slurm.queue())
    end = await end_of(with_docker, handle)
    assert (end.outcome, end.reason) == (Outcome.SYSTEM_ERROR, _what_is_told(cluster, handle["directory"]))
    assert docker_engine.containers(f"tesapi.job={job.job_id}") == []
    await with_docker.discard(handle)


def _what_is_told(cluster: Cluster, directory: str) -> str:
    if cluster.proctrack == "linuxproc":  # which kills the batch script alone, and tells the rest
        return "The runner was told to stop by SIGTERM."
    note = json.loads(pathlib.Path(directory, "metadata", "started").read_text("ascii"))
    return (
        f"The job's runner on {note['host']} (process {note['pid']}) was killed while executor 0 ran; nothing of it "
        "runs any more."
    )


def test_what_a_killed_job_leaves_of_an_engine_is_removed_by_the_next_runner_on_that_node(
    cluster: Cluster, tmp_path: pathlib.Path, docker_engine: DockerEngine
) -> None:
    killed = PulsarPlace(tmp_path, docker_engine.settings(), cluster.pulsar, "slurm")
    killed.write(step("sleep", "1000"))
    killed.start()
    until(lambda: "executor_started" in [event["event"] for event in killed.report()], "the executor", 60)
    until(killed.remains, "the container")
    cluster.slurm.command("scancel", "--signal=KILL", "--full", *cluster.slurm.queue())
    until(cluster.has_no_jobs, "the end of the job", 60)
    if cluster.proctrack == "cgroup":  # else the runner is told, and does it
        assert len(killed.remains()) == 1
        assert killed.report()[-1]["event"] == "executor_started"
    following = killed.another(tmp_path)
    assert outcome(following.run(step("true"))) == ("complete", None)
    assert killed.remains() == []
    assert [event["event"] for event in killed.report()][-2:] == ["executor_ended", "ended"]
    assert outcome(killed.report()) == ("system_error", _what_is_told(cluster, str(killed.directory)))
    killed.discard()


@only_all
async def test_what_was_probed_once_serves_until_the_next_probe_has_come_out_of_the_queue(
    cluster: Cluster, tmp_path: pathlib.Path
) -> None:
    options = RuntimeOptions("bubblewrap", images=[("alpine", "host")])
    async with _backend(cluster, options, tmp_path / "notes") as first:
        known = await runtime_of(first)
    cluster.close()
    async with _backend(cluster, options, tmp_path / "notes") as second:
        assert await second.runtime() == known
        await _until(lambda: list(cluster.pulsar.staging.glob("tesapi-probe-*/external_id")))
        assert list(cluster.slurm.queue().values()) == ["PENDING"]
        assert "it is being asked again" in second.condition().sentence
    await _until(cluster.has_no_jobs)  # the probe does not stay behind, for nobody waits for it
    async with _backend(cluster, RuntimeOptions("bubblewrap", images=[]), tmp_path / "notes") as other:
        with pytest.raises(BackendUnavailable, match=r"not been (asked|found out) yet"):
            await other.runtime()
        cluster.open()
        assert await runtime_of(other) != known
        assert "it is being asked again" not in other.condition().sentence


async def test_the_condition_says_what_slurm_may_leave_of_an_engine(with_docker: Backend) -> None:
    await runtime_of(with_docker)
    sentence = with_docker.condition().sentence
    assert "Containers are run by docker" in sentence
    assert "Jobs run in Slurm, which may kill a runner together with its watchdog" in sentence


@pytest.fixture
def server(tmp_path: pathlib.Path, cluster: Cluster, docker_engine: DockerEngine) -> Iterator[Server]:
    """The whole service, whose only destination is the cluster."""
    settings = {
        "URL": cluster.pulsar.url,
        "PRIVATE_TOKEN": f'"{cluster.pulsar.token}"',
        "MANAGER": "slurm",
        "MAX_JOBS": 3,
        "RUNTIME__KIND": "docker",
        "RUNTIME__DOCKER__HOST": f"unix://{docker_engine.socket}",
        "RUNTIME__NETWORK": "none",
        "RUNTIME__PULL": "never",
    }
    with Server(tmp_path, **{f"DESTINATIONS__SITE__{key}": value for key, value in settings.items()}) as server:
        yield server
    assert docker_engine.containers("tesapi.job") == []


def _task(text: str) -> dict[str, object]:
    return {"executors": [{"image": "alpine", "command": ["sh", "-c", text]}]}


@only_all
@pytest.mark.timeout(240)
def test_tasks_outlive_the_service_and_pulsar_and_a_task_that_slurm_kills_says_so(
    server: Server, cluster: Cluster, docker_engine: DockerEngine
) -> None:
    others = set(cluster.pulsar.jobs)  # of tests before
    first = server.post(_task("sleep 3; echo first"))
    assert server.wait_for(first, "RUNNING") == "RUNNING"
    cluster.close()
    second, third = server.post(_task("echo second")), server.post(_task("echo third"))
    until(lambda: list(cluster.slurm.queue().values()).count("PENDING") == 2, "two jobs in Slurm's queue", 60)
    server.kill()
    cluster.pulsar.kill()
    cluster.pulsar.start()
    server.start()
    server.cancel(third)
    assert server.wait_for(third) == "CANCELED"
    cluster.open()
    for task_id, said in ((first, "first\n"), (second, "second\n")):
        assert server.wait_for(task_id) == "COMPLETE"
        assert [log["stdout"] for log in server.get(task_id)["logs"][0]["logs"]] == [said]
    until(cluster.has_no_jobs, "the end of all jobs", 60)

    killed = server.post(_task("sleep 1000"))
    server.wait_for(killed, "RUNNING")
    until(lambda: docker_engine.containers("tesapi.job"), "the container")
    cluster.slurm.command("scancel", "--signal=KILL", "--full", *cluster.slurm.queue())
    assert server.wait_for(killed) == "SYSTEM_ERROR"
    told = server.get(killed)["logs"][0]["system_logs"][-1]
    ends = {"cgroup": "was killed while executor 0 ran; nothing of it runs any more.", "linuxproc": "by SIGTERM."}
    assert told.endswith(ends[cluster.proctrack])
    assert docker_engine.containers("tesapi.job") == []
    assert "Jobs run in Slurm" in server.log.read_text("utf-8")
    until(lambda: set(cluster.pulsar.jobs) <= others, "the removal of all jobs", 60)
