"""A real RabbitMQ node of a test's own, with an epmd of its own."""

from __future__ import annotations

import os
import pathlib
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from tests.daemon import Daemon, answers, free_port
from tests.engines import Missing

_PROGRAMS = pathlib.Path("/usr/lib/rabbitmq/bin")  # Debian's wrappers in /usr/sbin become another user


class Rabbit(Daemon):
    """A node on loopback whose files lie in `folder`; `conf` are further lines of its configuration. Raises Missing.

    Users: guest with password guest, and whoever `add_user` adds.
    """

    def __init__(self, folder: pathlib.Path, conf: Sequence[str] = ()) -> None:
        super().__init__(folder, "RabbitMQ")
        if not (_PROGRAMS / "rabbitmq-server").exists() or shutil.which("epmd") is None:
            raise Missing("needs RabbitMQ (apt-get install rabbitmq-server)")
        self.port = free_port()
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        self._epmd = _Epmd(folder / "epmd")
        distribution = free_port()
        for name in ("home", "mnesia", "logs"):
            (folder / name).mkdir(exist_ok=True)
        (folder / "enabled_plugins").write_text("[].", "ascii")
        lines = [f"listeners.tcp.default = 127.0.0.1:{self.port}", *conf]
        (folder / "rabbitmq.conf").write_text("\n".join(lines) + "\n", "ascii")
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder / "home"),
            "RABBITMQ_NODENAME": f"test{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(distribution),
            # By default ten thousand above the node's, which may be no port at all.
            "RABBITMQ_CTL_DIST_PORT_MIN": "20000",
            "RABBITMQ_CTL_DIST_PORT_MAX": "29999",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd.port),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "logs"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +S 1:1 +sbwt none",
        }

    def __enter__(self) -> Self:
        self._epmd.start()
        try:
            return super().__enter__()
        except BaseException:
            self._epmd.kill()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._epmd.kill()

    def control(self, *arguments: str) -> list[str]:
        """What `rabbitmqctl` prints, line by line."""
        command = [str(_PROGRAMS / "rabbitmqctl"), "--quiet", *arguments]
        run = subprocess.run(
            command, env=self._environment, cwd=self.folder, capture_output=True, text=True, check=False, timeout=60
        )  # fmt: skip
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout.splitlines()

    def queues(self, vhost: str = "/") -> dict[str, int]:
        """Every queue, and how many messages are in it, taken and unacknowledged ones as well."""
        lines = self.control("list_queues", "--vhost", vhost, "--no-table-headers", "name", "messages")
        return {name: int(messages) for name, messages in (line.split("\t") for line in lines)}

    def purge(self, queue: str, vhost: str = "/") -> None:
        """Remove what waits in a queue."""
        self.control("purge_queue", queue, "--vhost", vhost)

    def add_vhost(self, vhost: str, user: str = "guest") -> str:
        """A new virtual host; its URL for guest."""
        self.control("add_vhost", vhost)
        self.control("set_permissions", "--vhost", vhost, user, ".*", ".*", ".*")
        return f"amqp://guest:guest@127.0.0.1:{self.port}/{vhost}"

    def close_connections(self, reason: str = "closed by a test") -> None:
        """Close every connection, as an operator may."""
        self.control("close_all_connections", reason)

    def _command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        return [str(_PROGRAMS / "rabbitmq-server")], self._environment

    def start(self) -> None:
        self._booted = self._boots() + 1
        super().start()

    def _boots(self) -> int:
        return self.log.read_bytes().count(b"completed with") if self.log.exists() else 0

    def _ready(self) -> bool:
        """Whether it greets, and has booted: it greets before it obeys."""
        if self._boots() < self._booted:
            return False
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(b"AMQP\x00\x00\x09\x01")
                return connection.recv(1) == b"\x01"
        except OSError:
            return False


class _Epmd(Daemon):
    """Where nodes of Erlang find each other; it outlives the node, so that a killed one can come back."""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder, "epmd")
        self.port = free_port()

    def _command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        command = ["epmd", "-address", "127.0.0.1", "-port", str(self.port)]
        return command, {"PATH": os.environ["PATH"], "HOME": str(self.folder)}

    def _ready(self) -> bool:
        return answers(self.port)
