"""The runner as one text file."""

from __future__ import annotations

import marshal
import os
import pathlib
import subprocess
import sys
import zlib
from collections.abc import Mapping

import pytest

from tesapi.jobs.bundle import CODE_SUFFIX, runner_code, runner_text
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
    place.python = python
    assert outcome(place.run(step("true"))) == ("complete", None)


def _usage(place: JobPlace, code: bytes, python: str = sys.executable) -> bytes:
    """What the runner says without a job, with `code` beside it."""
    place.write(step("true"))
    program = place.command(python)[3]
    with open(program + CODE_SUFFIX, "wb") as file:  # noqa: PTH123 - beside a program that is text
        file.write(code)
    run = subprocess.run([python, "-I", "-S", program], capture_output=True, check=False, timeout=30)
    os.unlink(program + CODE_SUFFIX)  # noqa: PTH108
    return run.stderr


def _telltale(tag: str | None) -> bytes:
    """Compiled modules that say so when they are used."""
    modules = marshal.loads(runner_code()[len(marshal.dumps(_tag())) :])
    told = compile("def main(arguments): sys.exit('compiled')\nimport sys", "telltale", "exec")
    return marshal.dumps(tag) + marshal.dumps({**modules, "tesapi_runner.__main__": zlib.compress(marshal.dumps(told))})


def _tag() -> str:
    tag = marshal.loads(runner_code())  # the first of two values
    assert isinstance(tag, str)
    return tag


def test_modules_compiled_for_this_python_are_used(place: JobPlace) -> None:
    assert _usage(place, _telltale(_tag())) == b"compiled\n"


@pytest.mark.parametrize("tag", ["of another text", None])
def test_modules_compiled_from_another_text_are_not_used(place: JobPlace, tag: str | None) -> None:
    assert _usage(place, _telltale(tag)).startswith(b"usage: ")


@pytest.mark.parametrize("code", [b"", runner_code()[:20], b"no code at all"])
def test_damaged_compiled_modules_are_passed_by(place: JobPlace, code: bytes) -> None:
    assert _usage(place, code).startswith(b"usage: ")


@pytest.mark.parametrize("python", pythons())
def test_no_python_fails_on_what_was_compiled_for_another(place: JobPlace, python: str) -> None:
    assert _usage(place, runner_code(), python).startswith(b"usage: ")


def test_it_says_how_it_is_called(place: JobPlace) -> None:
    place.write(step("true"))
    run = subprocess.run(place.command()[:4], capture_output=True, check=False, timeout=30)
    assert (run.returncode, run.stdout, run.stderr) == (
        2,
        b"",
        b"usage: runner.py [--sweep] JOB.JSON | --roll-call CALLS.JSON | --probe OPTIONS.JSON\n",
    )
