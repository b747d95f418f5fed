"""A real Slurm of one machine: munged, slurmctld and slurmd, in a folder of a test's own."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from tests.daemon import Daemon, answers, free_port
from tests.engines import Missing
from tests.jobs import until

_NEEDED = {"munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm"}


class Slurm:
    """A batch system whose one node is this machine. `proctrack` is `linuxproc` or `cgroup`. Raises Missing.

    `environment` is what its clients need, such as the Pulsar that submits to it. `folder` must be short (a Unix
    socket lies in it). `stop` and `kill` end the daemons, not the jobs; leaving it ends both.
    """

    def __init__(self, folder: pathlib.Path, proctrack: str = "linuxproc", cpus: int = 4) -> None:
        for program, package in _NEEDED.items():
            if shutil.which(program) is None:
                raise Missing(f"needs {program} (apt-get install {package})")
        if os.getuid() != 0:
            raise Missing("needs root: Slurm's node daemon starts jobs for others")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self.conf)}
        controller, node = free_port(), free_port()
        self._node = f"n{node}"  # its groups of processes are named after it
        for name in ("state", "spool"):
            (folder / name).mkdir(exist_ok=True)
        (folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\nIgnoreSystemd=yes\n", "ascii")
        host = socket.gethostname().partition(".")[0]
        self.conf.write_text(
            _CONF.format(
                folder=folder, host=host, controller=controller, node=node, proctrack=proctrack, cpus=cpus,
                name=self._node,
            ),
            "ascii",
        )  # fmt: skip
        self._daemons: list[Daemon] = [
            _Munge(folder / "munge", folder / "munge.socket"),
            _Part(folder / "slurmctld", ["slurmctld", "-D", "-f", str(self.conf)], self.environment, controller),
            _Part(folder / "slurmd", ["slurmd", "-D", "-f", str(self.conf)], self.environment, node),
        ]

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        until(self._nothing_left, "the end of Slurm's jobs")
        # Not by glob, which fails where the group of somebody else goes away meanwhile.
        for folder, names, _ in os.walk("/sys/fs/cgroup"):
            for name in [name for name in names if name.startswith("slurm") and self._node in name]:
                _remove_groups(pathlib.Path(folder, name))

    def start(self) -> None:
        """Start it and wait until its node takes jobs."""
        for daemon in self._daemons:
            daemon.start()
        until(self._has_a_node, "a node of Slurm", 60)

    def stop(self) -> None:
        """Stop its daemons; jobs go on."""
        for daemon in reversed(self._daemons):
            daemon.stop()

    def kill(self) -> None:
        """End its daemons as a crash would."""
        for daemon in reversed(self._daemons):
            daemon.kill()

    def command(self, *command: str) -> list[str]:
        """What one of its programs prints, line by line; nothing where it fails."""
        environment = {"PATH": os.environ["PATH"], **self.environment}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
        return run.stdout.splitlines() if run.returncode == 0 else []

    def queue(self) -> dict[str, str]:
        """The jobs that are not over: Slurm's number and its word for the state."""
        lines = self.command("squeue", "--noheader", "--format=%i %T")
        return dict(line.split() for line in lines)

    def _has_a_node(self) -> bool:
        states = self.command("sinfo", "--noheader", "--format=%T")
        return bool(states) and states[0] in ("idle", "mixed", "allocated")

    def _nothing_left(self) -> bool:
        """Whether nothing has this Slurm in its environment, as each job and step of it has; what has is killed."""
        found = False
        for environ in pathlib.Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if (
                    f"SLURM_CONF={self.conf}\0".encode() in environ.read_bytes()
                    and int(environ.parent.name) != os.getpid()
                ):
                    os.kill(int(environ.parent.name), signal.SIGKILL)
                    found = True
        return not found


class _Munge(Daemon):
    def __init__(self, folder: pathlib.Path, address: pathlib.Path) -> None:
        super().__init__(folder, "munged")
        folder.chmod(0o700)
        address.parent.chmod(0o755)  # where its socket lies, munged wants others to get at it
        self._address = address
        key = folder / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)

    def _command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        files = [f"--{name}-file={self.folder / name}" for name in ("key", "pid", "seed")]
        command = ["munged", "--foreground", "--force", f"--socket={self._address}", *files]
        return [*command, f"--log-file={self.folder / 'munged.log'}"], {"PATH": os.environ["PATH"]}

    def _ready(self) -> bool:
        with socket.socket(socket.AF_UNIX) as connection:
            return connection.connect_ex(str(self._address)) == 0


class _Part(Daemon):
    def __init__(self, folder: pathlib.Path, command: list[str], environment: Mapping[str, str], port: int) -> None:
        super().__init__(folder, command[0])
        self._argv = command
        self._port = port
        self._environment = environment

    def _command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        return self._argv, {"PATH": os.environ["PATH"], **self._environment}

    def _ready(self) -> bool:
        return answers(self._port)


def _remove_groups(group: pathlib.Path) -> None:
    for inner in sorted(group.glob("**/"), reverse=True):
        with contextlib.suppress(OSError):
            inner.rmdir()


_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MailProg=/bin/true
SchedulerParameters=sched_interval=1,defer_batch
ReturnToService=2
MpiDefault=none
KillWait=2
MinJobAge=60
NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={node} CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""
