"""Real container engines for tests: started in a folder of their own, with images made of this machine's busybox."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pathlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator

from tesapi.runner.runtimes.engine import Engine, EngineAway, EngineRefused
from tests.jobs import pid_alive, until

_STARTING = pathlib.Path(tempfile.gettempdir(), "tesapi-tests-engine.lock")

IMAGES = ("alpine", "busybox", "debian:bookworm")


class Missing(Exception):
    """An engine that cannot be had here; the text says what it needs."""


class DockerEngine:
    """A Docker engine that lives in `folder`. `kill` and `start` are for tests of its absence."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.socket = str(folder / "docker.sock")
        self.engine = Engine(self.socket)

    def start(self) -> None:
        """Start the engine and wait until it answers."""
        # One after the other on this machine: engines that start together are in each other's way at the bridge and at
        # the firewall's chains that they share, and one of them ends.
        with _STARTING.open("ab") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            for _ in range(3):
                self._launch()
                with contextlib.suppress(AssertionError):
                    until(self._settled, "the Docker engine", patience_s=60)
                    if self._process is not None and self._process.poll() is None:
                        return
                self.kill()
            log = (self._folder / "log").read_text("utf-8", "replace")
            raise AssertionError(f"the Docker engine does not start: {log[-6000:]}")

    def _launch(self) -> None:
        command = ["dockerd", "--live-restore", "--data-root", self._path("data"), "--exec-root", self._path("exec")]
        command += ["--pidfile", self._path("pid"), "-H", f"unix://{self.socket}"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def kill(self) -> None:
        """End the engine as a crash would; its containers live on."""
        self._ended("kill")
        # Its containerd dies with it, and may stay a zombie for a while, which a new engine would wait for in vain.
        note = self._folder / "exec" / "containerd" / "containerd.pid"
        with contextlib.suppress(FileNotFoundError):
            until(lambda: not pid_alive(int(note.read_text("ascii"))), "the end of containerd")
            note.unlink()

    def stop(self) -> None:
        """Stop the engine and all its containers."""
        with contextlib.suppress(EngineAway, EngineRefused):
            for container in self.engine.call("GET", "/containers/json", None, {"all": "1"}):
                self.engine.call("DELETE", f"/containers/{container['Id']}", None, {"force": "1"})
        self._ended("terminate")

    def import_image(self, name: str, *changes: str) -> None:
        """Make an image of busybox; `changes` are lines of a Dockerfile."""
        repository, _, tag = name.partition(":")
        query = [("fromSrc", "-"), ("repo", repository), ("tag", tag or "latest")]
        query += [("changes", change) for change in changes]
        self.engine.call("POST", "/images/create", busybox_archive(), query)

    def containers(self, label: str) -> list[str]:
        """The ids of containers with `label`, running or not."""
        query = {"all": "1", "filters": json.dumps({"label": [label]})}
        return [str(found["Id"]) for found in self.engine.call("GET", "/containers/json", None, query)]

    def settings(self, **other: object) -> dict[str, object]:
        """What a job's document says of this engine."""
        return {
            "kind": "docker",
            "socket": self.socket,
            "network": "none",
            "user": "",
            "capabilities": [],
            "pids_limit": 4096,
            "pull": "never",
            "init": True,
            "config": "",
            **other,
        }

    def _path(self, name: str) -> str:
        return str(self._folder / name)

    def _settled(self) -> bool:
        """Whether it answers, or has ended instead."""
        if self._process is None or self._process.poll() is not None:
            return True
        try:
            self.engine.call("GET", "/version")
        except EngineAway:
            return False
        return True

    def _ended(self, how: str) -> None:
        if self._process is not None:
            getattr(self._process, how)()
            self._process.wait(timeout=60)
            self._process = None


@contextlib.contextmanager
def docker() -> Iterator[DockerEngine]:
    """A Docker engine with IMAGES. Raises Missing."""
    if shutil.which("dockerd") is None or os.getuid() != 0:
        raise Missing("needs a Docker engine: root, and dockerd (apt-get install docker.io)")
    # Not pytest's folder: the path of a Unix socket may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="tesapi-docker-", ignore_cleanup_errors=True) as folder:
        engine = DockerEngine(pathlib.Path(folder))
        engine.start()
        try:
            for name in IMAGES:
                engine.import_image(name)
            engine.import_image("with-user", "USER 1234:1234")
            engine.import_image("with-entrypoint", 'ENTRYPOINT ["/bin/echo", "entry"]', 'CMD ["cmd"]')
            yield engine
        finally:
            engine.stop()


def busybox_archive() -> bytes:
    """A root file system with this machine's static busybox, as tar. Raises Missing."""
    program = shutil.which("busybox")
    if program is None:
        raise Missing("needs a static busybox to make an image of (apt-get install busybox-static)")
    applets = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for folder in ("bin", "etc", "root", "usr", "usr/bin", "usr/lib", "usr/share", "var/tmp"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        tar.add(os.path.realpath(program), arcname="bin/busybox")
        for applet in applets:
            if applet != "busybox":
                link = tarfile.TarInfo(f"bin/{applet}")
                link.type, link.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(link)
        env = tarfile.TarInfo("usr/bin/env")
        env.type, env.linkname = tarfile.SYMTYPE, "/bin/busybox"
        tar.addfile(env)
        for name, text in _ETC.items():
            entry = tarfile.TarInfo(f"etc/{name}")
            entry.size, entry.mode = len(text), 0o644
            tar.addfile(entry, io.BytesIO(text.encode()))
    return data.getvalue()


_ETC = {"passwd": "root:x:0:0:root:/root:/bin/sh\nsomebody:x:1234:1234::/:/bin/sh\n", "group": "root:x:0:\n"}
