"""What `TaskStore` promises, on every implementation of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tesapi.errors import DestinationFull, InvalidDocument, KeyReused, StoreUnavailable, TaskNotFound
from tesapi.store.base import TaskQuery, TaskStore
from tesapi.tes import views
from tesapi.tes.events import CancelRequested, Noted
from tesapi.tes.models import View
from tesapi.tes.record import TaskRecord, Work
from tesapi.tes.states import State
from tests.contract.conftest import Clock
from tests.contract.records import MINUTE, NOON, after, done, ended, kept, new, placed, stored

ANY_UNICODE = [
    "nul\0inside",
    "\0",
    "'; DROP TABLE tasks; --",
    "ü 中文 😀 \u202e",
    "\ud7ff\ue000\uffff",
    '"\\\n',
    " ",
    "%_*",
]


def ids(records: Iterable[TaskRecord]) -> list[str]:
    return [record.id for record in records]


def shown(page_views: Iterable[bytes]) -> list[str]:
    return [json.loads(view)["id"] for view in page_views]


async def all_pages(store: TaskStore, query: TaskQuery) -> list[list[str]]:
    pages = []
    while True:
        page = await store.find(query)
        pages.append(shown(page.views))
        if page.next_token is None:
            return pages
        query = replace(query, token=page.next_token)


async def claimed(store: TaskStore, holder: str = "a", queued: int = 100) -> list[str]:
    return ids(await store.claim(holder, queued=queued, ttl=MINUTE))


# Filters.

_NAMES = [
    "a",
    "ab",
    "abc",
    "a%c",
    "a_c",
    "A",
    "",
    "b",
    "ü",
    "ü😀",
    "\ud7ff",
    "\ud7ff\ue000",
    "\U0010ffff",
    "a\0b",
    None,
]
_TAGS: list[dict[str, str]] = [
    {},
    {"foo": "bar"},
    {"foo": "bat"},
    {"foo": ""},
    {"foo": "bar", "baz": "bat"},
    {"ü": "%"},
]
_ASKED: list[tuple[tuple[str, str], ...]] = [
    (),
    (("foo", "bar"),),
    (("foo", ""),),
    (("foo", "bar"), ("baz", "bat")),
    (("baz", ""), ("foo", "bar")),
    (("none", ""),),
    (("ü", "%"),),
    (("foo", "bar"), ("foo", "bat")),
]


def _fits(record: TaskRecord, query: TaskQuery) -> bool:
    """What a filter means, in as few words as possible."""
    tags = record.document.tags or {}
    return (
        query.owner in (None, record.owner)
        and query.state in (None, record.state)
        and (not query.name_prefix or (record.document.name or "").startswith(query.name_prefix))
        and all(key in tags and value in ("", tags[key]) for key, value in query.tags)
    )


async def test_filters_select_what_fits_all_of_them_newest_first_on_any_number_of_pages(store: TaskStore) -> None:
    chance = random.Random(5)
    records = [
        new(owner=chance.choice(["ada", "bob"]), name=chance.choice(_NAMES), tags=chance.choice(_TAGS))
        for _ in range(150)
    ]
    await store.insert(records)
    for record in chance.sample(records, 40):
        records[records.index(record)] = await stored(store, done(placed(record)))
    prefixes = [prefix for prefix in _NAMES if prefix is not None]
    for _ in range(200):
        query = TaskQuery(
            size=chance.choice([1, 7, 200]),
            owner=chance.choice([None, "ada", "bob", "eve"]),
            name_prefix=chance.choice(["", *prefixes]),
            state=chance.choice([None, State.QUEUED, State.COMPLETE, State.PAUSED]),
            tags=chance.choice(_ASKED),
        )
        pages = await all_pages(store, query)
        listed = [task_id for page in pages for task_id in page]
        assert listed == ids(record for record in reversed(records) if _fits(record, query)), query
        assert all(len(page) == query.size for page in pages[:-1])


async def test_a_list_by_state_moves_with_the_task(store: TaskStore) -> None:
    (record,) = await kept(store, placed(new()))
    assert await all_pages(store, TaskQuery(state=State.QUEUED)) == [[record.id]]
    await stored(store, ended(record))
    assert await all_pages(store, TaskQuery(state=State.QUEUED)) == [[]]
    assert await all_pages(store, TaskQuery(state=State.COMPLETE)) == [[record.id]]


@pytest.mark.parametrize(
    "other", [{"name_prefix": "b"}, {"state": State.QUEUED}, {"tags": (("k", "w"),)}, {"tags": ()}, {"owner": "bob"}]
)
async def test_a_token_is_bound_to_its_filters(store: TaskStore, other: dict[str, Any]) -> None:
    await store.insert([new(name="a", tags={"k": "v"}) for _ in range(3)])
    query = TaskQuery(size=1, owner="ada", name_prefix="a", tags=(("k", "v"),))
    token = (await store.find(query)).next_token
    assert (await store.find(replace(query, token=token, view=View.BASIC, size=2))).next_token is None
    with pytest.raises(InvalidDocument, match="page_token"):
        await store.find(replace(query, token=token, **other))


# insert, load, view.


async def test_what_was_inserted_is_loaded(store: TaskStore) -> None:
    untouched, under_way = await kept(store, new(), placed(new()))
    assert await store.load(untouched.id) == untouched
    assert await store.load(under_way.id) == under_way


@pytest.mark.parametrize("text", ANY_UNICODE)
async def test_any_unicode_comes_back_as_it_was(store: TaskStore, text: str) -> None:
    (record,) = await kept(store, new(owner=text, task_id=text, name=text))
    assert await store.load(text, owner=text) == record
    assert shown([await store.view(text, View.MINIMAL, owner=text)]) == [text]
    assert await all_pages(store, TaskQuery(owner=text)) == [[text]]
    assert await claimed(store, text) == [text]
    assert await store.renew(text, [text]) == {text: State.QUEUED}


async def test_records_are_inserted_all_or_none(store: TaskStore) -> None:
    (there,) = await kept(store, new())
    fresh = new()
    with pytest.raises(StoreUnavailable):
        await store.insert([fresh, there])
    assert await all_pages(store, TaskQuery()) == [[there.id]]
    with pytest.raises(TaskNotFound):
        await store.load(fresh.id)


async def test_inserting_nothing_is_fine(store: TaskStore) -> None:
    await store.insert([])
    assert await all_pages(store, TaskQuery()) == [[]]


async def test_a_record_that_cannot_be_inserted_fails_alone(store: TaskStore) -> None:
    (there,) = await kept(store, new())
    fresh = [new() for _ in range(20)]
    inserts = [store.insert([record]) for record in [*fresh[:10], there, *fresh[10:]]]
    answers = await asyncio.gather(*inserts, return_exceptions=True)
    assert [type(answer) for answer in answers] == [type(None)] * 10 + [StoreUnavailable] + [type(None)] * 10
    for record in fresh:
        assert await store.load(record.id) == record


async def test_an_insert_whose_caller_is_canceled_harms_nobody(store: TaskStore) -> None:
    records = [new() for _ in range(20)]
    inserts = [asyncio.ensure_future(store.insert([record])) for record in records]
    await asyncio.sleep(0)
    for insert in inserts[::2]:
        insert.cancel()
    await asyncio.gather(*inserts, return_exceptions=True)
    for record in records[1::2]:
        assert await store.load(record.id) == record
    await store.insert([last := new()])
    assert await store.load(last.id) == last


@pytest.mark.parametrize("task_id", ["", "nobody", "\0", "\ud800", "x" * 100_000])
async def test_an_unknown_task_is_not_found(store: TaskStore, task_id: str) -> None:
    await kept(store, new())
    with pytest.raises(TaskNotFound):
        await store.load(task_id)
    for view in View:
        with pytest.raises(TaskNotFound):
            await store.view(task_id, view)


async def test_the_task_of_somebody_else_is_not_found(store: TaskStore) -> None:
    (record,) = await kept(store, new(owner="ada"))
    assert await store.load(record.id, owner="ada") == record
    for owner in ("bob", "", "ADA", "ada\0"):
        with pytest.raises(TaskNotFound):
            await store.load(record.id, owner=owner)
        for view in View:
            with pytest.raises(TaskNotFound):
                await store.view(record.id, view, owner=owner)


@pytest.mark.parametrize("view", View)
async def test_a_view_shows_the_record_as_it_was_last_stored(store: TaskStore, view: View) -> None:
    (record,) = await kept(store, new())
    for change in (placed, ended, done):
        assert await store.view(record.id, view) == views.render(record, view)
        assert (await store.find(TaskQuery(view=view))).views == [views.render(record, view)]
        record = await stored(store, change(record))
    assert await store.view(record.id, view, owner="ada") == views.render(record, view)


# find.


@pytest.mark.parametrize("view", View)
@pytest.mark.parametrize("owner", [None, "ada"])
async def test_pages_come_newest_first_and_the_last_one_has_no_token(
    store: TaskStore, view: View, owner: str | None
) -> None:
    records = await kept(store, *(new() for _ in range(6)))
    newest_first = ids(reversed(records))
    for size in (1, 2, 3, 4, 6, 7, 2047):
        pages = await all_pages(store, TaskQuery(view=view, size=size, owner=owner))
        assert pages == [newest_first[start : start + size] for start in range(0, 6, size)]


async def test_pages_neither_skip_nor_repeat_a_task_while_others_are_created(store: TaskStore) -> None:
    records = await kept(store, *(new() for _ in range(10)))
    found: list[str] = []
    query = TaskQuery(size=3, owner="ada")
    while True:
        page = await store.find(query)
        found += shown(page.views)
        await kept(store, new(), new(owner="bob"))
        await stored(store, placed(await store.load(records[0].id)))
        await store.replace(after(await store.load(records[1].id), Noted(f"{len(found)}", NOON)))
        if page.next_token is None:
            break
        query = replace(query, token=page.next_token)
    assert found == ids(reversed(records))


async def test_a_list_of_one_owner_has_nobody_elses_tasks(store: TaskStore) -> None:
    records = await kept(store, *(new(owner=("ada", "bob", "cyd")[number % 3]) for number in range(12)))
    for owner in ("ada", "bob", "cyd"):
        own = [record.id for record in reversed(records) if record.owner == owner]
        assert await all_pages(store, TaskQuery(owner=owner, size=3)) == [own[:3], own[3:]]
    assert await all_pages(store, TaskQuery(owner="dan")) == [[]]
    assert await all_pages(store, TaskQuery()) == [ids(reversed(records))]


async def test_a_token_leads_on_with_another_view_or_size(store: TaskStore) -> None:
    records = await kept(store, *(new() for _ in range(5)))
    token = (await store.find(TaskQuery(size=2))).next_token
    page = await store.find(TaskQuery(view=View.FULL, size=256, token=token))
    assert shown(page.views) == ids(reversed(records[:3]))


async def test_a_token_is_refused_for_other_filters(store: TaskStore) -> None:
    await kept(store, *(new(owner=owner) for owner in ("ada", "bob") * 3))
    owners = (None, "ada", "bob", "")
    tokens = {owner: (await store.find(TaskQuery(size=1, owner=owner))).next_token for owner in owners[:3]}
    for given_for, token in tokens.items():
        for owner in owners:
            if owner != given_for:
                with pytest.raises(InvalidDocument):
                    await store.find(TaskQuery(owner=owner, token=token))


async def test_what_was_never_a_token_is_refused(store: TaskStore) -> None:
    await kept(store, new(), new())
    token = (await store.find(TaskQuery(size=1))).next_token
    assert token is not None
    never = ["", "-", "x", "0", "1-", "null", "[[" * 10_000, "\0", "\ud800", "٣-٣", "9" * 10_000, f"{'f' * 9999}-00"]
    never += [token + "0", token[:-1], token.upper() + " ", " " + token, "0" + token, "-" + token, token[::-1]]
    for wrong in never:
        with pytest.raises(InvalidDocument) as caught:
            await store.find(TaskQuery(token=wrong))
        (problem,) = caught.value.problems
        assert problem.field == "page_token"
        assert len(str(caught.value)) < 500


# insert_once, keyed.


async def test_a_key_stands_for_the_first_task_that_came_with_it(store: TaskStore) -> None:
    first, second = new(), new()
    assert await store.keyed("ada", "k", "digest") is None
    assert await store.insert_once(first, "k", "digest") == first.id
    assert await store.insert_once(second, "k", "digest") == first.id
    assert await store.keyed("ada", "k", "digest") == first.id
    assert await store.load(first.id) == first
    with pytest.raises(TaskNotFound):
        await store.load(second.id)
    assert await all_pages(store, TaskQuery()) == [[first.id]]
    assert await claimed(store) == [first.id]


async def test_a_key_does_not_stand_for_another_document(store: TaskStore) -> None:
    first, second = new(), new()
    await store.insert_once(first, "k", "one")
    for again in (store.insert_once(second, "k", "other"), store.keyed("ada", "k", "other")):
        with pytest.raises(KeyReused, match=f"'k' was sent before with another task, and stands for {first.id}"):
            await again
    assert await all_pages(store, TaskQuery()) == [[first.id]]


async def test_keys_are_their_owners_own_and_told_apart_by_every_character(store: TaskStore) -> None:
    keys = ["k", "K", "k ", "'; DROP TABLE tasks; --", "%", "$gt", "a" * 255]
    made = {(owner, key): new(owner=owner) for owner in ("ada", "bob", "") for key in keys}
    for (_, key), record in made.items():
        assert await store.insert_once(record, key, "digest") == record.id
    for (owner, key), record in made.items():
        assert await store.keyed(owner, key, "digest") == record.id


async def test_of_many_with_the_same_key_at_the_same_time_one_is_kept(store: TaskStore) -> None:
    records = [new(owner="ada" if number % 2 else "bob") for number in range(60)]
    answers = await asyncio.gather(*(store.insert_once(record, "k", "digest") for record in records))
    assert len(set(answers)) == 2
    assert answers == [answers[number % 2] for number in range(60)]
    (page,) = await all_pages(store, TaskQuery())
    assert sorted(page) == sorted(set(answers))


async def test_of_many_documents_with_the_same_key_at_the_same_time_one_is_kept(store: TaskStore) -> None:
    records = [new() for _ in range(30)]
    inserts = (store.insert_once(record, "k", f"digest {number % 3}") for number, record in enumerate(records))
    answers = await asyncio.gather(*inserts, return_exceptions=True)
    assert Counter(type(answer) for answer in answers) == {str: 10, KeyReused: 20}
    (page,) = await all_pages(store, TaskQuery())
    assert {answer for answer in answers if isinstance(answer, str)} == set(page)


async def test_a_key_stands_for_its_task_whatever_becomes_of_it_and_after_opening_again(
    open_store: Callable[[], TaskStore],
) -> None:
    async with open_store() as store:
        record = new()
        await store.insert_once(record, "k", "digest")
        await stored(store, done(await stored(store, placed(record))))
        assert await store.insert_once(new(), "k", "digest") == record.id
    async with open_store() as store:
        assert await store.keyed("ada", "k", "digest") == record.id
        assert await store.insert_once(new(), "k", "digest") == record.id
        with pytest.raises(KeyReused):
            await store.insert_once(new(), "k", "other")


# replace.


async def test_a_replaced_record_is_the_next_revision(store: TaskStore) -> None:
    (record,) = await kept(store, new())
    for revision, change in enumerate((placed, ended, done)):
        record = change(record)
        assert await store.replace(record)
        record = replace(record, revision=revision + 1)
        assert await store.load(record.id) == record


async def test_whoever_is_slower_changes_nothing(store: TaskStore) -> None:
    (record,) = await kept(store, new())
    faster = await stored(store, placed(record))
    slower = after(record, CancelRequested(NOON))
    assert not await store.replace(slower)
    assert not await store.replace(replace(slower, revision=7))
    assert await store.load(record.id) == faster
    for view in View:
        assert await store.view(record.id, view) == views.render(faster, view)


async def test_of_many_that_replace_the_same_revision_one_wins(store: TaskStore) -> None:
    (record,) = await kept(store, new())
    changes = [after(record, Noted(f"{number}", NOON)) for number in range(50)]
    answers = await asyncio.gather(*(store.replace(change) for change in changes))
    assert Counter(answers) == {True: 1, False: 49}
    assert await store.load(record.id) == replace(changes[answers.index(True)], revision=1)


async def test_a_task_that_is_not_there_is_not_replaced(store: TaskStore) -> None:
    assert not await store.replace(new())
    assert await all_pages(store, TaskQuery()) == [[]]


# How many are placed at a destination.


async def test_tasks_are_counted_where_they_are_placed_until_nothing_of_their_job_is_left(store: TaskStore) -> None:
    assert await store.occupied() == {}
    _, here, there, over = await kept(store, new(), placed(new()), placed(new(), "far"), done(placed(new())))
    assert await store.occupied() == {"local": 1, "far": 1}
    assert over.work is Work.DONE
    here = await stored(store, ended(here))
    there = await stored(store, after(there, CancelRequested(NOON)))
    assert await store.occupied() == {"local": 1, "far": 1}
    await stored(store, done(here))
    assert await store.occupied() == {"far": 1}
    await stored(store, done(there))
    assert await store.occupied() == {}


async def test_queued_tasks_are_counted_up_to_a_bound(store: TaskStore) -> None:
    assert await store.queued(at_most=10) == 0
    first, second, *_ = await kept(store, *(new() for _ in range(5)), ended(placed(new())), done(placed(new())))
    assert [await store.queued(at_most=bound) for bound in (1, 4, 5, 6, 1000)] == [1, 4, 5, 5, 5]
    await stored(store, ended(await stored(store, placed(first))))
    await stored(store, after(second, CancelRequested(NOON)))
    assert await store.queued(at_most=10) == 3


async def test_a_task_is_placed_only_while_there_is_room_at_its_destination(store: TaskStore) -> None:
    first, second, third = await kept(store, new(), new(), new())
    for record in (first, second):
        assert await store.replace(placed(record), at_most=2)
    with pytest.raises(DestinationFull, match="local has all the tasks that it may have at once, which is 2"):
        await store.replace(placed(third), at_most=2)
    assert await store.load(third.id) == third
    assert await claimed(store, queued=9) == ids([first, second, third])
    with pytest.raises(DestinationFull):
        await store.replace(placed(third), at_most=0)
    assert await store.replace(placed(third, "far"), at_most=1)
    assert await store.occupied() == {"local": 2, "far": 1}


async def test_room_is_free_again_when_a_task_is_done(store: TaskStore) -> None:
    first, second = await kept(store, placed(new()), new())
    first = await stored(store, ended(first))
    with pytest.raises(DestinationFull):
        await store.replace(placed(second), at_most=1)
    await stored(store, done(first))
    assert await store.replace(placed(second), at_most=1)


async def test_a_task_takes_its_own_room_once_and_what_is_not_placed_takes_none(store: TaskStore) -> None:
    first, second = await kept(store, placed(new()), placed(new()))
    with pytest.raises(DestinationFull):  # there are more than are allowed by now
        await store.replace(ended(first), at_most=1)
    first = await stored(store, first)
    assert await store.replace(ended(first), at_most=2)
    assert await store.replace(done(second), at_most=0)
    (queued,) = await kept(store, new())
    assert await store.replace(after(queued, Noted("Waiting.", NOON)), at_most=0)


async def test_without_a_bound_any_number_is_placed(store: TaskStore) -> None:
    for record in await kept(store, *(new() for _ in range(5))):
        await stored(store, placed(record))
    assert await store.occupied() == {"local": 5}


async def test_whoever_is_slower_hears_that_before_whether_there_is_room(store: TaskStore) -> None:
    (record,) = await kept(store, new())
    await stored(store, after(record, CancelRequested(NOON)))
    assert not await store.replace(placed(record), at_most=0)
    assert not await store.replace(placed(new()), at_most=0)


async def test_of_many_that_are_placed_at_the_same_time_no_more_than_allowed_are(store: TaskStore) -> None:
    records = await kept(store, *(new() for _ in range(60)))
    changes = [placed(record, "far" if number % 3 else "local") for number, record in enumerate(records)]
    answers = await asyncio.gather(*(store.replace(change, at_most=7) for change in changes), return_exceptions=True)
    assert Counter(type(answer) for answer in answers) == {bool: 14, DestinationFull: 46}
    assert await store.occupied() == {"local": 7, "far": 7}
    for record, change, answer in zip(records, changes, answers, strict=True):
        assert await store.load(record.id) == (replace(change, revision=1) if answer is True else record)


async def test_what_is_placed_is_counted_after_opening_again(open_store: Callable[[], TaskStore]) -> None:
    async with open_store() as store:
        first, second = await kept(store, new(), placed(new(), "far"))
        await stored(store, placed(first))
    async with open_store() as store:
        assert await store.occupied() == {"local": 1, "far": 1}
        (third,) = await kept(store, new())
        with pytest.raises(DestinationFull):
            await store.replace(placed(third), at_most=1)
        await stored(store, done(second))
        assert await store.replace(placed(third, "far"), at_most=1)


async def test_everything_is_there_after_opening_again(open_store: Callable[[], TaskStore]) -> None:
    async with open_store() as store:
        store_id = store.id
        first, second, third = await kept(store, new(), new(), new())
        second = await stored(store, placed(second))
        third = await stored(store, done(await stored(store, placed(third))))
        token = (await store.find(TaskQuery(size=1))).next_token
    async with open_store() as store:
        assert store.id == store_id
        assert len(store_id) == 32
        for record in (first, second, third):
            assert await store.load(record.id) == record
            assert await store.view(record.id, View.BASIC) == views.render(record, View.BASIC)
        assert shown((await store.find(TaskQuery(token=token))).views) == [second.id, first.id]
        await kept(store, fourth := new())
        assert await all_pages(store, TaskQuery()) == [ids([fourth, third, second, first])]


async def test_a_closed_store_says_so(open_store: Callable[[], TaskStore]) -> None:
    async with open_store() as store:
        (record,) = await kept(store, new())
    with pytest.raises(StoreUnavailable):
        await store.insert([new()])
    with pytest.raises(StoreUnavailable):
        await store.load(record.id)
    with pytest.raises(StoreUnavailable):
        await store.find(TaskQuery())
    with pytest.raises(StoreUnavailable):
        await store.occupied()
    with pytest.raises(StoreUnavailable):
        await store.queued(at_most=1)
    with pytest.raises(StoreUnavailable):
        await store.purge(keep=0, limit=1)
    with pytest.raises(StoreUnavailable):
        await store.insert_once(new(), "k", "digest")
    with pytest.raises(StoreUnavailable):
        await store.keyed("ada", "k", "digest")


# purge.


async def over(store: TaskStore, count: int, owner: str = "ada") -> list[TaskRecord]:
    """Tasks that were done one after the other."""
    records = await kept(store, *(placed(new(owner=owner)) for _ in range(count)))
    return [await stored(store, done(record)) for record in records]


async def left(store: TaskStore) -> list[str]:
    return [task_id for page in await all_pages(store, TaskQuery()) for task_id in page]


async def test_only_tasks_with_which_nothing_is_left_to_do_are_purged(store: TaskStore) -> None:
    queued, under_way, settled = await kept(store, new(), placed(new()), ended(placed(new())))
    (gone,) = await over(store, 1)
    canceled = after(new(), CancelRequested(NOON))
    await kept(store, canceled)
    future = datetime.now(UTC) + timedelta(days=1)
    assert await store.purgeable(before=future, keep=0) == 2
    assert await store.purge(before=future, keep=0, limit=100) == 2
    assert await store.purge(before=future, keep=0, limit=100) == 0
    assert await left(store) == ids([settled, under_way, queued])
    for record in (gone, canceled):
        with pytest.raises(TaskNotFound):
            await store.load(record.id)
        assert not await store.replace(record)
    assert await claimed(store) == ids([under_way, settled, queued])
    assert await store.occupied() == {"local": 2}


async def test_tasks_done_before_some_time_are_purged(store: TaskStore) -> None:
    first = await over(store, 3)
    await asyncio.sleep(0.005)
    between = datetime.now(UTC)
    await asyncio.sleep(0.005)
    second = await over(store, 2)
    assert await store.purge(before=between - timedelta(hours=1), limit=100) == 0
    assert await store.purgeable(before=between) == 3
    assert await store.purge(before=between, limit=100) == 3
    assert await left(store) == ids(reversed(second))
    assert first


async def test_all_but_those_done_last_are_purged(store: TaskStore) -> None:
    records = await over(store, 6)
    assert await store.purge(keep=6, limit=100) == await store.purge(keep=7, limit=100) == 0
    assert await store.purgeable(keep=2) == 4
    assert await store.purge(keep=2, limit=100) == 4
    assert await left(store) == ids(reversed(records[4:]))


async def test_what_counts_is_when_a_task_was_done_and_not_when_it_was_made(store: TaskStore) -> None:
    first, second = await kept(store, placed(new()), placed(new()))
    await stored(store, done(second))
    await asyncio.sleep(0.005)
    await stored(store, done(first))
    assert await store.purge(keep=1, limit=100) == 1
    assert await left(store) == [first.id]


async def test_either_reason_is_enough_to_be_purged_and_without_one_nothing_is(store: TaskStore) -> None:
    records = await over(store, 4)
    future = datetime.now(UTC) + timedelta(days=1)
    assert await store.purgeable() == await store.purge(limit=100) == 0
    assert await store.purge(before=NOON, keep=3, limit=100) == 1
    assert await left(store) == ids(reversed(records[1:]))
    assert await store.purge(before=future, keep=3, limit=100) == 3
    assert await left(store) == []


async def test_a_purge_goes_in_steps_and_begins_with_what_was_done_first(store: TaskStore) -> None:
    records = await over(store, 7)
    assert await store.purge(keep=1, limit=2) == 2
    assert await left(store) == ids(reversed(records[2:]))
    assert [await store.purge(keep=1, limit=3) for _ in range(3)] == [3, 1, 0]
    assert await left(store) == [records[6].id]


async def test_lists_and_counts_know_nothing_of_purged_tasks(store: TaskStore) -> None:
    records = await over(store, 9)
    token = (await store.find(TaskQuery(size=3))).next_token
    await store.purge(keep=5, limit=100)
    assert shown((await store.find(TaskQuery(token=token))).views) == ids(reversed(records[4:6]))
    for query in (TaskQuery(tags=(("lab", ""),)), TaskQuery(name_prefix="count"), TaskQuery(state=State.COMPLETE)):
        assert await all_pages(store, query) == [ids(reversed(records[4:]))]
    fresh = await kept(store, new())
    assert await left(store) == ids([*fresh, *reversed(records[4:])])


async def test_a_key_is_free_again_when_its_task_was_purged(store: TaskStore) -> None:
    first, second = done(placed(new())), new()
    await store.insert_once(first, "k", "one")
    assert await store.purge(keep=0, limit=100) == 1
    assert await store.keyed("ada", "k", "one") is None
    assert await store.insert_once(second, "k", "other") == second.id


async def test_tasks_are_made_and_done_while_others_are_purged(store: TaskStore) -> None:
    old = await over(store, 40)

    async def purge_all() -> int:
        count = 0
        while removed := await store.purge(before=future, limit=3):
            count += removed
        return count

    future = datetime.now(UTC)
    first, second, fresh = await asyncio.gather(purge_all(), purge_all(), over(store, 20, "bob"))
    assert first + second == len(old)
    assert await left(store) == ids(reversed(fresh))


# claim.


async def test_a_claimed_task_is_nobody_elses(store: TaskStore) -> None:
    (record,) = await kept(store, new())
    assert await store.claim("a", queued=1, ttl=MINUTE) == [record]
    assert await claimed(store, "b") == []
    assert await claimed(store, "a") == []


async def test_no_more_queued_tasks_are_claimed_than_asked_for(store: TaskStore) -> None:
    records = await kept(store, *(new() for _ in range(5)))
    assert await claimed(store, queued=0) == []
    assert await claimed(store, queued=2) == ids(records[:2])
    assert await claimed(store, queued=9) == ids(records[2:])


async def test_what_is_placed_where_only_others_can_reach_it_is_left_to_them(store: TaskStore) -> None:
    here, there, queued = await kept(store, placed(new()), placed(new(), "local@other"), new())
    found = await store.claim("a", queued=9, ttl=MINUTE, passed_over=["local@other"])
    assert ids(found) == ids([here, queued])
    assert ids(await store.claim("b", queued=9, ttl=MINUTE)) == ids([there])


async def test_placed_tasks_are_all_claimed_oldest_first_and_beside_the_queued_ones(store: TaskStore) -> None:
    records = await kept(store, *(placed(new(owner=owner)) for owner in ("cyd", "ada", "bob")), new(), new())
    assert await store.claim("a", queued=1, ttl=MINUTE) == records[:4]


async def test_a_settled_task_is_claimed_until_nothing_of_its_job_is_left(store: TaskStore) -> None:
    under_way, settled, over = await kept(store, placed(new()), ended(placed(new())), done(placed(new())))
    canceled = after(new(), CancelRequested(NOON))
    await store.insert([canceled])
    assert await claimed(store) == ids([under_way, settled])
    await stored(store, done(settled))
    await store.release("a", settled.id)
    assert await claimed(store) == []
    assert (await store.load(over.id)).state is State.COMPLETE


async def test_a_task_stays_its_holders_while_it_changes(store: TaskStore) -> None:
    (record,) = await kept(store, new())
    await claimed(store)
    for change in (placed, ended):
        record = await stored(store, change(record))
        assert await claimed(store, "b") == []
        assert await store.renew("a", [record.id]) == {record.id: record.state}


async def test_what_is_claimed_is_the_record_as_it_was_last_stored(store: TaskStore) -> None:
    (record,) = await kept(store, new())
    record = await stored(store, placed(await stored(store, after(record, Noted("Waiting.", NOON)))))
    assert await store.claim("a", queued=0, ttl=MINUTE) == [record]


async def test_queued_tasks_are_taken_from_their_owners_in_turn_and_each_owners_oldest_first(store: TaskStore) -> None:
    mass = await kept(store, *(new(owner="ada") for _ in range(100)))
    few = await kept(store, *(new(owner=owner) for owner in ("bob", "cyd", "bob", "")))
    taken = await store.claim("a", queued=9, ttl=MINUTE)
    assert Counter(record.owner for record in taken) == {"ada": 5, "bob": 2, "cyd": 1, "": 1}
    assert Counter(record.owner for record in taken[:4]) == {"ada": 1, "bob": 1, "cyd": 1, "": 1}
    for owner in ("ada", "bob"):
        own = [record for record in (*mass, *few) if record.owner == owner]
        assert [record for record in taken if record.owner == owner] == own[: 5 if owner == "ada" else 2]


async def test_owners_take_turns_also_where_tasks_are_claimed_one_by_one(store: TaskStore) -> None:
    await kept(store, *(new(owner=owner) for owner in "aaaabbbc"))
    turns = [(await store.claim(holder, queued=1, ttl=MINUTE))[0].owner for holder in "xyxyxyxy"]
    assert Counter(turns[:3]) == {"a": 1, "b": 1, "c": 1}
    assert Counter(turns[3:5]) == {"a": 1, "b": 1}
    assert Counter(turns[5:7]) == {"a": 1, "b": 1}
    assert turns[7] == "a"


async def test_nobody_claims_what_another_claims_at_the_same_time(store: TaskStore) -> None:
    records = await kept(store, *(new(owner=f"user{n % 3}") for n in range(40)), *(placed(new()) for _ in range(20)))
    answers = await asyncio.gather(*(claimed(store, f"holder{n}", queued=3) for n in range(30)))
    assert sorted(task_id for answer in answers for task_id in answer) == sorted(ids(records))


async def test_tasks_whose_claim_was_canceled_are_given_back(store: TaskStore) -> None:
    records = await kept(store, *(new() for _ in range(3)))
    claim = asyncio.ensure_future(claimed(store, "a"))
    await asyncio.sleep(0)
    claim.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await claim
    again: list[str] = []
    async with asyncio.timeout(30):
        while len(again) < 3:
            again += await claimed(store, "b")
    assert sorted(again) == sorted(ids(records))


# Leases that go stale.


async def test_a_holder_whose_number_stands_still_for_ttl_loses_its_leases(store: TaskStore, clock: Clock) -> None:
    queued, under_way = await kept(store, new(), placed(new()))
    assert len(await claimed(store, "dead")) == 2
    assert await claimed(store, "b") == []
    clock.now_s += 59.9
    assert await claimed(store, "b") == []
    clock.now_s += 0.1
    assert await claimed(store, "b") == ids([under_way, queued])
    assert await store.renew("dead", [queued.id, under_way.id]) == {}
    assert set(await store.renew("b", [queued.id, under_way.id])) == {queued.id, under_way.id}


async def test_a_holder_that_renews_keeps_its_leases(store: TaskStore, clock: Clock) -> None:
    (record,) = await kept(store, new())
    await claimed(store, "a")
    for _ in range(10):
        assert await claimed(store, "b") == []
        clock.now_s += 50
        assert await store.renew("a", [record.id]) == {record.id: State.QUEUED}
    assert await claimed(store, "b") == []
    clock.now_s += 60
    assert await claimed(store, "b") == [record.id]


async def test_only_what_the_taker_has_seen_standing_still_counts(store: TaskStore, clock: Clock) -> None:
    (record,) = await kept(store, new())
    await claimed(store, "a")
    clock.now_s += 1000
    assert await claimed(store, "b") == []
    clock.now_s += 60
    assert await claimed(store, "b") == [record.id]


async def test_each_holder_goes_stale_on_its_own(store: TaskStore, clock: Clock) -> None:
    records = await kept(store, *(new() for _ in range(4)))
    assert await claimed(store, "living", queued=2) == ids(records[:2])
    assert await claimed(store, "dead", queued=2) == ids(records[2:])
    assert await claimed(store, "c") == []
    clock.now_s += 60
    await store.renew("living", ids(records[:2]))
    assert await claimed(store, "c") == ids(records[2:])
    assert set(await store.renew("living", ids(records))) == set(ids(records[:2]))


async def test_a_holder_does_not_lose_its_leases_to_itself(store: TaskStore, clock: Clock) -> None:
    (record,) = await kept(store, new())
    for _ in range(3):
        assert await claimed(store, "a") in ([record.id], [])
        clock.now_s += 100
    assert await claimed(store, "a") == []
    assert await store.renew("a", [record.id]) == {record.id: State.QUEUED}


async def test_a_holder_that_was_idle_for_long_is_not_stale_when_it_claims(store: TaskStore, clock: Clock) -> None:
    (first,) = await kept(store, new())
    await claimed(store, "a")
    await claimed(store, "b")
    await store.release("a", first.id)
    await claimed(store, "b")
    clock.now_s += 1000
    (second,) = await kept(store, new())
    assert await claimed(store, "a") == [second.id]
    assert await claimed(store, "c") == []


# renew, release.


async def test_renewing_tells_the_states_of_the_named_tasks_that_are_still_held(store: TaskStore) -> None:
    own, also_own, not_named, others, free = await kept(store, *(new(owner=f"user{n}") for n in range(5)))
    assert await claimed(store, "a", queued=3) == ids([own, also_own, not_named])
    assert await claimed(store, "b", queued=1) == [others.id]
    await stored(store, after(await stored(store, placed(own)), CancelRequested(NOON)))
    await stored(store, after(also_own, CancelRequested(NOON)))
    named = [own.id, also_own.id, others.id, free.id, "nobody"]
    assert await store.renew("a", named) == {own.id: State.CANCELING, also_own.id: State.CANCELED}
    assert await store.renew("nobody", named) == {}
    assert await store.renew("a", []) == {}


async def test_a_holder_is_told_which_of_its_tasks_are_canceling(store: TaskStore) -> None:
    own, settled, quiet, others, free = await kept(store, *(placed(new()) for _ in range(5)))
    assert await claimed(store, "a") == ids([own, settled, quiet, others, free])
    assert list(await store.canceling("a")) == []
    for record in (others, free):
        await store.release("a", record.id)
    assert await claimed(store, "b") == ids([others, free])
    await store.release("b", free.id)
    for record in (own, settled, others, free):
        canceling = await stored(store, after(record, CancelRequested(NOON)))
        if record is settled:
            await stored(store, ended(canceling))
    assert list(await store.canceling("a")) == [own.id]
    assert list(await store.canceling("b")) == [others.id]
    assert list(await store.canceling("nobody")) == []


async def test_new_tasks_and_cancels_are_told_to_whoever_watches_or_he_is_told_that_they_are_not(
    open_store: Callable[[], TaskStore], request: pytest.FixtureRequest
) -> None:
    async with open_store() as store:
        told = asyncio.Event()
        watching = asyncio.create_task(store.watch(told.set))
        if request.node.callspec.id != "mongo":
            async with asyncio.timeout(10):
                await watching
            return
        try:
            async with asyncio.timeout(30):
                await told.wait()
                told.clear()
                (record,) = await kept(store, placed(new()))
                await told.wait()
                told.clear()
                await stored(store, after(record, CancelRequested(NOON)))
                await told.wait()
        finally:
            watching.cancel()


async def test_thousands_of_leases_are_renewed_at_once(store: TaskStore) -> None:
    records = await kept(store, *(placed(new()) for _ in range(3000)))
    assert len(await claimed(store)) == 3000
    assert await store.renew("a", ids(records)) == dict.fromkeys(ids(records), State.QUEUED)


async def test_a_released_task_can_be_claimed_again(store: TaskStore) -> None:
    queued, under_way = await kept(store, new(), placed(new()))
    for holder in ("a", "b", "a"):
        assert await claimed(store, holder) == ids([under_way, queued])
        for record in (queued, under_way):
            await store.release(holder, record.id)
    assert await store.renew("a", ids([queued, under_way])) == {}


async def test_nobody_can_claim_a_postponed_task_before_it_is_due(store: TaskStore) -> None:
    queued, under_way = await kept(store, new(), placed(new()))
    await claimed(store)
    now = datetime.now(UTC)
    for record in (queued, under_way):
        await store.release("a", record.id, not_before=now + timedelta(hours=1))
    assert await claimed(store, "a") == await claimed(store, "b") == []
    await stored(store, after(queued, Noted("Try again.", NOON)))
    await stored(store, after(under_way, Noted("Try again.", NOON)))
    assert await claimed(store) == ids([under_way, queued])
    for record in (queued, under_way):
        await store.release("a", record.id, not_before=now - timedelta(seconds=1))
    assert await claimed(store, "b") == ids([under_way, queued])


async def test_a_postponed_task_does_not_keep_those_behind_it_waiting(store: TaskStore) -> None:
    first, second = await kept(store, new(), new())
    assert await claimed(store, queued=1) == [first.id]
    await store.release("a", first.id, not_before=datetime.now(UTC) + timedelta(hours=1))
    assert await claimed(store, queued=1) == [second.id]


async def test_canceling_makes_a_postponed_task_due_at_once(store: TaskStore) -> None:
    (record,) = await kept(store, placed(new()))
    await claimed(store)
    await store.release("a", record.id, not_before=datetime.now(UTC) + timedelta(days=1))
    canceling = await stored(store, after(record, CancelRequested(NOON)))
    assert await store.claim("b", queued=0, ttl=MINUTE) == [canceling]


async def test_what_somebody_else_holds_is_not_released(store: TaskStore) -> None:
    held, free = await kept(store, new(), new())
    assert await claimed(store, "a", queued=1) == [held.id]
    later = datetime.now(UTC) + timedelta(hours=1)
    for task_id in (held.id, free.id, "nobody"):
        await store.release("b", task_id, not_before=later)
    assert await claimed(store, "b") == [free.id]
    assert await store.renew("a", [held.id]) == {held.id: State.QUEUED}
