"""How a destination is: what its answers tell, and whether it is worth while to ask it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum

_FAILURES_TO_OPEN = 3
_WEIGHT = 0.2  # of the newest observation in the running means


class Standing(StrEnum):
    """What a destination is good for. STARTING is not known yet; MISCONFIGURED needs its operator."""

    STARTING = "starting"
    UP = "up"
    DOWN = "down"
    MISCONFIGURED = "misconfigured"


class Health:
    """A circuit: closed while the destination answers, open from a few failures in a row until it answers again.

    `clock` is monotonic, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.standing = Standing.STARTING
        self.reason = "It has not been asked yet."
        self.since = datetime.now(UTC)
        self.latency_s: float | None = None
        self.error_rate = 0.0
        self._failures = 0
        self._closed = asyncio.Event()
        self.outages = 0

    @property
    def up(self) -> bool:
        """Whether it is worth while to ask."""
        return self.standing is Standing.UP

    def answered(self, took_s: float) -> None:
        """A request was answered, whatever with."""
        self._failures = 0
        self.latency_s = took_s if self.latency_s is None else _mean(self.latency_s, took_s)
        self.error_rate = _mean(self.error_rate, 0.0)

    def failed(self, why: str) -> None:
        """No answer."""
        self._failures += 1
        self.error_rate = _mean(self.error_rate, 1.0)
        if self._failures >= _FAILURES_TO_OPEN:
            self.stand(Standing.DOWN, why)

    def stand(self, standing: Standing, reason: str = "") -> None:
        """Take what has been found out; `since` tells when it became so."""
        self.reason = reason
        if standing is self.standing:
            return
        if self.standing is Standing.UP:
            self.outages += 1
        self.standing, self.since = standing, datetime.now(UTC)
        if standing is Standing.UP:
            self._failures = 0
            self._closed.set()
        else:
            self._closed.clear()

    async def wait_until_up(self) -> None:
        """Sleep until the destination answers."""
        await self._closed.wait()


def _mean(old: float, new: float) -> float:
    return old + _WEIGHT * (new - old)
