"""Ctrl-C and SIGTERM as one exception, at a moment that the command chooses."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self


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
    """While entered, SIGINT and SIGTERM raise Interrupted, except where they are `held`. What is ignored stays so."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._held = False
        self._pending: int | None = None

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
            signal.signal(number, before)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A first signal waits until the end of the block; a second one does not."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._pending is not None:
            number, self._pending = self._pending, None
            raise Interrupted(number)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self._held and self._pending is None:
            self._pending = number
            return
        self._pending = None
        raise Interrupted(number)
