"""The runner as one text file."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tesapi.jobs.bundle import runner_text
from tests.jobs import JobPlace, outcome, step


def _pythons() -> list[str]:
    """Every Python from 3.9 on that can be found: on PATH, and among pyenv's versions."""
    named = [shutil.which(f"python3.{minor}") for minor in range(9, 16)]
    kept = sorted(pathlib.Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser().glob("versions/3.*/bin/python3"))
    found = {path for path in (*named, *map(str, kept)) if path is not None and _new_enough(path)}
    return sorted(found | {sys.executable})


def _new_enough(python: str) -> bool:
    check = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 9))"]
    return subprocess.run(check, capture_output=True, check=False).returncode == 0


def test_it_is_ascii_text_of_modest_size() -> None:
    text = runner_text("1.2.3")
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 130
    assert len(text) < 100_000
    assert "tesapi 1.2.3" in text.splitlines()[0]


@pytest.mark.parametrize("python", _pythons())
def test_it_runs_on_every_python_here_without_site_packages(place: JobPlace, python: str) -> None:
    assert outcome(place.run(step("true"), python=python)) == ("complete", None)


def test_it_says_how_it_is_called(place: JobPlace) -> None:
    place.write(step("true"))
    run = subprocess.run(place.command()[:4], capture_output=True, check=False, timeout=30)
    assert (run.returncode, run.stdout, run.stderr) == (2, b"", b"usage: runner.py [--sweep] JOB.JSON\n")
