"""How far something is that takes long, in few lines."""

from __future__ import annotations

import time
from typing import Callable

_FIRST_NOTE_S = 5.0
_SLOWEST_NOTE_S = 300.0


class Progress:
    """Says how far something is, first after five seconds and then ever less often."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._pause_s = _FIRST_NOTE_S
        self._due = time.monotonic() + self._pause_s

    def tell(self, sentence: Callable[[], str]) -> None:
        """Note `sentence()`, if it is time to."""
        if time.monotonic() >= self._due:
            self._note(sentence())
            self._pause_s = min(self._pause_s * 2, _SLOWEST_NOTE_S)
            self._due = time.monotonic() + self._pause_s
