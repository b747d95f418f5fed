"""Real Pulsar servers: installed once into an environment of their own, started in a folder of a test's own."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import httpx

from tests.daemon import Daemon, free_port
from tests.engines import Missing
from tests.jobs import processes_with, until

_LOCK = pathlib.Path(__file__).with_name("pulsar.lock")
_INSTALLED = "installed"


def install() -> pathlib.Path:
    """The folder with the programs of Pulsar; installed if need be. Raises Missing.

    It lies outside of the repository under the digest of its lock file, and serves every later run.
    """
    digest = hashlib.sha256(_LOCK.read_bytes() + sys.version.encode()).hexdigest()[:16]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "tesapi-tests"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Missing(f"needs a folder for Pulsar's programs: {error}") from error
    home = cache / f"pulsar-{digest}"
    with (cache / f"pulsar-{digest}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes of a test run one installs, the others wait
        if not (home / _INSTALLED).exists():
            shutil.rmtree(home, ignore_errors=True)
            _run(sys.executable, "-m", "venv", str(home))
            pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            _run(*pip, "--require-hashes", "-r", str(_LOCK))
            (home / _INSTALLED).touch()
    return home / "bin"


def _run(*command: str) -> None:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise Missing(f"needs Pulsar (pip install -r {_LOCK}): {run.stderr.strip()[-1000:]}")


class Pulsar(Daemon):
    """A Pulsar whose files lie in `folder`: over REST at `url`, or without a web server, behind a message queue.

    Leaving it ends the server, and whatever still runs of its jobs.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        programs: pathlib.Path,
        *,
        managers: Mapping[str, Mapping[str, object]] | None = None,
        private_token: str | None = None,
        app_options: Mapping[str, object] | None = None,
        message_queue_url: str | None = None,
        web: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(folder, "Pulsar")
        assert web or message_queue_url, "a Pulsar without a web server is reached over a message queue"
        self.staging = folder / "staging"
        self.token = secrets.token_hex(8) if private_token is None else private_token
        self.managers = managers or {"_default_": {"type": "queued_python", "min_polling_interval": 0.05}}
        self._programs = programs
        self._web = web
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._environment = dict(environment or {})
        self.options: dict[str, Any] = {
            "staging_directory": str(self.staging),
            "persistence_directory": str(folder / "persisted"),
            "private_token": self.token,
            "managers": self.managers,
            **({"message_queue_url": message_queue_url} if message_queue_url else {}),
            **(app_options or {}),
        }
        self._client = httpx.Client(timeout=30)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._client.close()
        self.kill_jobs()

    def start(self) -> None:
        self._mend()
        super().start()

    def _mend(self) -> None:
        """Do what an operator has to do where Pulsar was killed just when it noted how a job ended (docs/pulsar.md)."""
        for note in (self.folder / "persisted").glob("*-postprocessing-jobs/*"):
            status = self.staging / note.name / "final_status"
            if status.exists() and not status.read_bytes():
                status.unlink()
                note.unlink()

    @property
    def jobs(self) -> list[pathlib.Path]:
        """The job directories that are there now."""
        return sorted(self.staging.glob("*")) if self.staging.is_dir() else []

    def kill_jobs(self) -> None:
        """End whatever runs of its jobs by -9."""

        def none_left() -> bool:
            pids = {*processes_with(f"{self.staging}/"), *self._working()}
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not pids

        until(none_left, "the end of a Pulsar's jobs")

    def _working(self) -> list[int]:
        """Processes that are in a folder of its jobs."""
        found = []
        for link in pathlib.Path("/proc").glob("[0-9]*/cwd"):
            with contextlib.suppress(OSError):
                if link.readlink().is_relative_to(self.staging):
                    found.append(int(link.parent.name))
        return found

    def call(self, method: str, path: str, manager: str | None = None, **query: Any) -> httpx.Response:
        """One request as Pulsar wants it, with all parameters in the query; `content` is the body."""
        content = query.pop("content", None)
        base = self.url if manager is None else f"{self.url}/managers/{manager}"
        query = {name: value if isinstance(value, str) else json.dumps(value) for name, value in query.items()}
        return self._client.request(
            method, base + path, params={"private_token": self.token, **query}, content=content
        )  # fmt: skip

    def _command(self) -> tuple[list[str], dict[str, str]]:
        home = self.folder / "home"  # gunicorn writes into it
        home.mkdir(exist_ok=True)
        (self.folder / "app.yml").write_text(json.dumps(self.options), "utf-8")  # JSON is YAML
        ini = f"[server:main]\nhost = 127.0.0.1\nport = {self._port}\n[app:main]\napp_config = %(here)s/app.yml\n"
        (self.folder / "server.ini").write_text(ini if self._web else _LOGGING, "utf-8")
        environment = {
            "PATH": f"{self._programs}:{os.environ['PATH']}",
            "HOME": str(home),
            "PYTHONUNBUFFERED": "1",
            **self._environment,
        }
        if self._web:
            return [str(self._programs / "pulsar-serve"), str(self.folder / "server.ini")], environment
        return [str(self._programs / "pulsar-main"), "-c", str(self.folder)], environment

    def _ready(self) -> bool:
        if not self._web:
            # It says nothing when it is up; what is sent before that waits in the queues.
            return (self.folder / "persisted").is_dir()
        try:
            self.call("GET", "/healthz")  # any answer: one without a default manager gives 500
        except httpx.TransportError:
            return False
        return True


_LOGGING = """\
[loggers]
keys = root
[handlers]
keys = console
[formatters]
keys = plain
[logger_root]
level = DEBUG
handlers = console
[handler_console]
class = StreamHandler
args = (sys.stderr,)
formatter = plain
[formatter_plain]
format = %(asctime)s %(levelname)s [%(name)s] %(message)s
"""
