"""A runner's report, as it comes back from a Pulsar that may have cut it."""

from __future__ import annotations

import json

from tesapi.backends.pulsar_jobs import read_report
from tesapi.tes.events import JobEnded, JobNoted, OutputStored

_AT = "2026-01-01T00:00:00.000000Z"


def _report(outputs: int) -> str:
    lines: list[dict[str, object]] = [{"event": "started", "host": "node"}]
    lines += [{"event": "output", "url": f"file:///o/{n}", "path": f"/o/{n}", "size_bytes": n} for n in range(outputs)]
    lines.append({"event": "ended", "outcome": "complete"})
    return "".join(json.dumps({"seq": n, "at": _AT, **line}) + "\n" for n, line in enumerate(lines, 1))


def _cut(stdout: str, size: int) -> str:
    """As Pulsar does it to a stream that is longer than `size`: the middle is gone."""
    half = size // 2
    return f"{stdout[:half]}\n..\n{stdout[-half:]}"


def test_a_whole_report_is_read() -> None:
    report = read_report(_report(outputs=3))
    assert [event.event for event in report] == ["started", "output", "output", "output", "ended"]


def test_what_is_not_a_report_has_no_events() -> None:
    for text in ("", "\n", "Traceback: no", "{}", '{"seq": 1}', "[]\n[]", "\0" * 10, _report(1)[5:]):
        assert read_report(text) == []


def test_a_report_that_broke_off_is_read_as_far_as_it_goes() -> None:
    report = read_report(_report(outputs=3)[:-20])
    assert [event.event for event in report] == ["started", "output", "output", "output"]


def test_what_follows_a_gap_is_not_believed_where_nothing_was_cut() -> None:
    lines = _report(outputs=3).splitlines(keepends=True)
    assert len(read_report("".join(lines[:2] + lines[3:]))) == 2


def test_a_report_that_was_cut_says_how_much_is_missing_and_keeps_its_end() -> None:
    whole = _report(outputs=1000)
    for size in range(5000, 5400, 7):  # wherever in a line it was cut
        report = read_report(_cut(whole, size))
        assert [event.seq for event in report] == list(range(1, len(report) + 1))
        assert isinstance(report[-1], JobEnded)
        (note,) = [event for event in report if isinstance(event, JobNoted)]
        kept = sum(isinstance(event, OutputStored) for event in report)
        assert note.text.startswith(f"{1000 - kept} entries of the job's report are missing here")


def test_a_report_whose_end_was_cut_off_has_none() -> None:
    report = read_report(_cut(_report(outputs=1000), 60))
    assert not any(isinstance(event, JobEnded) for event in report)
