"""The runner as one text file."""

from __future__ import annotations

import pathlib
import subprocess
from collections.abc import Mapping

import pytest

from tesapi.jobs.bundle import runner_text
from tests.jobs import JobPlace, outcome, pythons, step


@pytest.fixture
def place(tmp_path: pathlib.Path, bubblewrap: Mapping[str, object]) -> JobPlace:
    return JobPlace(tmp_path, bubblewrap)


def test_it_is_ascii_text_of_modest_size() -> None:
    text = runner_text("1.2.3")
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 130
    assert len(text) < 100_000
    assert "tesapi 1.2.3" in text.splitlines()[0]


@pytest.mark.parametrize("python", pythons())
def test_it_runs_on_every_python_here_without_site_packages(place: JobPlace, python: str) -> None:
    assert outcome(place.run(step("true"), python=python)) == ("complete", None)


def test_it_says_how_it_is_called(place: JobPlace) -> None:
    place.write(step("true"))
    run = subprocess.run(place.command()[:4], capture_output=True, check=False, timeout=30)
    assert (run.returncode, run.stdout, run.stderr) == (2, b"", b"usage: runner.py [--sweep] JOB.JSON\n")
