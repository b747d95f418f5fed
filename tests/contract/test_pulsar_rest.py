"""A Pulsar over REST as it really is: its quirks, its outages, its settings that are wrong."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.server
import logging
import os
import pathlib
import shutil
import signal
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import pytest
import trustme

from tesapi.backends import pulsar_helpers, pulsar_rest
from tesapi.backends.base import Capacity
from tesapi.backends.health import Health
from tesapi.backends.pulsar_jobs import PulsarOptions
from tesapi.backends.pulsar_rest import PulsarRestBackend
from tesapi.backends.pulsar_wire import JobSetUp, PulsarAddress, PulsarServer
from tesapi.backends.runtimes import RuntimeOptions
from tesapi.errors import BackendUnavailable, JobLost
from tesapi.jobs.plan import Job
from tesapi.tes.events import ExecutorEnded, Handle, Outcome, OutputStored
from tests.backends import end_of, events_of, make_job, runtime_of, started_job, until_running
from tests.jobs import processes_with, sandboxes, script, step
from tests.proxy import Proxy
from tests.pulsars import Pulsar

Make = Callable[..., PulsarRestBackend]
_RUNTIME = RuntimeOptions("bubblewrap", images=[("alpine", "host")]).document()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, pulsar_programs: pathlib.Path) -> Iterator[Pulsar]:
    """A Pulsar that is not restarted."""
    with Pulsar(tmp_path_factory.mktemp("pulsar"), pulsar_programs) as pulsar:
        yield pulsar


def backend_at(
    url: str, token: str, *, manager: str = "", timeout_s: float = 30.0, **options: Any
) -> PulsarRestBackend:
    address = PulsarAddress("site", url, manager=manager, token=token, timeout_s=timeout_s)
    health = Health()
    chosen = PulsarOptions(**{"runtime": _RUNTIME, "gone_s": 0.0, **options})
    return PulsarRestBackend(PulsarServer(address, health), health, Capacity(64), chosen)


@pytest.fixture
async def backend(server: Pulsar, bubblewrap: Mapping[str, object]) -> AsyncIterator[PulsarRestBackend]:
    async with backend_at(server.url, server.token) as backend:
        yield backend


@pytest.fixture
async def restarted(pulsar: Pulsar, bubblewrap: Mapping[str, object]) -> AsyncIterator[PulsarRestBackend]:
    """At a Pulsar of the test's own, which it may kill."""
    async with backend_at(pulsar.url, pulsar.token) as backend:
        yield backend


async def until(condition: Callable[[], object]) -> None:
    """Wait for a state; the test's own time limit ends a wait in vain."""
    while not condition():
        await asyncio.sleep(0.02)


# What Pulsar says of jobs.


async def test_a_job_that_runs_while_pulsar_is_restarted_is_followed_to_its_end_and_forgotten_there(
    pulsar: Pulsar, restarted: PulsarRestBackend
) -> None:
    job, handle = await started_job(restarted, script("echo ran >> /tmp/ran; sleep 3; cat /tmp/ran"))
    await until_running(restarted, handle, job)
    pulsar.kill()
    await until(lambda: not restarted.condition().ok)
    pulsar.start()
    events = await events_of(restarted, handle)
    assert [event.stdout for event in events if isinstance(event, ExecutorEnded)] == ["ran\n"]
    status = pulsar.call("GET", f"/jobs/{job.job_id}/status").json()
    assert status["status"] == "running"  # for ever
    await restarted.discard(handle)
    assert pulsar.jobs == []
    assert list((pulsar.folder / "persisted").glob("*-jobs/*")) == []


async def test_a_runner_that_died_with_its_watchdog_while_pulsar_was_down_is_found_by_a_roll_call(
    pulsar: Pulsar, restarted: PulsarRestBackend
) -> None:
    job, handle = await started_job(restarted, step("sleep", "1000"))
    _, other = await started_job(restarted, script("sleep 5; echo fine"))
    ends = [asyncio.ensure_future(end_of(restarted, one)) for one in (handle, other)]
    await until_running(restarted, handle, job)
    pulsar.kill()
    killed = [pid for pid in processes_with(job.job_id) if pid not in sandboxes(job.job_id)]
    for number in (signal.SIGSTOP, signal.SIGKILL):  # none is to see the other die
        for pid in killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    await until(lambda: not restarted.condition().ok)
    pulsar.start()
    end = await ends[0]
    assert end.outcome is Outcome.SYSTEM_ERROR
    assert "was killed while executor 0 ran; nothing of it runs any more" in str(end.reason)
    assert sandboxes(job.job_id) == []
    assert (await ends[1]).outcome is Outcome.COMPLETE  # it is not disturbed


def _lose_between_queue_and_start(server: Pulsar, job: Job, handle: Handle) -> None:
    """As Pulsar leaves a job when it is killed after it took it from its queue, and before it noted the process."""
    directory = pathlib.Path(handle["directory"])
    for name, text in (("runner.py", job.runner), ("job.json", job.document)):
        (directory / "inputs" / name).write_text(text, "ascii")
    for name in ("submitted", "preprocessed"):
        (directory / name).write_text("true", "ascii")
    assert server.call("GET", f"/jobs/{job.job_id}/status").json()["status"] == "queued"


@pytest.mark.parametrize("told_by", ["its long wait", "a job that came later"])
async def test_a_job_that_pulsar_lost_between_its_queue_and_the_start_is_started_again(
    server: Pulsar, backend: PulsarRestBackend, monkeypatch: pytest.MonkeyPatch, told_by: str
) -> None:
    monkeypatch.setattr(pulsar_rest, "_WAITS_LONG_S" if told_by == "its long wait" else "_LOST_AFTER_S", 1.0)
    job = await make_job(backend, script("echo ran >> /v/ran; cat /v/ran"), volumes=["/v"])
    handle = await backend.prepare(job)
    _lose_between_queue_and_start(server, job, handle)
    if told_by == "a job that came later":
        _, later = await started_job(backend, step("true"))
        assert (await end_of(backend, later)).outcome is Outcome.COMPLETE
    events = await events_of(backend, handle)
    assert [event.stdout for event in events if isinstance(event, ExecutorEnded)] == ["ran\n"]
    await backend.discard(handle)
    await until(lambda: not [place for place in server.jobs if "again" in place.name or place.name == job.job_id])


async def test_a_job_that_was_started_again_goes_on_when_the_service_is_restarted(
    server: Pulsar, bubblewrap: Mapping[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(pulsar_rest, "_WAITS_LONG_S", 1.0)
    notes = tmp_path / "notes"
    async with backend_at(server.url, server.token, notes=notes) as first:
        job = await make_job(first, script("echo ran >> /v/ran; sleep 6; cat /v/ran"), volumes=["/v"])
        handle = await first.prepare(job)
        _lose_between_queue_and_start(server, job, handle)
        following = asyncio.ensure_future(events_of(first, handle))
        await until(lambda: sandboxes(job.job_id))
        following.cancel()
    assert [note for note in notes.glob("*/tesapi-again-*") if note.read_text("ascii") == job.job_id]
    monkeypatch.setattr(pulsar_rest, "_HEALTHY_S", 0.5)  # so often are forgotten helpers looked for
    monkeypatch.setattr(pulsar_helpers, "_SET_UP_AFTER_S", 0.0)
    async with backend_at(server.url, server.token, notes=notes) as second:
        events = await events_of(second, handle)
        assert [event.stdout for event in events if isinstance(event, ExecutorEnded)] == ["ran\n"]
        await second.discard(handle)
        await until(lambda: not [place for place in server.jobs if "again" in place.name or place.name == job.job_id])
        await until(lambda: not list(notes.glob("*/tesapi-again-*")))


async def test_a_job_that_ended_while_pulsar_was_down_is_told_when_it_is_back(
    pulsar: Pulsar, restarted: PulsarRestBackend
) -> None:
    job, handle = await started_job(restarted, script("sleep 1"))
    await until_running(restarted, handle, job)
    pulsar.stop()
    await until(lambda: not processes_with(job.job_id))
    pulsar.start()
    assert (await end_of(restarted, handle)).outcome is Outcome.COMPLETE


async def test_a_job_whose_end_pulsar_had_half_noted_is_told_when_an_operator_has_mended_it(
    pulsar: Pulsar, restarted: PulsarRestBackend
) -> None:
    job, handle = await started_job(restarted, script("echo said"))
    await until(lambda: pulsar.call("GET", f"/jobs/{job.job_id}/status").json()["complete"] == "true")
    pulsar.kill()
    (pulsar.staging / job.job_id / "final_status").write_bytes(b"")
    (pulsar.staging / job.job_id / "postprocessed").unlink(missing_ok=True)
    (pulsar.folder / "persisted" / "_default_-postprocessing-jobs" / job.job_id).touch()
    pulsar.start()
    events = await events_of(restarted, handle)
    assert [event.stdout for event in events if isinstance(event, ExecutorEnded)] == ["said\n"]
    await restarted.discard(handle)
    assert not (pulsar.staging / job.job_id).exists()


async def test_a_cancel_while_pulsar_is_down_says_so_and_is_carried_out_when_it_is_back(
    pulsar: Pulsar, restarted: PulsarRestBackend
) -> None:
    running, first = await started_job(restarted, step("sleep", "1000"))
    await until_running(restarted, first, running)
    prepared = await make_job(restarted, step("true"))
    second = await restarted.prepare(prepared)
    pulsar.kill()
    for handle in (first, second):
        with pytest.raises(BackendUnavailable, match="site"):
            await restarted.cancel(handle)
    assert sandboxes(running.job_id)
    pulsar.start()
    await until(lambda: restarted.condition().ok)
    for handle, job in ((first, running), (second, prepared)):
        await restarted.cancel(handle)
        await restarted.start(handle, job)
        assert (await end_of(restarted, handle)).outcome is Outcome.CANCELED
        await restarted.discard(handle)
    assert pulsar.jobs == []


async def test_a_pulsar_that_gives_jobs_ids_of_its_own_is_followed_by_those(
    tmp_path: pathlib.Path, pulsar_programs: pathlib.Path, bubblewrap: Mapping[str, object]
) -> None:
    with Pulsar(tmp_path / "pulsar", pulsar_programs, app_options={"assign_ids": "uuid"}) as pulsar:
        async with backend_at(pulsar.url, pulsar.token) as backend:
            job, handle = await started_job(backend, step("echo", "hello"))
            assert handle["job_id"] != job.job_id
            assert (await end_of(backend, handle)).outcome is Outcome.COMPLETE
            await backend.discard(handle)
            assert pulsar.jobs == []


async def test_a_stream_that_is_no_text_does_not_hide_how_the_job_ended(
    server: Pulsar, bubblewrap: Mapping[str, object], tmp_path: pathlib.Path
) -> None:
    noisy = tmp_path / "noisy python"
    noisy.write_text("#!/bin/sh\nprintf '\\377\\376\\n' >&2\nexec python3 \"$@\"\n", "ascii")
    noisy.chmod(0o755)
    async with backend_at(server.url, server.token) as quiet:
        await runtime_of(quiet)
        runtime = await quiet.runtime()
    async with backend_at(server.url, server.token, python=str(noisy)) as backend:
        backend._found = runtime  # its probe is told through such a stream, and cannot be read
        _, handle = await started_job(backend, step("echo", "hello"))
        assert (await end_of(backend, handle)).outcome is Outcome.COMPLETE
        await until(lambda: not processes_with(handle["job_id"]))
        # For ever, from when Pulsar has noticed that it is over.
        await until(lambda: server.call("GET", f"/jobs/{handle['job_id']}/status").status_code == 500)
        await backend.discard(handle)
        assert handle["job_id"] not in {job.name for job in server.jobs}


async def test_a_report_that_pulsar_cuts_in_the_middle_is_told_whole(
    tmp_path: pathlib.Path, pulsar_programs: pathlib.Path, bubblewrap: Mapping[str, object]
) -> None:
    storage = tmp_path / "storage"
    storage.mkdir()
    with Pulsar(tmp_path / "pulsar", pulsar_programs, app_options={"maximum_stream_size": 4096}) as pulsar:
        async with backend_at(pulsar.url, pulsar.token) as backend:
            job = await make_job(
                backend,
                script("mkdir -p /out; cd /out; i=0; while [ $i -lt 300 ]; do echo $i > $i; i=$((i+1)); done"),
                outputs=[{"path": "/out", "url": f"file://{storage}/out", "type": "DIRECTORY"}],
                storage={"file": {"roots": [str(storage)]}},
            )
            handle = await backend.prepare(job)
            await backend.start(handle, job)
            events = await events_of(backend, handle)
            await until(lambda: not processes_with(job.job_id))
            cut: list[str] = []
            await until(lambda: cut.append(_stdout_at(pulsar, job.job_id)) or cut[-1])
    assert "\n..\n" in cut[-1]
    assert len([event for event in events if isinstance(event, OutputStored)]) == 300
    assert [event.seq for event in events] == list(range(1, len(events) + 1))


def _stdout_at(pulsar: Pulsar, job_id: str) -> str:
    """What Pulsar has of a job's output, once it has noticed that it is over."""
    return str(pulsar.call("GET", f"/jobs/{job_id}/status").json().get("job_stdout", ""))


async def test_a_folder_that_is_not_there_may_come_back_and_is_given_up_after_a_while(
    server: Pulsar, bubblewrap: Mapping[str, object]
) -> None:
    async with backend_at(server.url, server.token, gone_s=2.0) as backend:
        job, handle = await started_job(backend, script("sleep 3; echo fine"))
        await until_running(backend, handle, job)
        directory = pathlib.Path(handle["directory"])
        end = asyncio.ensure_future(end_of(backend, handle))
        directory.rename(directory.with_name("away"))
        await asyncio.sleep(1.0)
        directory.with_name("away").rename(directory)
        assert (await end).outcome in {Outcome.COMPLETE, Outcome.SYSTEM_ERROR}  # the runner may have noticed
        while directory.exists():
            shutil.rmtree(directory, ignore_errors=True)
        with pytest.raises(JobLost, match=r"site has no trace of the job .* any more, and so of how it ended"):
            await events_of(backend, handle)


async def test_a_python_that_is_not_there_is_told_in_one_sentence(
    server: Pulsar, bubblewrap: Mapping[str, object]
) -> None:
    async with backend_at(server.url, server.token) as whole:
        runtime = await runtime_of(whole)
    async with backend_at(server.url, server.token, python="/no/python3") as backend:
        await until(
            lambda: "found out which" in backend.condition().sentence and "/no/python3" in backend.condition().sentence
        )
        assert not backend.condition().ok
        backend._found = runtime
        _, handle = await started_job(backend, step("true"))
        end = await end_of(backend, handle)
        assert end.outcome is Outcome.SYSTEM_ERROR
        assert str(end.reason).startswith("The job's runner could not begin at site: it ended with exit code 127: ")
        assert "/no/python3" in str(end.reason)


async def test_a_job_that_takes_longer_than_the_operator_allows_is_stopped(
    server: Pulsar, bubblewrap: Mapping[str, object]
) -> None:
    async with backend_at(server.url, server.token, poll_interval_s=0.5, max_polls=4) as backend:
        job, handle = await started_job(backend, step("sleep", "1000"))
        end = await end_of(backend, handle)
        assert end.outcome is Outcome.SYSTEM_ERROR
        assert "longer than max_polls (4) times poll_interval (0.5 s)" in str(end.reason)
        assert sandboxes(job.job_id) == []


async def test_a_job_is_followed_through_any_number_of_polls(
    server: Pulsar, bubblewrap: Mapping[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulsar_rest, "_YOUNG_S", 0.0)
    async with backend_at(server.url, server.token, poll_interval_s=0.001) as backend:
        _, handle = await started_job(backend, script("sleep 8; echo fine"))
        end = asyncio.ensure_future(end_of(backend, handle))
        await until(lambda: handle["job_id"] in backend._jobs)
        followed = backend._jobs[handle["job_id"]]
        assert (await end).outcome is Outcome.COMPLETE
    assert followed.looks > 100  # at the interval that is the default, these are a quarter of an hour


async def test_a_document_that_may_hold_credentials_is_closed_to_others(backend: PulsarRestBackend) -> None:
    job, handle = await started_job(backend, step("sleep", "1000"))
    await until_running(backend, handle, job)
    document = pathlib.Path(handle["directory"], "inputs", "job.json")
    assert document.stat().st_mode & 0o077 == 0
    await backend.cancel(handle)
    assert (await end_of(backend, handle)).outcome is Outcome.CANCELED


# What it costs.


async def test_few_connections_serve_many_jobs_and_streams_are_fetched_only_while_somebody_reads(
    server: Pulsar, bubblewrap: Mapping[str, object]
) -> None:
    with Proxy(server.url) as proxy:
        async with backend_at(proxy.url, server.token) as backend:
            job, watched = await started_job(backend, script("echo so far; sleep 1000"))
            others = [(await started_job(backend, step("sleep", "2")))[1] for _ in range(8)]
            ends = asyncio.gather(*(end_of(backend, handle) for handle in others))
            most, pool = 0, backend._server._client._transport._pool  # type: ignore[attr-defined]
            while not ends.done():
                most = max(most, len(pool.connections))
                await asyncio.sleep(0.005)
            assert {end.outcome for end in await ends} == {Outcome.COMPLETE}
            assert 1 <= most <= 4
            asked = proxy.count(r"GET .*/files$")
            await until_running(backend, watched, job)
            for _ in range(20):
                await backend.tails(watched)
            assert proxy.count(r"GET .*/files$") - asked < 15  # twenty questions within a moment are one
            await backend.cancel(watched)
            await end_of(backend, watched)


async def test_the_token_stands_in_no_log_and_no_error(
    server: Pulsar, bubblewrap: Mapping[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("httpx").setLevel(logging.WARNING)  # as `tesapi.logs` has it
    logging.getLogger("httpcore").setLevel(logging.WARNING)
    with caplog.at_level(logging.INFO):
        async with backend_at(server.url, server.token) as backend:
            _, handle = await started_job(backend, step("true"))
            await end_of(backend, handle)
            await backend.discard(handle)
        async with backend_at("http://127.0.0.1:9", server.token) as backend:
            await until(lambda: backend.condition().state == "down")
            with pytest.raises(BackendUnavailable) as away:
                await backend.prepare(await_job_stand_in())
    assert server.token not in caplog.text + str(away.value) + backend.condition().sentence


def await_job_stand_in() -> Any:
    """Whatever is to be prepared where nothing can be."""
    return None


# What keeps one from being used.


class _Answering(http.server.BaseHTTPRequestHandler):
    """Whatever is no Pulsar of today: there is none to be had."""

    body = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=UTF-8")
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        return


@contextlib.contextmanager
def answering(body: bytes, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    handler = type("Handler", (_Answering,), {"body": body})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        if tls is not None:
            # In the thread of the connection: one whose client has gone is not to keep the next one waiting.
            web.socket = tls.wrap_socket(web.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield f"{'http' if tls is None else 'https'}://localhost:{web.server_address[1]}"
        web.shutdown()
        thread.join()


async def test_a_wrong_token_is_told(server: Pulsar) -> None:
    async with backend_at(server.url, "wrong") as backend:
        await until(lambda: backend.condition().state == "misconfigured")
        assert backend.condition().sentence == f"site ({server.url}) does not accept the token (private_token)."
        with pytest.raises(BackendUnavailable, match="does not accept the token"):
            await backend.runtime()


async def test_a_manager_that_is_not_there_is_told(server: Pulsar) -> None:
    async with backend_at(server.url, server.token, manager="slurm") as backend:
        await until(lambda: backend.condition().state == "misconfigured")
        assert backend.condition().sentence.startswith("site has no manager 'slurm', or is no Pulsar: ")


async def test_a_pulsar_that_is_too_old_is_told() -> None:
    with answering(b'{"version": "0.14.2"}') as url:
        async with backend_at(url, "") as backend:
            await until(lambda: backend.condition().state == "misconfigured")
            assert backend.condition().sentence == "site is a Pulsar 0.14.2; 0.15 is the oldest."


async def test_what_is_no_pulsar_is_told() -> None:
    with answering(b"<html>It works!</html>") as url:
        async with backend_at(url, "") as backend:
            await until(lambda: backend.condition().state == "misconfigured")
            assert backend.condition().sentence == "site is no Pulsar: the answer is not JSON; is it a Pulsar?."


async def test_a_pulsar_for_galaxys_tools_only_is_told(tmp_path: pathlib.Path, pulsar_programs: pathlib.Path) -> None:
    (tmp_path / "tools.xml").write_text("<toolbox></toolbox>", "ascii")
    options = {"tool_config_files": str(tmp_path / "tools.xml")}
    with Pulsar(tmp_path / "pulsar", pulsar_programs, app_options=options) as pulsar:
        async with backend_at(pulsar.url, pulsar.token) as backend:
            await until(lambda: "tool_config_files" in backend.condition().sentence)
            assert not backend.condition().ok


async def test_a_pulsar_behind_tls_is_trusted_by_its_authority_only(tmp_path: pathlib.Path) -> None:
    authority = trustme.CA()
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(tls)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with answering(b'{"version": "0.16.0"}', tls) as url:
        for ca, state in ((tmp_path / "ca.pem", "starting"), (None, "down")):
            health = Health()
            address = PulsarAddress("site", url, ca=ca)
            async with PulsarRestBackend(
                PulsarServer(address, health), health, Capacity(1), PulsarOptions()
            ) as backend:
                await until(lambda health=health: health.standing.value != "starting")  # type: ignore[misc]
                assert backend.condition().state == state  # which runtime works there, it does not tell
                if ca is None:
                    assert "CERTIFICATE_VERIFY_FAILED" in backend.condition().sentence


# Networks.


@pytest.fixture
async def behind_proxy(
    server: Pulsar, bubblewrap: Mapping[str, object]
) -> AsyncIterator[tuple[PulsarRestBackend, Proxy]]:
    with Proxy(server.url) as proxy:
        async with backend_at(proxy.url, server.token, timeout_s=2.0) as backend:
            await runtime_of(backend)
            yield backend, proxy


@pytest.mark.parametrize("fault", ["cut", "stall", "reset_after"])
async def test_a_job_is_followed_through_a_fault_of_the_network(
    behind_proxy: tuple[PulsarRestBackend, Proxy], fault: str
) -> None:
    backend, proxy = behind_proxy
    job, handle = await started_job(backend, script("echo ran >> /tmp/ran; sleep 2; cat /tmp/ran"))
    events = asyncio.ensure_future(events_of(backend, handle))
    await until(lambda: sandboxes(job.job_id))
    getattr(proxy, fault)(*([40] if fault == "reset_after" else []))
    await until(lambda: not backend.condition().ok)
    await until(lambda: not processes_with(job.job_id))  # it ends, while nobody can tell
    assert backend.condition().state == "down"
    proxy.heal()
    told = await events
    assert [event.stdout for event in told if isinstance(event, ExecutorEnded)] == ["ran\n"]
    assert backend.condition().ok
    await backend.discard(handle)


@pytest.mark.parametrize("answer_bytes", [0, 30])
async def test_a_start_whose_answer_was_lost_runs_the_job_once(
    behind_proxy: tuple[PulsarRestBackend, Proxy], server: Pulsar, answer_bytes: int
) -> None:
    backend, proxy = behind_proxy
    job = await make_job(backend, script("echo ran >> /v/ran; sleep 0.5; cat /v/ran"), volumes=["/v"])
    handle = await backend.prepare(job)
    uploaded = asyncio.Event()
    original = backend._server.submit

    async def submit(job_id: str, command_line: str) -> None:
        uploaded.set()
        proxy.reset_after(answer_bytes)
        await original(job_id, command_line)

    backend._server.submit = submit  # type: ignore[method-assign]
    with pytest.raises(BackendUnavailable):
        await backend.start(handle, job)
    backend._server.submit = original  # type: ignore[method-assign]
    proxy.heal()
    while True:
        try:
            await backend.start(handle, job)
            break
        except BackendUnavailable:
            await asyncio.sleep(0.1)
    events = await events_of(backend, handle)
    assert [event.stdout for event in events if isinstance(event, ExecutorEnded)] == ["ran\n"]


async def test_a_place_that_was_made_without_an_answer_is_removed_by_its_address(
    behind_proxy: tuple[PulsarRestBackend, Proxy], server: Pulsar
) -> None:
    backend, proxy = behind_proxy
    job = await make_job(backend, step("true"))
    proxy.reset_after(0)
    with pytest.raises(BackendUnavailable):
        await backend.prepare(job)
    proxy.heal()
    assert job.job_id in {place.name for place in server.jobs}
    while True:
        try:
            await backend.discard(backend.address(job.job_id))
            break
        except BackendUnavailable:
            await asyncio.sleep(0.1)
    assert job.job_id not in {place.name for place in server.jobs}


def _logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == pulsar_rest.__name__]


async def test_what_keeps_a_destination_from_taking_jobs_is_logged_once(
    server: Pulsar, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulsar_rest, "_HEALTHY_S", 0.1)
    async with backend_at(server.url, "wrong") as backend:
        await until(lambda: backend._server.requests >= 2)
        assert backend.condition().state == "misconfigured"
    assert _logged(caplog) == [f"site: site ({server.url}) does not accept the token (private_token)."]


async def test_a_helper_is_removed_whose_set_up_was_not_answered(
    pulsar: Pulsar, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(pulsar_helpers, "_SET_UP_AFTER_S", 0.0)
    backend = backend_at(pulsar.url, pulsar.token, notes=tmp_path / "notes")
    set_up, answered = backend._server.set_up, False

    async def lose_the_first_answer(job_id: str) -> JobSetUp:
        nonlocal answered
        place = await set_up(job_id)
        if not answered:
            answered = True
            raise BackendUnavailable("site broke the connection off.")
        return place

    monkeypatch.setattr(backend._server, "set_up", lose_the_first_answer)
    monkeypatch.setattr(pulsar_rest, "_HEALTHY_S", 0.1)
    monkeypatch.setattr(pulsar_rest, "_PROBE_AGAIN_S", 0.1)
    async with backend:
        await until(lambda: backend._probed and not pulsar.jobs)
        await until(lambda: not list((tmp_path / "notes").glob("*/tesapi-probe-*")))


async def test_dispatchers_that_share_a_folder_leave_each_others_helpers_to_run(
    server: Pulsar, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(pulsar_rest, "_HEALTHY_S", 0.1)  # so often are forgotten helpers looked for
    slow = tmp_path / "python"
    slow.write_text(f'#!/bin/sh\nsleep 3\nexec {sys.executable} "$@"\n', "ascii")
    slow.chmod(0o755)
    at_it = functools.partial(backend_at, server.url, server.token, python=str(slow), notes=tmp_path / "notes")
    async with at_it() as first, at_it() as second:
        await until(lambda: first._probed and second._probed)
        assert [text for text in _logged(caplog) if "could not be found out" in text] == []
        await until(lambda: [job.name for job in server.jobs if "probe" in job.name] == [])


async def test_a_probe_that_cannot_run_is_not_sent_again_at_once(
    server: Pulsar, caplog: pytest.LogCaptureFixture
) -> None:
    async with backend_at(server.url, server.token, python="no-such-python") as backend:
        await until(lambda: "no-such-python: command not found" in backend.condition().sentence)
        asked = backend._server.requests
        await until(lambda: backend._server.requests >= asked + 3)  # how it is, and nothing else
        assert [job.name for job in server.jobs if "probe" in job.name] == []
        assert [message.split(":")[1] for message in _logged(caplog)] == [
            " It could not be found out which container runtime works"
        ]
