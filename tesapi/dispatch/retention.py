"""Removes tasks that have been over for long, a few at a time."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from datetime import datetime, timedelta

from tesapi.errors import StoreUnavailable
from tesapi.store.base import TaskStore
from tesapi.tasks import now

_log = logging.getLogger(__name__)

_EVERY_S = 3600.0
_AT_ONCE = 200


@dataclass(frozen=True, slots=True)
class Retention:
    """Which tasks stay when nothing is left to do with them: the `keep` done last, and none older than `max_age`."""

    max_age: timedelta | None = None
    keep: int | None = None

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is ever removed."""
        return self.max_age is None and self.keep is None

    @property
    def before(self) -> datetime | None:
        """What was done before this time is too old."""
        return None if self.max_age is None else now() - self.max_age


async def purge_again_and_again(store: TaskStore, retention: Retention) -> None:
    """Purge at once, and hourly from then on."""
    while True:
        try:
            if removed := await purge(store, retention):
                _log.info("Removed %d tasks that were done, as the settings of retention say.", removed)
        except StoreUnavailable as error:
            _log.warning("Tasks that were done are not removed for now: %s", error)
        await asyncio.sleep(_EVERY_S)


async def purge(store: TaskStore, retention: Retention) -> int:
    """Remove all that is not to stay; how many. Between two batches others have as much time as a batch took."""
    before = retention.before
    removed = 0
    while True:
        begin = time.monotonic()
        count = await store.purge(before=before, keep=retention.keep, limit=_AT_ONCE)
        if not count:
            return removed
        removed += count
        await asyncio.sleep(time.monotonic() - begin)
