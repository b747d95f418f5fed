"""Many jobs looked after with few looks at once: one loop, one heap of due times."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import time
from collections.abc import Awaitable, Callable


class Rounds:
    """Calls `look(job_id)` when it is due, for at most `at_once` jobs at a time and never twice for one.

    `look` says after how many seconds it wants to be called again, or None: then the job is forgotten. It is to handle
    its errors: one that it raises ends the rounds.
    """

    def __init__(self, look: Callable[[str], Awaitable[float | None]], at_once: int) -> None:
        self._look = look
        self._room = asyncio.Semaphore(at_once)
        self._heap: list[tuple[float, int, str]] = []
        self._due: dict[str, tuple[float, int]] = {}
        self._looking: dict[str, float | None] = {}
        self._count = itertools.count()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._due) + len(self._looking)

    def hurry(self, job_id: str, delay_s: float = 0.0) -> None:
        """Have the job looked at within `delay_s`, whether it was known before or not."""
        due = time.monotonic() + delay_s
        if job_id in self._looking:
            wanted = self._looking[job_id]
            self._looking[job_id] = due if wanted is None else min(wanted, due)
        elif job_id not in self._due or due < self._due[job_id][0]:
            self._put(job_id, due)

    def _put(self, job_id: str, due: float) -> None:
        entry = self._due[job_id] = (due, next(self._count))
        heapq.heappush(self._heap, (*entry, job_id))
        if self._heap[0][2] == job_id:
            self._changed.set()

    async def run(self) -> None:
        """Go round until canceled."""
        async with asyncio.TaskGroup() as children:
            while True:
                await self._room.acquire()
                job_id = await self._next()
                self._looking[job_id] = None
                children.create_task(self._one(job_id), name=f"look {job_id}")

    async def _next(self) -> str:
        while True:
            self._changed.clear()
            delay_s: float | None = None
            while self._heap:
                due, number, job_id = self._heap[0]
                if self._due.get(job_id) != (due, number):  # it was put elsewhere since
                    heapq.heappop(self._heap)
                    continue
                delay_s = due - time.monotonic()
                if delay_s > 0:
                    break
                heapq.heappop(self._heap)
                del self._due[job_id]
                return job_id
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._changed.wait()

    async def _one(self, job_id: str) -> None:
        try:
            delay_s = await self._look(job_id)
        finally:
            self._room.release()
            wanted = self._looking.pop(job_id)
        if delay_s is not None:
            due = time.monotonic() + delay_s
            self._put(job_id, due if wanted is None else min(wanted, due))
        elif wanted is not None:
            self._put(job_id, wanted)
