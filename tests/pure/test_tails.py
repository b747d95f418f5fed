"""From successive tails of a stream to what is printed of it."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tesapi.cli.tails import MIN_OVERLAP, Tail, looks_cut, overlap

_TEXT = st.text(st.sampled_from("ab\né\U0001f600"), max_size=40)


def _distinct(characters: int) -> str:
    """Text in which no character stands twice."""
    return "".join(chr(0x4E00 + number) for number in range(characters))


def _printed(tails: list[str], *, whole: str = "") -> tuple[str, int]:
    """What is printed of a stream seen so, and how often something is said to be missing."""
    tail = Tail()
    news = [tail.feed(text, final=False) for text in tails]
    if whole:
        news.append(tail.feed(whole, final=True))
    return "".join(piece.text for piece in news), sum(piece.skipped for piece in news)


@given(_TEXT, _TEXT)
def test_the_overlap_is_the_longest_end_that_is_a_beginning(before: str, after: str) -> None:
    longest = max(n for n in range(min(len(before), len(after)) + 1) if before.endswith(after[:n]))
    assert overlap(before, after) == longest


@given(st.lists(_TEXT, max_size=8))
def test_a_stream_that_the_server_shows_whole_is_printed_whole(pieces: list[str]) -> None:
    seen = list(itertools.accumulate(pieces))
    assert _printed(seen) == ("".join(pieces), 0)


@given(st.integers(40, 300), st.lists(st.integers(0, 500), min_size=1, max_size=20))
def test_what_moves_out_of_the_window_unseen_is_told_once_and_nothing_is_printed_twice(
    window: int, steps: list[int]
) -> None:
    stream = _distinct(sum(steps))
    ends = list(itertools.accumulate(steps))
    printed, gaps = _printed([stream[max(0, end - window) : end] for end in ends])
    expected, expected_gaps, seen = "", 0, 0
    for end, step in zip(ends, steps, strict=True):
        start = max(0, end - window)
        if seen and seen - start < min(MIN_OVERLAP, seen, window) and step:
            expected_gaps += 1
        expected += stream[max(start, seen) : end]
        seen = end
    assert (printed, gaps) == (expected, expected_gaps)


@given(st.text("ab", min_size=1, max_size=3), st.lists(st.integers(0, 9), max_size=10), st.integers(20, 40))
def test_where_text_repeats_nothing_is_printed_that_was_not(unit: str, steps: list[int], window: int) -> None:
    stream = unit * sum(steps)
    ends = [end * len(unit) for end in itertools.accumulate(steps)]
    printed, _ = _printed([stream[max(0, end - window) : end] for end in ends])
    assert len(printed) <= len(stream)


def test_a_character_that_is_cut_by_the_end_of_the_tail_is_printed_when_it_is_there() -> None:
    data = "a\U0001f600b".encode()
    tails = [data[:size].decode("utf-8", "replace") for size in range(1, len(data) + 1)]
    assert _printed(tails) == ("a\U0001f600b", 0)


def test_a_character_that_is_cut_by_the_beginning_of_the_tail_hides_nothing() -> None:
    data = ("é" * 5 + _distinct(30) + "é" * 3 + _distinct(10)).encode()
    tails = [data[max(0, end - 61) : end].decode("utf-8", "replace") for end in range(1, len(data) + 1, 7)]
    tails.append(data[-61:].decode("utf-8", "replace"))
    assert _printed(tails) == (data.decode(), 0)


def test_bytes_that_are_no_text_are_shown_at_the_end_at_the_latest() -> None:
    tail = Tail()
    assert tail.feed("x\ufffd\ufffd", final=False).text == "x"
    assert tail.feed("x\ufffd\ufffd", final=True).text == "\ufffd\ufffd"


def test_a_look_that_shows_less_than_the_one_before_changes_nothing() -> None:
    assert _printed(["one\n", "", "one\ntwo\n", "one\n", "one\ntwo\nthree\n"]) == ("one\ntwo\nthree\n", 0)


def test_a_first_tail_that_is_as_long_as_a_server_shows_may_have_had_a_beginning() -> None:
    assert looks_cut("x" * 32766)  # 32 KiB as JSON, with its quotes
    assert looks_cut("x" * 10_000)
    assert not looks_cut("x" * 10_100)
    assert not looks_cut("x" * 1000)
    assert _printed(["x" * 10_000, "x" * 10_000])[1] == 1


def test_long_tails_are_compared_in_one_pass() -> None:
    before = "a" * 200_000 + "b"
    assert overlap(before, "a" * 200_000) == 0
    assert overlap("b" + "a" * 200_000, "a" * 100_000 + "c") == 100_000
