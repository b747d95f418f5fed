"""What the last probe of a destination found is kept for the next start, as long as it is about the same."""

from __future__ import annotations

import pathlib

from tesapi.backends.pulsar_jobs import PROBE_NOTE, ProbeNote

ANSWER = {"found": {"kind": "docker"}, "sentence": "Containers are run by docker.", "batch": "Slurm"}


def test_an_answer_is_read_by_the_next_who_asks_the_same(tmp_path: pathlib.Path) -> None:
    about = ("1.0", "https://pulsar", "slurm", {"kind": "auto", "images": (("alpine", "host"),)})
    assert ProbeNote(tmp_path, about).read() is None
    ProbeNote(tmp_path, about).write(ANSWER)
    assert ProbeNote(tmp_path, about).read() == ANSWER
    assert [path.name for path in tmp_path.iterdir()] == [PROBE_NOTE]


def test_an_answer_about_something_else_is_none(tmp_path: pathlib.Path) -> None:
    ProbeNote(tmp_path, ("1.0", "https://pulsar", "slurm")).write(ANSWER)
    assert ProbeNote(tmp_path, ("1.1", "https://pulsar", "slurm")).read() is None
    assert ProbeNote(tmp_path, ("1.0", "https://pulsar", "")).read() is None


def test_a_note_that_cannot_be_read_or_written_is_none(tmp_path: pathlib.Path) -> None:
    note = ProbeNote(tmp_path, ())
    for text in ("", "{", "[]", "null", '{"about": [], "answer": 1}', '{"about": []}'):
        (tmp_path / PROBE_NOTE).write_text(text, "utf-8")
        assert note.read() is None
    ProbeNote(tmp_path / "none", ()).write(ANSWER)
    ProbeNote(None, ()).write(ANSWER)
    assert ProbeNote(None, ()).read() is None
