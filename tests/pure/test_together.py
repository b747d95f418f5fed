"""Questions that are asked together."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Sequence

import pytest

from tesapi.store.together import Together


class Oracle:
    """Doubles numbers, once it is let; 0 is too much for it."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.free = asyncio.Event()

    async def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.asked.append(list(numbers))
        await self.free.wait()
        return [100 // number for number in numbers]


async def test_what_comes_while_others_are_asked_goes_together_in_its_order() -> None:
    oracle = Oracle()
    together = Together(oracle, at_once=4, askers=1)
    first = asyncio.ensure_future(together.answer(1))
    await asyncio.sleep(0)
    others = [asyncio.ensure_future(together.answer(number)) for number in (2, 4, 5, 10, 20)]
    await asyncio.sleep(0)
    oracle.free.set()
    assert await asyncio.gather(first, *others) == [100, 50, 25, 20, 10, 5]
    assert oracle.asked == [[1], [2, 4, 5, 10], [20]]


async def test_no_more_ask_at_once_than_may() -> None:
    oracle = Oracle()
    together = Together(oracle, at_once=1, askers=2)
    answers = [asyncio.ensure_future(together.answer(number)) for number in (1, 2, 4)]
    for _ in range(5):
        await asyncio.sleep(0)
    assert oracle.asked == [[1], [2]]
    oracle.free.set()
    assert await asyncio.gather(*answers) == [100, 50, 25]


async def test_an_error_goes_to_all_who_asked_and_to_nobody_after_them() -> None:
    oracle = Oracle()
    oracle.free.set()
    together = Together(oracle, at_once=9, askers=1)
    answers = await asyncio.gather(*(together.answer(number) for number in (1, 0)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [ZeroDivisionError] * 2
    assert await together.answer(1) == 100


async def test_nobody_is_asked_for_those_who_no_longer_wait() -> None:
    oracle = Oracle()
    together = Together(oracle, at_once=9, askers=1)
    answers = [asyncio.ensure_future(together.answer(number)) for number in (1, 2, 4)]
    await asyncio.sleep(0)
    late = asyncio.ensure_future(together.answer(5))
    await asyncio.sleep(0)
    for canceled in (answers[1], late):
        canceled.cancel()
    oracle.free.set()
    await together.finished()
    assert oracle.asked == [[1, 2, 4]]
    assert [answers[0].result(), answers[2].result()] == [100, 25]
    with pytest.raises(asyncio.CancelledError):
        await late


async def test_what_is_set_for_the_first_who_asks_is_not_set_for_others() -> None:
    limit = contextvars.ContextVar("limit", default=0)

    async def limits(numbers: Sequence[int]) -> list[int]:
        return [limit.get() for _ in numbers]

    together = Together(limits, at_once=9, askers=1)
    limit.set(7)
    assert await together.answer(1) == 0
