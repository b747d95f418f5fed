"""What every backend promises (`tesapi/backends/base.py`). A new one is one more `pytest.param` here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from datetime import UTC, datetime

import pytest

from tesapi.backends.base import Backend, Capacity, Need
from tesapi.backends.health import Health
from tesapi.backends.local import LocalBackend
from tesapi.backends.pulsar_amqp import PulsarAmqpBackend
from tesapi.backends.pulsar_jobs import PulsarOptions
from tesapi.backends.pulsar_queues import BrokerAddress
from tesapi.backends.pulsar_rest import PulsarRestBackend
from tesapi.backends.pulsar_updates import PulsarUpdates
from tesapi.backends.pulsar_wire import PulsarAddress, PulsarServer
from tesapi.backends.runtimes import RuntimeOptions, RuntimeProbe
from tesapi.errors import BackendUnavailable, JobLost
from tesapi.tes.events import ExecutorEnded, JobEnded, Outcome
from tests.backends import end_of, events_of, make_job, place_of, runner_of, runtime_of, started_job, until_running
from tests.jobs import processes_with, sandboxes, script, step
from tests.pulsars import Pulsar
from tests.rabbit import Rabbit

Make = Callable[..., Backend]


@pytest.fixture
def make_local(tmp_path: pathlib.Path, bubblewrap: Mapping[str, object]) -> Make:
    def make(capacity: Capacity | None = None) -> Backend:
        directory = tmp_path / "jobs" / "store-id"
        probe = RuntimeProbe(directory, RuntimeOptions("bubblewrap", images=[("alpine", "host")]))
        return LocalBackend(directory, capacity or Capacity(max_jobs=8, cpu_cores=8, ram_gb=8), probe)

    return make


@pytest.fixture(scope="module")
def pulsar_server(tmp_path_factory: pytest.TempPathFactory, pulsar_programs: pathlib.Path) -> Iterator[Pulsar]:
    with Pulsar(tmp_path_factory.mktemp("pulsar"), pulsar_programs) as pulsar:
        yield pulsar


@pytest.fixture
def make_pulsar_rest(pulsar_server: Pulsar, bubblewrap: Mapping[str, object]) -> Make:
    def make() -> Backend:
        runtime = RuntimeOptions("bubblewrap", images=[("alpine", "host")]).document()
        address = PulsarAddress("site", pulsar_server.url, token=pulsar_server.token)
        health = Health()
        options = PulsarOptions(runtime=runtime, gone_s=0.0)
        return PulsarRestBackend(PulsarServer(address, health), health, Capacity(8), options)

    return make


@pytest.fixture(scope="module")
def pulsar_behind_a_broker(
    tmp_path_factory: pytest.TempPathFactory, pulsar_programs: pathlib.Path, rabbit: Rabbit
) -> Iterator[Pulsar]:
    folder = tmp_path_factory.mktemp("pulsar")
    with Pulsar(folder, pulsar_programs, message_queue_url=rabbit.url, web=False) as pulsar:
        yield pulsar


@pytest.fixture
def make_pulsar_amqp(pulsar_behind_a_broker: Pulsar, rabbit: Rabbit, bubblewrap: Mapping[str, object]) -> Make:
    def make() -> Backend:
        runtime = RuntimeOptions("bubblewrap", images=[("alpine", "host")]).document()
        options = PulsarOptions(runtime=runtime, gone_s=0.0)
        return PulsarAmqpBackend(BrokerAddress("site", rabbit.url), Health(), Capacity(8), options)

    return make


@pytest.fixture(scope="module")
def pulsar_with_both(
    tmp_path_factory: pytest.TempPathFactory, pulsar_programs: pathlib.Path, rabbit: Rabbit
) -> Iterator[Pulsar]:
    url, folder = rabbit.add_vhost("both"), tmp_path_factory.mktemp("pulsar")
    with Pulsar(folder, pulsar_programs, message_queue_url=url) as pulsar:
        yield pulsar


@pytest.fixture
def make_pulsar(pulsar_with_both: Pulsar, bubblewrap: Mapping[str, object]) -> Make:
    def make() -> Backend:
        runtime = RuntimeOptions("bubblewrap", images=[("alpine", "host")]).document()
        address = PulsarAddress("site", pulsar_with_both.url, token=pulsar_with_both.token)
        updates = PulsarUpdates(BrokerAddress("site", pulsar_with_both.options["message_queue_url"]))
        health = Health()
        options = PulsarOptions(runtime=runtime, gone_s=0.0)
        return PulsarRestBackend(PulsarServer(address, health), health, Capacity(8), options, updates)

    return make


_TELL_AT_ONCE = [
    pytest.param("make_local", id="local"),
    pytest.param("make_pulsar_rest", id="pulsar_rest"),
    pytest.param("make_pulsar", id="pulsar"),
]


@pytest.fixture(params=_TELL_AT_ONCE)
def make_telling_at_once(request: pytest.FixtureRequest) -> Make:
    """The same as `make`, for backends that tell something of a job while it runs."""
    made: Make = request.getfixturevalue(request.param)
    return made


@pytest.fixture(params=[*_TELL_AT_ONCE, pytest.param("make_pulsar_amqp", id="pulsar_amqp")])
def make(request: pytest.FixtureRequest) -> Make:
    """Makes a backend; each one made in a test finds the jobs of those made before, as after a restart."""
    made: Make = request.getfixturevalue(request.param)
    return made


@pytest.fixture
async def backend(make: Make) -> AsyncIterator[Backend]:
    async with make() as backend:
        yield backend


@pytest.fixture
def shared(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder that jobs and the test both see."""
    folder = tmp_path / "storage"
    folder.mkdir()
    return folder


async def test_a_job_is_prepared_started_followed_and_discarded(backend: Backend) -> None:
    job, handle = await started_job(backend, script("echo out; echo err >&2; exit 3"))
    events = await events_of(backend, handle)
    assert [event.event for event in events] == ["started", "executor_started", "executor_ended", "ended"]
    assert [event.seq for event in events] == [1, 2, 3, 4]
    ended = events[2]
    assert isinstance(ended, ExecutorEnded)
    assert (ended.exit_code, ended.stdout, ended.stderr) == (3, "out\n", "err\n")
    assert isinstance(events[-1], JobEnded)
    assert events[-1].outcome is Outcome.EXECUTOR_ERROR
    await backend.discard(handle)
    assert processes_with(job.job_id) == []


async def test_preparing_starts_nothing_and_gives_the_same_place_again(backend: Backend) -> None:
    job = await make_job(backend, step("true"))
    assert await backend.prepare(job) == await backend.prepare(job)
    assert processes_with(job.job_id) == []


async def test_a_handle_is_text_without_secrets(backend: Backend) -> None:
    job = await make_job(backend, step("true", env={"TOKEN": "very-secret"}))
    handle = await backend.prepare(job)
    assert all(isinstance(value, str) for item in handle.items() for value in item)
    assert "very-secret" not in json.dumps(dict(handle))


async def test_a_job_runs_once_however_often_it_is_started(backend: Backend) -> None:
    job = await make_job(backend, script("echo ran >> /v/ran; sleep 0.3; cat /v/ran"), volumes=["/v"])
    handle = await backend.prepare(job)
    await asyncio.gather(*(backend.start(handle, job) for _ in range(5)))
    events = await events_of(backend, handle)
    await backend.start(handle, job)
    assert await events_of(backend, handle) == events
    assert [event.stdout for event in events if isinstance(event, ExecutorEnded)] == ["ran\n"]


async def test_following_tells_everything_from_the_first_event_as_often_as_asked(backend: Backend) -> None:
    _, handle = await started_job(backend, script("sleep 0.3"), step("true"))
    one, other = await asyncio.gather(events_of(backend, handle), events_of(backend, handle))
    assert one == other == await events_of(backend, handle)


async def test_leaving_the_backend_ends_no_job_and_the_next_one_finds_it(make: Make) -> None:
    async with make() as first:
        job, handle = await started_job(first, script("echo ran >> /tmp/ran; sleep 1; cat /tmp/ran"))
        await until_running(first, handle, job)
    async with make() as second:
        await second.start(handle, job)
        events = await events_of(second, handle)
    assert [event.stdout for event in events if isinstance(event, ExecutorEnded)] == ["ran\n"]
    assert isinstance(events[-1], JobEnded)
    assert events[-1].outcome is Outcome.COMPLETE


async def test_a_job_that_is_known_to_have_begun_is_found_without_a_start(make: Make) -> None:
    async with make() as first:
        job, handle = await started_job(first, script("echo ran >> /tmp/ran; sleep 1; cat /tmp/ran"))
        await until_running(first, handle, job)
    async with make() as second:
        await runtime_of(second)
        await second.resume(handle, Need(job.cpu_cores, job.ram_gb))
        assert (await end_of(second, handle)).outcome is Outcome.COMPLETE


async def test_a_job_that_may_have_been_prepared_is_discarded_by_its_address(backend: Backend) -> None:
    job = await make_job(backend, step("true"))
    handle = await backend.prepare(job)
    await backend.discard(backend.address(job.job_id))
    with pytest.raises(JobLost):
        await backend.start(handle, job)
    await backend.discard(backend.address("job-that-never-was"))


async def test_a_job_that_ended_while_nobody_looked_is_told_by_the_next_one(make: Make) -> None:
    async with make() as first:
        job, handle = await started_job(first, step("true"))
    while processes_with(job.job_id):
        await asyncio.sleep(0.01)
    async with make() as second:
        await second.start(handle, job)
        assert (await end_of(second, handle)).outcome is Outcome.COMPLETE


async def test_a_job_that_was_prepared_but_not_started_can_be_started_by_the_next_one(make: Make) -> None:
    async with make() as first:
        job = await make_job(first, step("true"))
        handle = await first.prepare(job)
    async with make() as second:
        await second.start(handle, job)
        assert (await end_of(second, handle)).outcome is Outcome.COMPLETE


async def test_a_running_job_is_canceled_and_the_end_is_told_when_nothing_of_it_runs(backend: Backend) -> None:
    job, handle = await started_job(backend, script("trap '' TERM INT; while :; do sleep 0.01; done"))
    await until_running(backend, handle, job)
    await backend.cancel(handle)
    await backend.cancel(handle)
    assert (await end_of(backend, handle)).outcome is Outcome.CANCELED
    assert sandboxes(job.job_id) == []


async def test_a_job_that_is_canceled_before_its_start_never_runs(backend: Backend) -> None:
    job = await make_job(backend, step("true"))
    handle = await backend.prepare(job)
    await backend.cancel(handle)
    await backend.start(handle, job)
    events = await events_of(backend, handle)
    assert [event.event for event in events] == ["ended"]
    assert isinstance(events[0], JobEnded)
    assert events[0].outcome is Outcome.CANCELED


async def test_canceling_right_after_the_start_ends_the_job(backend: Backend) -> None:
    handles = []
    for _ in range(5):
        _, handle = await started_job(backend, step("sleep", "1000"))
        await backend.cancel(handle)
        handles.append(handle)
    ends = await asyncio.gather(*(end_of(backend, handle) for handle in handles))
    assert {end.outcome for end in ends} == {Outcome.CANCELED}


async def test_canceling_a_job_that_has_ended_changes_nothing(backend: Backend) -> None:
    _, handle = await started_job(backend, step("true"))
    end = await end_of(backend, handle)
    await backend.cancel(handle)
    assert await end_of(backend, handle) == end
    await backend.discard(handle)
    await backend.cancel(handle)


async def test_a_job_whose_place_is_gone_is_lost(backend: Backend) -> None:
    job = await make_job(backend, step("true"))
    handle = await backend.prepare(job)
    await backend.discard(handle)
    await backend.discard(handle)
    with pytest.raises(JobLost):
        await backend.start(handle, job)
    with pytest.raises(JobLost):
        await events_of(backend, handle)
    assert await backend.tails(handle) is None


async def test_what_a_running_executor_has_printed_can_be_asked_for(make_telling_at_once: Make) -> None:
    async with make_telling_at_once() as backend:
        job, handle = await started_job(backend, step("true"), script("echo so far; sleep 1000"))
        await until_running(backend, handle, job)
        tails = None
        while tails is None:
            tails = await backend.tails(handle)
            await asyncio.sleep(0.02)
        assert (tails.index, tails.stdout, tails.stderr) == (1, "so far\n", "")
        await backend.cancel(handle)
        await end_of(backend, handle)


async def test_a_runner_that_was_killed_is_noticed_and_its_sandbox_is_gone(backend: Backend) -> None:
    job, handle = await started_job(backend, step("sleep", "1000"))
    await until_running(backend, handle, job)
    os.kill(runner_of(job.job_id), signal.SIGKILL)
    end = await end_of(backend, handle)
    assert end.outcome is Outcome.SYSTEM_ERROR
    assert "was killed while executor 0 ran; nothing of it runs any more" in str(end.reason)
    assert sandboxes(job.job_id) == []


async def test_runner_and_watchdog_killed_together_are_noticed(backend: Backend) -> None:
    job, handle = await started_job(backend, step("sleep", "1000"))
    await until_running(backend, handle, job)
    for pid in processes_with(job.job_id):
        if pid not in sandboxes(job.job_id):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
    for pid in [pid for pid in processes_with(job.job_id) if pid not in sandboxes(job.job_id)]:
        os.kill(pid, signal.SIGKILL)
    end = await end_of(backend, handle)
    assert end.outcome is Outcome.SYSTEM_ERROR
    assert sandboxes(job.job_id) == []


async def test_a_canceled_job_whose_runner_is_killed_is_canceled(backend: Backend) -> None:
    job, handle = await started_job(backend, step("sleep", "1000"))
    await until_running(backend, handle, job)
    runner = runner_of(job.job_id)
    mark = place_of(runner) / "cancelled"
    os.kill(runner, signal.SIGSTOP)
    end = asyncio.ensure_future(end_of(backend, handle))
    await backend.cancel(handle)
    while not mark.exists():
        await asyncio.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):  # a Pulsar that is told by a message kills it itself
        os.kill(runner, signal.SIGKILL)
    assert (await end).outcome is Outcome.CANCELED
    assert sandboxes(job.job_id) == []


async def test_jobs_wait_for_room_first_come_first_served(make_local: Make) -> None:
    async with make_local(Capacity(max_jobs=2, cpu_cores=2, ram_gb=2)) as backend:
        running = [await started_job(backend, step("sleep", "1000")) for _ in range(2)]
        large = await make_job(backend, step("true"), cpu_cores=2)
        small = await make_job(backend, step("true"))
        handles = [await backend.prepare(job) for job in (large, small)]
        starts = [asyncio.ensure_future(backend.start(h, j)) for h, j in zip(handles, (large, small), strict=True)]
        for job, handle in running:
            await until_running(backend, handle, job)
        assert processes_with(large.job_id) == processes_with(small.job_id) == []
        await backend.cancel(running[0][1])
        await end_of(backend, running[0][1])
        assert processes_with(small.job_id) == []  # it does not overtake the large one, which waits for two cores
        await backend.cancel(running[1][1])
        ends = await asyncio.gather(*(end_of(backend, handle) for _, handle in running))
        assert {end.outcome for end in ends} == {Outcome.CANCELED}
        for start, handle in zip(starts, handles, strict=True):
            await start
            assert (await end_of(backend, handle)).outcome is Outcome.COMPLETE


async def test_a_job_that_waits_for_room_is_canceled_at_once_and_makes_room_for_no_one_else(make_local: Make) -> None:
    async with make_local(Capacity(max_jobs=1, cpu_cores=1, ram_gb=1)) as backend:
        first, running = await started_job(backend, step("sleep", "1000"))
        waiting, next_one = await make_job(backend, step("true")), await make_job(backend, step("true"))
        handles = [await backend.prepare(job) for job in (waiting, next_one)]
        starts = [asyncio.ensure_future(backend.start(h, j)) for h, j in zip(handles, (waiting, next_one), strict=True)]
        await until_running(backend, running, first)
        await backend.cancel(handles[0])
        await starts[0]
        assert (await end_of(backend, handles[0])).outcome is Outcome.CANCELED
        assert not starts[1].done()
        await backend.cancel(running)
        assert (await end_of(backend, running)).outcome is Outcome.CANCELED
        await starts[1]
        assert (await end_of(backend, handles[1])).outcome is Outcome.COMPLETE


async def test_the_condition_says_that_jobs_can_be_taken_and_since_when(backend: Backend) -> None:
    await runtime_of(backend)
    condition = backend.condition()
    assert (condition.ok, condition.state, condition.running, condition.waiting) == (True, "up", 0, 0)
    assert condition.since <= datetime.now(UTC)
    assert "bubblewrap" in condition.sentence


async def test_how_much_of_this_machine_is_in_use_is_told(make_local: Make) -> None:
    async with make_local() as backend:
        condition = backend.condition()
    assert "0 jobs run and 0 wait; at most 8 jobs, 8 CPU cores and 8.0 GB of memory" in condition.sentence


# What only the local backend has.


async def test_a_handle_of_another_place_is_not_touched(make_local: Make, tmp_path: pathlib.Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    async with make_local() as backend:
        await backend.discard({"directory": str(precious)})
        await backend.discard({"directory": str(tmp_path / "jobs" / "store-id" / ".." / ".." / "precious")})
        await backend.cancel({"directory": str(precious)})
    assert list(precious.iterdir()) == []


async def test_folders_that_a_task_has_closed_are_removed(make_local: Make) -> None:
    async with make_local() as backend:
        job = await make_job(backend, script("mkdir -p /v/a/b; touch /v/a/b/c; chmod 000 /v/a/b /v/a"), volumes=["/v"])
        handle = await backend.prepare(job)
        await backend.start(handle, job)
        await end_of(backend, handle)
        await backend.discard(handle)
        assert not pathlib.Path(handle["directory"]).exists()


async def test_a_job_document_is_readable_by_its_owner_only(make_local: Make) -> None:
    async with make_local() as backend:
        handle = await backend.prepare(await make_job(backend, step("true")))
        document = pathlib.Path(handle["directory"], "inputs", "job.json")
        assert document.stat().st_mode & 0o777 == 0o600
        assert pathlib.Path(handle["directory"]).stat().st_mode & 0o777 == 0o700


async def test_a_place_that_is_removed_under_a_running_job_is_told_as_lost(make_local: Make) -> None:
    async with make_local() as backend:
        job, handle = await started_job(backend, step("sleep", "1000"))
        await until_running(backend, handle, job)
        while pathlib.Path(handle["directory"]).exists():  # the sandbox may still be being made in it
            shutil.rmtree(handle["directory"], ignore_errors=True)
        with pytest.raises(JobLost, match="is gone"):
            await events_of(backend, handle)
        while sandboxes(job.job_id):  # its runner notices as well
            await asyncio.sleep(0.01)


async def test_a_runner_that_does_not_obey_a_cancel_is_killed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tesapi.backends.local._CANCEL_PATIENCE_S", 0.1)
    monkeypatch.setattr("tesapi.backends.pulsar_rest._KILL_AFTER_S", 0.1)
    async with make() as backend:
        job, handle = await started_job(backend, step("sleep", "1000"))
        await until_running(backend, handle, job)
        runner = runner_of(job.job_id)
        os.kill(runner, signal.SIGSTOP)
        end = asyncio.ensure_future(end_of(backend, handle))
        while not end.done():
            await backend.cancel(handle)
            await asyncio.sleep(0.05)
        assert (await end).outcome is Outcome.CANCELED
        assert sandboxes(job.job_id) == []


async def test_without_a_runtime_nothing_is_taken_and_the_sentence_says_why(
    make_local: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tesapi.backends.runtimes._bwraps", lambda: ["/bin/false"])
    async with make_local() as backend:
        assert not backend.condition().ok
        with pytest.raises(
            BackendUnavailable,
            match=r"No container can be run on this machine\. bubblewrap \(/bin/false\): The sandbox",
        ):
            await backend.runtime()


async def test_a_job_whose_place_is_gone_gives_its_room_back(make_local: Make) -> None:
    async with make_local(Capacity(max_jobs=1, cpu_cores=1, ram_gb=1)) as backend:
        job, handle = await started_job(backend, script("sleep 30"))
        await until_running(backend, handle, job)
        while pathlib.Path(handle["directory"]).exists():
            shutil.rmtree(handle["directory"], ignore_errors=True)  # its runner may just be writing there
        with pytest.raises(JobLost):
            await events_of(backend, handle)
        await backend.discard(handle)
        _, handle = await started_job(backend, step("true"))
        assert (await end_of(backend, handle)).outcome is Outcome.COMPLETE


async def test_folders_that_are_nested_deeper_than_python_goes_are_removed(backend: Backend) -> None:
    text = "sleep 0.3; cd /tmp; i=0; while [ $i -lt 1500 ]; do mkdir d; cd d; i=$((i+1)); done"
    job, handle = await started_job(backend, script(text))
    await until_running(backend, handle, job)
    place = place_of(runner_of(job.job_id))
    assert (await end_of(backend, handle)).outcome is Outcome.COMPLETE
    await backend.discard(handle)
    while place.exists():  # some backends have it removed
        await asyncio.sleep(0.05)


@pytest.mark.skipif(os.getuid() != 0, reason="needs to be root, to mount a small file system")
async def test_a_job_that_fills_the_disk_says_how_it_ended(make_local: Make, tmp_path: pathlib.Path) -> None:
    (tmp_path / "jobs").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(tmp_path / "jobs")], check=True)
    try:
        async with make_local() as backend:
            text = "head -c 8000 /dev/zero | tr '\\0' x; cat /dev/zero > /v/big; exit 3"
            job = await make_job(backend, script(text), volumes=["/v"])
            handle = await backend.prepare(job)
            await backend.start(handle, job)
            events = await events_of(backend, handle)
            ended = next(event for event in events if isinstance(event, ExecutorEnded))
            assert (ended.exit_code, ended.stdout) == (3, "x" * 8000)
            end = events[-1]
            assert isinstance(end, JobEnded)
            assert (end.outcome, end.reason) == (Outcome.EXECUTOR_ERROR, "Executor 0 ended with exit code 3.")

            await backend.discard(handle)
            waiting = await make_job(backend, script("cat /dev/zero > /v/big; sleep 100"), volumes=["/v"])
            handle = await backend.prepare(waiting)
            await backend.start(handle, waiting)
            while not list(pathlib.Path(handle["directory"]).glob("tes/files/*/big")):
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)  # for the disk to be full
            await backend.cancel(handle)
            assert (await end_of(backend, handle)).outcome is Outcome.CANCELED
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "jobs")], check=True)
