"""Room for jobs on one machine: cores, memory and a number of jobs, given out first come, first served."""

from __future__ import annotations

import asyncio
import math
from collections import deque

from tesapi.backends.base import Capacity, Need


class Slots:
    """A job waits for `take`, and gives back by `release`. Nobody overtakes, so that a large job is not starved."""

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._taken: dict[str, Need] = {}
        self._waiting: deque[tuple[str, Need, asyncio.Future[None]]] = deque()

    @property
    def running(self) -> int:
        """How many jobs have room."""
        return len(self._taken)

    @property
    def waiting(self) -> int:
        """How many jobs wait for room."""
        return len(self._waiting)

    async def take(self, job_id: str, need: Need) -> None:
        """Wait until there is room for the job. One that has room keeps it."""
        if job_id in self._taken:
            return
        if not self._waiting and self._fits(need):
            self._taken[job_id] = need
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (job_id, need, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
            else:
                self.release(job_id)
            self._serve()
            raise

    def occupy(self, job_id: str, need: Need) -> None:
        """Count a job that runs already, whether there is room or not."""
        self._taken[job_id] = need

    def hurry(self, job_id: str) -> None:
        """Let a waiting job go on without room, because it is only to find out that it was canceled."""
        for entry in self._waiting:
            if entry[0] == job_id:
                self._waiting.remove(entry)
                _wake(entry[2])
                break
        self._serve()

    def release(self, job_id: str) -> None:
        """Give the job's room back."""
        if self._taken.pop(job_id, None) is not None:
            self._serve()

    def _serve(self) -> None:
        while self._waiting and self._fits(self._waiting[0][1]):
            job_id, need, turn = self._waiting.popleft()
            self._taken[job_id] = need
            _wake(turn)

    def _fits(self, need: Need) -> bool:
        limits, taken = self._capacity, self._taken.values()
        return (
            len(taken) < limits.max_jobs
            and sum(other.cpu_cores for other in taken) + need.cpu_cores <= (limits.cpu_cores or math.inf)
            and sum(other.ram_gb for other in taken) + need.ram_gb <= (limits.ram_gb or math.inf)
        )


def _wake(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)
