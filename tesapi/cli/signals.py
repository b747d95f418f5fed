"""Ctrl-C and SIGTERM as one exception, where the command is ready for it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self


class Interrupted(BaseException):  # like KeyboardInterrupt, it is not to be caught with the errors
    """SIGINT or SIGTERM has come; `number` says which."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)

    @property
    def exit_code(self) -> int:
        """As a shell tells of a process that a signal ended."""
        return 128 + self.number


class Signals:
    """While entered, SIGINT and SIGTERM raise Interrupted where they are let in, and wait for that elsewhere.

    So they come where the command waits, and never in the midst of what a library does. What is ignored stays so.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._waiting: list[int] = []
        self._is_open = False
        self._held_until = 0
        self._has_raised = False

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._arrived)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            # Whoever has pressed Ctrl-C presses it again while the process leaves.
            leaving = self._has_raised and number == signal.SIGINT
            signal.signal(number, signal.SIG_IGN if leaving else before)

    @contextlib.contextmanager
    def let_in(self) -> Iterator[None]:
        """Around what waits: signals end it, and those that came before it do at once."""
        self._is_open = True
        try:
            if self._waiting:
                self._raise(self._waiting.pop(0))
            yield
        finally:
            self._is_open = False

    def look(self) -> None:
        """Raise Interrupted where a signal has been waiting."""
        with self.let_in():
            pass

    @contextlib.contextmanager
    def second_let_in(self) -> Iterator[None]:
        """Around what is better not ended halfway: a first signal waits until later, a second one does not."""
        self._held_until = len(self._waiting) + 1
        try:
            yield
        finally:
            self._held_until = 0

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self._is_open or (self._held_until and len(self._waiting) >= self._held_until):
            self._raise(number)
        self._waiting.append(number)

    def _raise(self, number: int) -> NoReturn:
        self._has_raised = True
        raise Interrupted(number)
