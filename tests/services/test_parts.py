"""The real services that other tests stand on, each shown to work and to fail as those tests expect."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.daemon import answers
from tests.jobs import processes_with, until
from tests.proxy import Proxy
from tests.pulsars import Pulsar
from tests.rabbit import Rabbit
from tests.slurm import Slurm


def _submit(pulsar: Pulsar, job_id: str, command: str, manager: str | None = None) -> None:
    setup = {"job_id": job_id}
    answer = pulsar.call("POST", f"/jobs/{job_id}/submit", manager, command_line=command, setup_params=setup)
    assert (answer.status_code, answer.text) == (200, "OK")


def _status(pulsar: Pulsar, job_id: str, manager: str | None = None) -> dict[str, Any]:
    return dict(pulsar.call("GET", f"/jobs/{job_id}/status", manager).json())


def _end(pulsar: Pulsar, job_id: str, manager: str | None = None) -> dict[str, Any]:
    def ended() -> dict[str, Any] | None:
        status = _status(pulsar, job_id, manager)
        return status if status["complete"] == "true" else None

    return dict(until(ended, f"the end of {job_id}"))


def test_pulsar_runs_a_job_over_rest(pulsar: Pulsar) -> None:
    assert httpx.get(f"{pulsar.url}/healthz").status_code == 401
    pulsar.call("POST", "/jobs", job_id="one")
    pulsar.call("POST", "/jobs/one/files", name="text", type="input", content=b"from a file")
    _submit(pulsar, "one", "cat ../inputs/text; (exit 3)")
    end = _end(pulsar, "one")
    assert (end["status"], end["returncode"], end["job_stdout"]) == ("complete", 3, "from a file")
    assert [job.name for job in pulsar.jobs] == ["one"]
    assert pulsar.call("DELETE", "/jobs/one").status_code == 200
    assert pulsar.jobs == []


@pytest.mark.parametrize("end", [Pulsar.stop, Pulsar.kill])
def test_a_restarted_pulsar_has_its_address_and_its_jobs_run_on(pulsar: Pulsar, end: Callable[[Pulsar], None]) -> None:
    _submit(pulsar, "long", "sleep 1000 # __PULSAR_JOB_DIRECTORY__\n")
    until(lambda: processes_with("/long/command.sh"), "the job")
    end(pulsar)
    with pytest.raises(httpx.TransportError):
        pulsar.call("GET", "/healthz")
    pulsar.start()
    assert _status(pulsar, "long")["status"] == "running"
    assert processes_with("/long/command.sh")
    pulsar.__exit__(None, None, None)
    assert processes_with(str(pulsar.staging)) == []


def test_pulsar_has_managers(tmp_path: pathlib.Path, pulsar_programs: pathlib.Path) -> None:
    managers = {name: {"type": "queued_python"} for name in ("_default_", "second")}
    with Pulsar(tmp_path / "pulsar", pulsar_programs, managers=managers, private_token="a token") as pulsar:
        _submit(pulsar, "one", "echo done", "second")
        assert _end(pulsar, "one", "second")["job_stdout"] == "done\n"


def test_pulsar_takes_a_job_from_a_message_queue(
    tmp_path: pathlib.Path, pulsar_programs: pathlib.Path, rabbit: Rabbit
) -> None:
    python = pulsar_programs / "python"  # kombu comes with Pulsar
    with Pulsar(tmp_path / "pulsar", pulsar_programs, message_queue_url=rabbit.url, web=False) as pulsar:
        until(lambda: "pulsar__setup" in rabbit.queues(), "Pulsar's queues")
        run = subprocess.run([python, "-c", _MESSAGES, rabbit.url], capture_output=True, text=True, timeout=60)
        assert (run.stdout, run.stderr) == ("complete from a message\n", "")
        assert [job.name for job in pulsar.jobs] == ["two"]
    assert rabbit.queues()["pulsar__status_update"] == 0


_MESSAGES = """
import sys
import kombu

setup = {
    "job_id": "two",
    "command_line": "cat ../inputs/text",
    "setup_params": {"job_id": "two"},
    "remote_staging": {
        "setup": [
            {"name": "text", "type": "input", "action": {"action_type": "message", "contents": "from a message"}},
        ],
    },
}
exchange = kombu.Exchange("pulsar", type="direct")
queue = kombu.Queue("pulsar__status_update", exchange, routing_key="pulsar__status_update")
with kombu.Connection(sys.argv[1]) as connection:
    queue(connection).declare()
    producer = connection.Producer()
    producer.publish(setup, exchange=exchange, routing_key="pulsar__setup", serializer="json")
    with connection.SimpleQueue(queue) as simple:
        while True:
            message = simple.get(timeout=30)
            message.ack()
            if message.payload["complete"] == "true":
                break
print(message.payload["status"], message.payload["job_stdout"])
"""


def test_rabbitmq_keeps_what_is_durable_when_it_is_killed(rabbit: Rabbit, pulsar_programs: pathlib.Path) -> None:
    url = rabbit.add_vhost("other")
    subprocess.run([pulsar_programs / "python", "-c", _PUBLISH, url], check=True, timeout=60)
    for end in (rabbit.kill, rabbit.stop):
        end()
        assert not answers(rabbit.port)
        rabbit.start()
        assert rabbit.queues("other") == {"kept": 5}
    rabbit.purge("kept", "other")
    assert rabbit.queues("other") == {"kept": 0}


_PUBLISH = """
import sys
import kombu

with kombu.Connection(sys.argv[1], transport_options={"confirm_publish": True}) as connection:
    with connection.SimpleQueue("kept") as simple:
        for number in range(5):
            simple.put(number)
"""


def test_slurm_runs_the_jobs_of_a_pulsar(slurm: Slurm, tmp_path: pathlib.Path, pulsar_programs: pathlib.Path) -> None:
    managers = {"slurm": {"type": "queued_cli", "job_plugin": "Slurm", "shell_plugin": "LocalShell", "job_ncpus": 1}}
    with Pulsar(tmp_path / "pulsar", pulsar_programs, managers=managers, environment=slurm.environment) as pulsar:
        _submit(pulsar, "one", "echo job $SLURM_JOB_ID; (exit 3)", "slurm")
        _submit(pulsar, "two", "sleep 1000", "slurm")
        end = _end(pulsar, "one", "slurm")
        assert (end["status"], end["returncode"], end["job_stdout"]) == ("complete", 3, "job 1\n")
        until(lambda: list(slurm.queue().values()) == ["RUNNING"], "the second job to run")
        slurm.stop()
        slurm.start()
        assert list(slurm.queue().values()) == ["RUNNING"]
        pulsar.call("PUT", "/jobs/two/cancel", "slurm")
        until(lambda: not slurm.queue(), "the second job to be canceled")


@pytest.fixture
def web(tmp_path: pathlib.Path) -> Iterator[str]:
    """The URL of a folder with one large file in it."""
    (tmp_path / "large").write_bytes(b"x" * 1_000_000)
    command = [sys.executable, "-u", "-m", "http.server", "--protocol", "HTTP/1.1", "--bind", "127.0.0.1", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        port = process.stdout.readline().split(b" port ")[1].split()[0].decode()
        yield f"http://127.0.0.1:{port}/large"
        process.terminate()


def test_a_proxy_passes_on_and_counts(web: str) -> None:
    with Proxy(web) as proxy, httpx.Client() as client:
        assert [len(client.get(f"{proxy.url}?secret").content) for _ in range(3)] == [1_000_000] * 3
        assert (proxy.connections, proxy.requests) == (1, ["GET /large"] * 3)
        assert proxy.count("^GET") == 3


def test_a_proxy_cuts_stalls_resets_and_heals(web: str) -> None:
    with Proxy(web) as proxy, httpx.Client(timeout=30) as client:
        assert client.get(proxy.url).status_code == 200
        proxy.cut()
        with pytest.raises((httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError)):
            client.get(proxy.url)
        with pytest.raises(httpx.ConnectError):
            client.get(proxy.url)
        proxy.heal()
        assert client.get(proxy.url).status_code == 200
        proxy.stall()
        with pytest.raises(httpx.ReadTimeout):
            client.get(proxy.url, timeout=0.3)
        proxy.heal()
        assert client.get(proxy.url).status_code == 200
        proxy.reset_after(500_000)
        with client.stream("GET", proxy.url) as answer:
            body = answer.iter_raw()
            assert next(body)
            with pytest.raises(httpx.ReadError):
                list(body)
        with pytest.raises(httpx.ReadError):
            client.get(proxy.url)
        proxy.heal()
        assert len(client.get(proxy.url).content) == 1_000_000
