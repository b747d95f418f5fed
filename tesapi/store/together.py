"""Questions that come while others are being asked, asked together: they share the cost of one journey."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class Together(Generic[Q, A]):
    """Has `ask` answer up to `at_once` questions at a time, in their order, and not more than `askers` times at once.

    What `ask` raises goes to all whose questions it had.
    """

    def __init__(self, ask: Callable[[Sequence[Q]], Awaitable[Sequence[A]]], *, at_once: int, askers: int) -> None:
        self._ask = ask
        self._at_once = at_once
        self._askers = askers
        self._waiting: list[tuple[Q, asyncio.Future[A]]] = []
        self._at_work: set[asyncio.Task[None]] = set()

    async def answer(self, question: Q) -> A:
        """What `ask` has to say to `question`."""
        answer: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, answer))
        if len(self._at_work) < self._askers:
            # In a context of its own: deadlines of the first who asks are not those of the others.
            asker = asyncio.get_running_loop().create_task(self._ask_all(), context=contextvars.Context())
            self._at_work.add(asker)
            asker.add_done_callback(self._at_work.discard)
        return await answer

    async def finished(self) -> None:
        """Wait until all that was asked is answered."""
        while self._at_work:
            await asyncio.gather(*self._at_work)

    async def _ask_all(self) -> None:
        while self._waiting:
            now, self._waiting = self._waiting[: self._at_once], self._waiting[self._at_once :]
            wanted = [(question, answer) for question, answer in now if not answer.done()]  # others were canceled
            if wanted:
                await self._ask_some([question for question, _ in wanted], [answer for _, answer in wanted])

    async def _ask_some(self, questions: Sequence[Q], answers: Sequence[asyncio.Future[A]]) -> None:
        try:
            said = await self._ask(questions)
        except Exception as error:  # noqa: BLE001 - whoever asked gets it
            for answer in answers:
                if not answer.done():
                    answer.set_exception(error)
        else:
            for answer, result in zip(answers, said, strict=True):
                if not answer.done():
                    answer.set_result(result)
