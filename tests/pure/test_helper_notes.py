from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from tesapi.backends.helper_notes import HelperNotes
from tesapi.errors import ConfigurationProblem

_NOTES_AND_WAITS = """
import pathlib, sys, time
from tesapi.backends.helper_notes import HelperNotes
with HelperNotes(pathlib.Path(sys.argv[1])) as notes:
    notes.note("helper-1")
    notes.note("helper-2", "of job-2")
    print("noted", flush=True)
    time.sleep(600)
"""


def test_notes_are_read_again_and_forgotten(tmp_path: pathlib.Path) -> None:
    for folder in (tmp_path / "notes", None):
        with HelperNotes(folder) as notes:
            assert notes.durable == (folder is not None)
            notes.note("two", "of job-2")
            notes.note("one")
            assert notes.noted() == ["one", "two"]
            assert (notes.text("one"), notes.text("two")) == ("", "of job-2")
            assert 0 <= notes.age_s("one") + 0.1 < 60
            notes.forget("one")
            notes.forget("one")
            assert notes.noted() == ["two"]
            assert notes.adopt() == []


def test_only_what_a_process_left_when_it_was_killed_goes_over_to_another_and_to_one(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-c", _NOTES_AND_WAITS, str(tmp_path)]
    with HelperNotes(tmp_path) as first, HelperNotes(tmp_path) as second:
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"noted\n"
            second.note("helper-3")
            assert (first.adopt(), first.noted(), second.noted()) == ([], [], ["helper-3"])
            process.kill()
        assert first.adopt() == ["helper-1", "helper-2"]
        assert (second.adopt(), second.noted()) == ([], ["helper-3"])
        assert (first.noted(), first.text("helper-2")) == (["helper-1", "helper-2"], "of job-2")


def test_who_leaves_in_order_leaves_what_is_noted_and_nothing_else(tmp_path: pathlib.Path) -> None:
    with HelperNotes(tmp_path) as notes:
        notes.note("helper")
    with HelperNotes(tmp_path) as notes:
        assert notes.adopt() == ["helper"]
        notes.forget("helper")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_none_keeps_the_service_from_starting(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigurationProblem, match=r"file/site cannot be written or locked \(Not a directory\)"),
        HelperNotes(tmp_path / "file" / "site"),
    ):
        pass
