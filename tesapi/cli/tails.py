"""From successive ends of a stream to the stream itself: what of a tail is new, and whether something is missing."""

from __future__ import annotations

from typing import NamedTuple

MIN_OVERLAP = 16
"""So many characters in common are taken for the same place; fewer may be so by chance."""

_CUT = "\ufffd"
_MIN_CUT_BYTES = 4000
_MAX_CHARACTER_BYTES = 12


class News(NamedTuple):
    """What is to be printed, and whether something before it is missing."""

    text: str
    skipped: bool


class Tail:
    """One stream of a task that is looked at now and then.

    A server shows the last characters of what was printed, of a number that is its own. Where the same text repeats,
    several places fit; then as little as possible is taken for new, so that nothing is ever printed twice.
    """

    def __init__(self) -> None:
        self._seen = ""

    def feed(self, tail: str, *, final: bool) -> News:
        """What `tail` adds to the ones before; `final` when the stream has ended."""
        if not final:
            # The first bytes of a character whose last ones were not there yet.
            tail = tail.rstrip(_CUT)
        before = self._seen
        if tail.startswith(before):
            self._seen = tail
            return News(tail[len(before) :], skipped=not before and looks_cut(tail))
        if tail in before:
            return News("", skipped=False)  # a look at what was, or none at all
        self._seen = tail
        tail = tail.lstrip(_CUT)  # the last bytes of a character that was cut
        common = overlap(before, tail)
        return News(tail[common:], skipped=common < min(MIN_OVERLAP, len(before)))


def overlap(before: str, after: str) -> int:
    """The length of the longest end of `before` that is a beginning of `after` (Knuth, Morris, Pratt)."""
    size = min(len(before), len(after))
    if not size:
        return 0
    shorter = [0] * size  # for each beginning of `after`, its longest end that is a beginning too
    length = 0
    for position in range(1, size):
        while length and after[position] != after[length]:
            length = shorter[length - 1]
        if after[position] == after[length]:
            length += 1
        shorter[position] = length
    length = 0
    for character in before[-size:]:
        while length and (length == size or character != after[length]):
            length = shorter[length - 1]
        if character == after[length]:
            length += 1
    return length


def looks_cut(tail: str) -> bool:
    """Whether the first tail that is seen of a stream seems to be as long as its server ever shows.

    Nothing in TES tells. Servers cut at a round number of bytes, of the text or of the text as JSON, and to within one
    character; some text that is whole has such a length too.
    """
    sizes = (len(tail.encode("utf-8", "replace")), _json_size(tail))
    return any(
        size >= _MIN_CUT_BYTES and -size % unit < _MAX_CHARACTER_BYTES for size in sizes for unit in (1000, 1024)
    )


def _json_size(text: str) -> int:
    import json

    return len(json.dumps(text))
