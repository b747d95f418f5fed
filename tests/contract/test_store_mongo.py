"""What only the MongoDB store promises: on a replica set and on a single server, whatever becomes of them meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import os
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pymongo
import pytest

from tesapi.errors import ConfigurationProblem, DestinationFull, InvalidDocument, StoreUnavailable, TaskNotFound
from tesapi.store import mongo, mongo_database, mongo_lists
from tesapi.store.base import TaskQuery
from tesapi.store.mongo import MongoStore
from tesapi.tasks import Tasks
from tesapi.tes import views
from tesapi.tes.events import Discarded, Event, JobEnded, JobStarted, Noted, Outcome, Placed, Prepared, Reported
from tesapi.tes.models import View
from tesapi.tes.record import TaskRecord
from tesapi.tes.states import State
from tests.contract.conftest import Clock
from tests.contract.records import MINUTE, NOON, after, done, ended, kept, new, placed, stored
from tests.mongod import Mongod, ReplicaSet
from tests.proxy import Proxy

# The driver leaves a socket to the garbage collector where it was closed while it tried to connect.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

PASSWORD = "p/a:s@s w%ord"


@pytest.fixture(scope="module", autouse=True)
def sockets_of_the_driver() -> Iterator[None]:
    """What it has left is not to be found in the tests of other modules."""
    yield
    gc.collect()


@pytest.fixture(scope="module", params=["replica-set", "standalone"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, mongod_program: Path
) -> Iterator[Mongod]:
    """One of this module's own, which is stopped, killed and made to fail."""
    folder = tmp_path_factory.mktemp("server")
    with Mongod(folder, mongod_program, replica_set=request.param == "replica-set") as server:
        yield server


@pytest.fixture
def uri(server: Mongod) -> str:
    """A database with nothing in it."""
    return server.database_url(f"test-{uuid.uuid4().hex}")


@pytest.fixture
async def store(uri: str) -> AsyncIterator[MongoStore]:
    async with MongoStore(uri) as store:
        yield store


async def refusal(uri: str) -> str:
    with pytest.raises(ConfigurationProblem) as caught:
        async with MongoStore(uri):
            pass
    return str(caught.value)


async def listed(store: MongoStore, **filters: Any) -> list[str]:
    page = await store.find(TaskQuery(size=2047, **filters))
    assert page.next_token is None
    return [json.loads(view)["id"] for view in page.views]


async def claimed(store: MongoStore, holder: str = "a", queued: int = 100) -> list[str]:
    return [record.id for record in await store.claim(holder, queued=queued, ttl=MINUTE)]


async def until(condition: Callable[[], Awaitable[Any]]) -> Any:
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(StoreUnavailable):
                if value := await condition():
                    return value
            await asyncio.sleep(0.02)


# What a caller does: what it is not told, it asks for again.


async def again(act: Callable[[], Awaitable[Any]]) -> Any:
    """The answer, once there is one."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(StoreUnavailable):
                return await act()


async def _there(store: MongoStore, task_ids: list[str]) -> bool:
    return await listed(store) == task_ids


Fault = Callable[[], contextlib.AbstractAsyncContextManager[None]]
Step = Callable[[MongoStore, Fault], Awaitable[None]]


async def insert(store: MongoStore, fault: Fault) -> None:
    (first,) = await kept(store, new())
    record = new()
    async with fault():
        with contextlib.suppress(StoreUnavailable):
            await store.insert([record])
    with contextlib.suppress(TimeoutError):  # on a busy machine it may not even have been sent in time
        async with asyncio.timeout(5):
            await until(lambda: _there(store, [record.id, first.id]))
    if record.id not in await listed(store):
        await store.insert([record])
    assert await listed(store) == [record.id, first.id]
    assert await store.load(record.id) == record


async def insert_many(store: MongoStore, fault: Fault) -> None:
    (first,) = await kept(store, new())
    records = [new() for _ in range(3)]
    sure = False
    async with fault():
        with contextlib.suppress(StoreUnavailable):
            await store.insert(records)
            sure = True
    there = await again(lambda: listed(store))
    assert there == [*(record.id for record in reversed(records)), first.id] or (not sure and there == [first.id])


async def insert_once(store: MongoStore, fault: Fault) -> None:
    first, second = new(), new()
    async with fault():
        with contextlib.suppress(StoreUnavailable):
            assert await store.insert_once(first, "k", "digest") == first.id
    task_id = await again(lambda: store.insert_once(second, "k", "digest"))
    assert await listed(store) == [task_id]
    assert await again(lambda: store.keyed("ada", "k", "digest")) == task_id


async def note(store: MongoStore, fault: Fault) -> None:
    (record,) = await kept(store, new())
    await changed_once(store, fault, record, after(record, Noted("x", NOON)))


async def change(store: MongoStore, fault: Fault) -> None:
    (record,) = await kept(store, placed(new()))
    await changed_once(store, fault, record, ended(record))


async def change_beside_a_large_one(store: MongoStore, fault: Fault) -> None:
    (record,) = await kept(store, noted(placed(new()), "x" * 100_000))
    await changed_once(store, fault, record, noted(record, "y" * 100_000))


async def place(store: MongoStore, fault: Fault) -> None:
    first, second = await kept(store, new(), new())
    await changed_once(store, fault, first, placed(first), at_most=1)
    with pytest.raises(DestinationFull):
        await again(lambda: store.replace(placed(second), at_most=1))
    assert await store.occupied() == {"local": 1}


async def changed_once(
    store: MongoStore, fault: Fault, record: TaskRecord, changed: TaskRecord, at_most: int | None = None
) -> None:
    async with fault():
        with contextlib.suppress(StoreUnavailable):
            assert await store.replace(changed, at_most=at_most)
    now = await again(lambda: store.load(record.id))
    assert now in (record, replace(changed, revision=1))
    if now == record:  # it was not done, and may be done any moment
        await again(lambda: store.replace(changed, at_most=at_most))
    assert await again(lambda: store.load(record.id)) == replace(changed, revision=1)


async def claim(store: MongoStore, fault: Fault) -> None:
    records = await kept(store, *(new() for _ in range(3)), placed(new()))
    taken: list[str] = []
    async with fault():
        with contextlib.suppress(StoreUnavailable):
            taken += await claimed(store)
    while len(taken) < 4:
        taken += await again(lambda: claimed(store))
    assert sorted(taken) == sorted(record.id for record in records)
    assert await claimed(store, "b") == await claimed(store) == []
    assert set(await store.renew("a", taken)) == set(taken)


async def renew(store: MongoStore, fault: Fault) -> None:
    (record,) = await kept(store, new())
    await claimed(store)
    async with fault():
        with contextlib.suppress(StoreUnavailable):
            assert await store.renew("a", [record.id]) == {record.id: State.QUEUED}
    assert await again(lambda: store.renew("a", [record.id])) == {record.id: State.QUEUED}


async def release(store: MongoStore, fault: Fault) -> None:
    records = await kept(store, new(), placed(new()))
    await claimed(store)
    async with fault():
        with contextlib.suppress(StoreUnavailable):
            await store.release("a", records[0].id)
    await again(lambda: store.release("a", records[0].id))
    assert await again(lambda: claimed(store, "b")) == [records[0].id]
    assert await store.renew("a", [record.id for record in records]) == {records[1].id: State.QUEUED}


async def purge(store: MongoStore, fault: Fault) -> None:
    over = await kept(store, *(noted(done(placed(new())), "x" * 50_000) for _ in range(3)))
    (under_way,) = await kept(store, new())
    async with fault():
        with contextlib.suppress(StoreUnavailable):
            await store.purge(keep=1, limit=2)
    while await again(lambda: store.purge(keep=1, limit=2)):
        pass
    assert await listed(store) == [under_way.id, over[2].id]


STEPS: list[Step] = [
    insert,
    insert_many,
    insert_once,
    note,
    change,
    change_beside_a_large_one,
    place,
    claim,
    renew,
    release,
    purge,
]  # fmt: skip


def noted(record: TaskRecord, text: str) -> TaskRecord:
    """The record with a note."""
    return after(record, Noted(text, NOON))


# Faults.


@pytest.mark.parametrize("step", STEPS)
async def test_a_write_whose_answer_was_lost_is_done_once(server: Mongod, step: Step) -> None:
    with Proxy(f"127.0.0.1:{server.port}") as proxy:
        uri = f"mongodb://127.0.0.1:{proxy.port}/test-{uuid.uuid4().hex}?directConnection=true"

        @contextlib.asynccontextmanager
        async def answers_are_lost() -> AsyncIterator[None]:
            proxy.reset_after(0)
            async with asyncio.TaskGroup() as children:
                healing = children.create_task(heal_in(0.3))
                yield
                await healing

        async def heal_in(seconds: float) -> None:
            await asyncio.sleep(seconds)
            proxy.heal()

        async with MongoStore(uri) as store:
            await step(store, answers_are_lost)


@pytest.mark.parametrize("step", STEPS)
async def test_a_write_that_comes_through_late_is_done_once(
    server: Mongod, uri: str, step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with MongoStore(uri) as store:

        @contextlib.asynccontextmanager
        async def stands_still() -> AsyncIterator[None]:
            with monkeypatch.context() as patched, server.suspended():
                patched.setattr(mongo, "_PATIENCE_S", 0.4)
                yield

        await step(store, stands_still)


@pytest.mark.parametrize("step", [insert, change, claim, renew])
async def test_the_same_store_goes_on_when_its_server_was_killed_and_started_again(
    server: Mongod, uri: str, step: Step
) -> None:
    @contextlib.asynccontextmanager
    async def killed() -> AsyncIterator[None]:
        server.kill()
        async with asyncio.TaskGroup() as children:
            starting = children.create_task(asyncio.to_thread(server.start))
            yield
            await starting

    async with MongoStore(uri) as store:
        await step(store, killed)


_COMMANDS = ["insert", "update", "findAndModify", "find", "distinct", "aggregate", "delete", "commitTransaction"]
_FAILURES: dict[str, dict[str, object]] = {
    "the connection is closed": {"closeConnection": True},
    "it is no primary any more": {"errorCode": 10107, "errorLabels": ["RetryableWriteError"]},
    "it refuses": {"errorCode": 8000},
    "it has not confirmed": {"writeConcernError": {"code": 64, "errmsg": "waiting for replication timed out"}},
    "it shuts down before it confirms": {"writeConcernError": {"code": 91, "errmsg": "shutdown in progress"}},
}


@pytest.mark.parametrize("failure", _FAILURES)
async def test_no_step_is_lost_and_none_is_done_twice_however_often_commands_fail(
    server: Mongod, uri: str, failure: str
) -> None:
    chance = random.Random(7)
    async with MongoStore(uri) as first, MongoStore(uri) as second:
        records = [new(owner=chance.choice("xyz")) for _ in range(6)]
        await first.insert(records)
        held: dict[str, str] = {}
        left = {record.id for record in records}
        with failing_now_and_then(server, _FAILURES[failure]):
            workers = (
                work(store, holder, held, left) for store, holder in ((first, "a"), (second, "b"), (second, "c"))
            )
            await asyncio.gather(*workers)
        for record in records:
            assert_driven_once(await first.load(record.id))
        assert await first.occupied() == {}
        assert await claimed(first) == []


def assert_driven_once(record: TaskRecord) -> None:
    """It has come to its end by the steps of `work`."""
    assert record.state is State.COMPLETE
    assert [note.text for note in record.progress.notes] == ["one", "two", "three"]
    assert len(record.progress.attempts) == 1
    assert record.revision == 8


async def work(store: MongoStore, holder: str, held: dict[str, str], left: set[str]) -> None:
    """Claim, and see through what was claimed, until nothing is left."""
    tasks = Tasks(store, {})
    async with asyncio.timeout(90):
        while left:
            records = await again(lambda: store.claim(holder, queued=2, ttl=MINUTE))
            for record in records:
                assert held.setdefault(record.id, holder) == holder
                assert record.id in left
            for record in records:
                job_id = f"job-{record.id}"
                steps: list[Event] = [
                    Noted("one", NOON),
                    Placed(job_id, "local", NOON),
                    Prepared(job_id, {"directory": "/x"}),
                    Reported(job_id, JobStarted(seq=1, at=NOON, event="started", host="node1")),
                    Noted("two", NOON),
                    Noted("three", NOON),
                    Reported(job_id, JobEnded(seq=2, at=NOON, event="ended", outcome=Outcome.COMPLETE)),
                    Discarded(job_id),
                ]
                for event in steps:
                    at_most = 4 if isinstance(event, Placed) else None
                    record = await recorded(tasks, record, event, at_most)
                left.discard(record.id)
                del held[record.id]
                await again(lambda record=record: store.release(holder, record.id))
            await asyncio.sleep(0)


async def recorded(tasks: Tasks, record: TaskRecord, event: Event, at_most: int | None) -> TaskRecord:
    """As the dispatcher does: where the store did not answer, by what is stored now."""
    while True:
        try:
            return await tasks.record(record, event, at_most=at_most)
        except StoreUnavailable:
            record = await again(functools.partial(tasks.load, record.id))


@contextlib.contextmanager
def failing_now_and_then(server: Mongod, how: Mapping[str, object]) -> Iterator[None]:
    with server.client() as client:
        data = {"failCommands": _COMMANDS, "appName": mongo_database.APP_NAME, **how}
        mode = {"activationProbability": 0.05}
        client.admin.command({"configureFailPoint": "failCommand", "mode": mode, "data": data})
        try:
            yield
        finally:
            client.admin.command({"configureFailPoint": "failCommand", "mode": "off"})


async def test_what_was_acknowledged_survives_the_kill_of_the_server(server: Mongod, uri: str) -> None:
    acknowledged: list[str] = []
    async with MongoStore(uri) as store:

        async def create() -> None:
            while len(acknowledged) < 300:
                record = new()
                with contextlib.suppress(StoreUnavailable):
                    await store.insert([record])
                    acknowledged.append(record.id)

        async def kill() -> None:
            for size in (100, 200):
                await until(lambda size=size: _answer(len(acknowledged) >= size))
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)

        await asyncio.gather(*(create() for _ in range(8)), kill())
        assert set(acknowledged) <= set(await listed(store))


async def _answer(value: object) -> object:
    return value


async def test_no_step_is_lost_or_done_twice_when_the_server_that_takes_writes_dies(
    tmp_path: Path, mongod_program: Path
) -> None:
    with ReplicaSet(tmp_path, mongod_program) as servers:
        uri = servers.url.replace("/?", "/test?")
        async with MongoStore(uri) as first, MongoStore(uri) as second:
            records = [new(owner=f"user{number % 3}") for number in range(150)]
            await first.insert(records)
            left = {record.id for record in records}

            async def kill() -> None:
                for share in (120, 60):
                    await until(lambda share=share: _answer(len(left) <= share))
                    primary = await until(lambda: asyncio.to_thread(lambda: servers.primary))
                    await asyncio.to_thread(primary.kill)
                    await until(lambda: asyncio.to_thread(lambda: servers.primary))
                    await asyncio.to_thread(primary.start)

            held: dict[str, str] = {}
            workers = (work(store, holder, held, left) for store, holder in ((first, "a"), (second, "b")))
            await asyncio.gather(*workers, kill())
            for record in records:
                assert_driven_once(await first.load(record.id))


# Several processes.


async def test_nobody_is_taken_for_dead_because_the_database_was_away(server: Mongod, uri: str) -> None:
    clock = Clock()
    async with MongoStore(uri, clock=clock) as living, MongoStore(uri, clock=clock) as taker:
        (record,) = await kept(living, new())
        assert await claimed(living, "a") == [record.id]
        assert await claimed(taker, "b") == []
        server.kill()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(mongo, "_PATIENCE_S", 0.2)
            with pytest.raises(StoreUnavailable):
                await claimed(taker, "b")
        server.start()
        clock.now_s += 3600
        assert await until(lambda: _claimed_or_none(taker)) == [None]
        assert await living.renew("a", [record.id]) == {record.id: State.QUEUED}
        clock.now_s += 59
        assert await claimed(taker, "b") == []
        clock.now_s += 60
        assert await claimed(taker, "b") == [record.id]


async def _claimed_or_none(store: MongoStore) -> list[str | None]:
    return list(await claimed(store, "b")) or [None]


async def test_clocks_of_processes_may_differ(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process's own is an hour ahead of, or behind, the server's."""
    now, ahead_s = time.time, 0.0
    monkeypatch.setattr("time.time", lambda: now() + ahead_s)
    async with contextlib.AsyncExitStack() as stack:
        stores = {}
        for ahead_s in (3600.0, -3600.0, 0.0):
            stores[ahead_s] = await stack.enter_async_context(MongoStore(uri))
            await stores[ahead_s].insert([new()])
            await stores[ahead_s].purge(keep=0, limit=1)
        made: list[str] = await listed(stores[0.0])
        for ahead_s in (3600.0, 0.0, -3600.0) * 3:
            await asyncio.sleep(0.02)  # as exact as the clock of another machine can be known
            await stores[ahead_s].insert([record := new()])
            made.insert(0, record.id)
        assert await listed(stores[0.0]) == made
        for ahead_s, store in stores.items():  # noqa: B007 - it is what the clock shows
            (task_id,) = await claimed(store, queued=1)
            theirs = datetime.fromtimestamp(time.time(), UTC)
            await store.release("a", task_id, not_before=theirs + timedelta(minutes=1))
            assert task_id not in await claimed(store, "b")
            for other in made:
                await store.release("b", other)
            (record,) = [await store.load(task_id)]
            record = await stored(store, done(await stored(store, placed(record))))
            theirs = datetime.fromtimestamp(time.time(), UTC)
            assert await store.purge(before=theirs - timedelta(minutes=1), limit=9) == 0
            assert await store.purge(before=theirs + timedelta(minutes=1), limit=9) == 1


async def test_a_pause_ends_by_the_clock_of_the_server(store: MongoStore, server: Mongod) -> None:
    (record,) = await kept(store, new())
    for pause_s in (-1.0, 0.3):
        assert await until(lambda: claimed(store)) == [record.id]
        await store.release("a", record.id, not_before=datetime.now(UTC) + timedelta(seconds=pause_s))
    assert await claimed(store, "b") == []
    assert await until(lambda: claimed(store, "b")) == [record.id]


async def test_processes_that_start_together_make_one_store(uri: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        stores = await asyncio.gather(*(stack.enter_async_context(MongoStore(uri)) for _ in range(6)))
        assert len({store.id for store in stores}) == 1


async def test_of_many_processes_that_place_tasks_no_more_are_than_allowed(uri: str) -> None:
    async with MongoStore(uri) as one, MongoStore(uri) as other:
        records = await kept(one, *(new() for _ in range(40)))
        places = ((one, other)[number % 2].replace(placed(record), at_most=5) for number, record in enumerate(records))
        answers = await asyncio.gather(*places, return_exceptions=True)
        assert Counter(type(answer) for answer in answers) == {bool: 5, DestinationFull: 35}


async def test_a_bound_that_was_lowered_holds_for_all_that_come_after(store: MongoStore) -> None:
    many = [await stored(store, placed(record)) for record in await kept(store, *(new() for _ in range(9)))]
    waiting = await kept(store, *(new() for _ in range(9)))
    chance = random.Random(3)
    chance.shuffle(many)
    for gone, record in enumerate(many, start=1):
        await stored(store, done(record))
        answers = await asyncio.gather(
            *(store.replace(placed(each), at_most=3) for each in waiting), return_exceptions=True
        )
        assert sum(answer is True for answer in answers) == (1 if gone == 7 else 0)
        if gone == 7:
            break
    assert await store.occupied() == {"local": 3}


# What is long.


async def test_a_task_near_the_limit_settles_and_leaves_nothing_behind(store: MongoStore) -> None:
    (record,) = await kept(store, placed(new(name="x" * (7 << 20))))
    for _ in range(2):
        record = await stored(store, after(record, Noted(os.urandom(3 << 20).hex(), NOON)))
        assert await store.load(record.id) == record
        for view in View:
            assert await store.view(record.id, view) == views.render(record, view)
    record = await stored(store, done(record))
    assert (await store.find(TaskQuery(view=View.BASIC))).views == [views.render(record, View.BASIC)]
    assert await store._db.parts.count_documents({}) == 3
    assert await store.purge(keep=0, limit=1) == 1
    assert await store._db.parts.count_documents({}) == 0


async def test_a_task_that_is_larger_than_a_document_may_be_is_kept(store: MongoStore) -> None:
    record = new()
    executor = record.document.executors[0].model_copy(update={"command": ("echo", "x" * (20 << 20))})
    record = replace(record, document=record.document.model_copy(update={"executors": (executor,)}))
    await store.insert([record])
    assert await store.load(record.id) == record
    for view in View:
        assert await store.view(record.id, view) == views.render(record, view)
    assert [each.id for each in await store.claim("a", queued=1, ttl=MINUTE)] == [record.id]


async def test_a_name_that_is_larger_than_a_document_may_be_is_refused(store: MongoStore) -> None:
    with pytest.raises(InvalidDocument, match="name"):
        await store.insert([new(name="x" * (17 << 20))])
    assert await listed(store) == []


async def test_whoever_is_slower_leaves_no_parts(store: MongoStore) -> None:
    (record,) = await kept(store, new())
    changes = [after(record, Noted(f"{number}" * 50_000, NOON)) for number in range(5)]
    answers = await asyncio.gather(*(store.replace(change) for change in changes))
    assert sorted(answers) == [False] * 4 + [True]
    assert await store._db.parts.count_documents({}) == 1
    with pytest.raises(DestinationFull):
        await store.replace(placed(await store.load(record.id)), at_most=0)
    assert await store._db.parts.count_documents({}) == 1


async def test_parts_that_were_left_by_a_write_that_was_not_done_are_removed_after_a_day(
    store: MongoStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (record,) = await kept(store, noted(placed(new(name="x" * 50_000)), "y" * 50_000))
    left = await store._stowed(record.id, b"z" * 50_000)
    gone = await store._stowed("nobody", b"z" * 50_000)
    assert await store.purge(keep=0, limit=9) == 0
    assert await store._db.parts.count_documents({}) == 4
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 100_000)
    for _ in range(2):
        assert await store.purge(keep=0, limit=9) == 0
        assert await store._db.parts.count_documents({}) == 2
    assert left != gone
    assert await store.load(record.id) == record


async def test_a_page_of_large_tasks_is_full_sooner(store: MongoStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mongo, "_PAGE_BYTES", 1000)
    records = await kept(store, *(new() for _ in range(9)))
    page = await store.find(TaskQuery(view=View.FULL, size=256))
    assert 1 <= len(page.views) < 9
    assert json.loads(page.views[-1])["id"] == records[-len(page.views)].id
    assert page.next_token is not None


_STRANGE = ["a.b", "$where", "$$NOW", "a.$[x].b", "", "\0", "ü😀", "x" * 3000, "y" * 200, "1:x", "[]"]


async def test_names_and_tags_may_be_of_any_characters(store: MongoStore) -> None:
    records = {text: new(name=text, tags={text: value}) for text in _STRANGE for value in ("v",)}
    await store.insert(list(records.values()))
    valued = await kept(store, *(new(name="n", tags={"k": text}) for text in _STRANGE))
    for text, record in records.items():
        assert await listed(store, tags=((text, "v"),)) == await listed(store, tags=((text, ""),)) == [record.id]
        assert await listed(store, tags=((text, "w"),)) == []
    for text, record in zip(_STRANGE, valued, strict=True):
        found = await listed(store, tags=(("k", text),))
        assert found == ([record.id] if text else [each.id for each in reversed(valued)])
    assert await listed(store, name_prefix="$$") == [records["$$NOW"].id]
    assert await listed(store, name_prefix="x" * 2999) == [records["x" * 3000].id]


async def test_a_destination_may_be_of_any_characters(store: MongoStore) -> None:
    for name in ("$holder", "a.b", "$$NOW"):
        (record,) = await kept(store, new())
        await stored(store, placed(record, name))
        assert (await store.occupied())[name] == 1


# Indexes.


async def test_lists_are_read_from_indexes_in_their_order(store: MongoStore) -> None:
    usual = [new(owner=f"user{number % 3}") for number in range(1500)]
    await store.insert(usual)
    await store.insert([new(owner="user1", name="rare", tags={"kind": "rare", "half": "1"}) for _ in range(5)])
    some = {"owner": "user1"}
    expected = {
        TaskQuery(): ("by_seq", True),
        TaskQuery(**some): ("by_owner", True),
        TaskQuery(**some, state=State.QUEUED): ("by_state", True),
        TaskQuery(**some, name_prefix="rare"): ("by_name", False),
        TaskQuery(**some, tags=(("lab", ""),)): ("by_tag", True),
        TaskQuery(**some, tags=(("kind", "rare"), ("half", ""))): ("by_tag", True),
        TaskQuery(name_prefix="count"): ("by_seq", True),
        TaskQuery(state=State.QUEUED): ("by_seq", True),
        TaskQuery(state=State.COMPLETE): ("by_state", False),
        TaskQuery(tags=(("kind", "rare"),)): ("by_tag", False),
        TaskQuery(**some, state=State.QUEUED, name_prefix="count", tags=(("lab", ""),)): ("by_tag", True),
    }
    for query, (index, in_order) in expected.items():
        query = replace(query, size=20)
        cursor = await mongo_lists.page(store._db.tasks, query, None, mongo._MINIMAL)
        explained = await cursor.explain()
        stages = dict(_stages(explained["queryPlanner"]["winningPlan"]))
        assert stages.get("IXSCAN") == index, (query, stages)
        assert ("SORT" not in stages) == in_order, (query, stages)
        statistics = explained["executionStats"]
        assert statistics["totalKeysExamined"] <= 30, query
        if index in {"by_owner", "by_state"}:
            assert statistics["totalDocsExamined"] == 0, query


def _stages(plan: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    yield plan["stage"], plan.get("indexName")
    for inner in (plan.get("inputStage"), *plan.get("inputStages", ())):
        if inner is not None:
            yield from _stages(inner)


async def test_claims_look_at_nothing_that_is_done_or_held(store: MongoStore) -> None:
    await store.insert([done(placed(new())) for _ in range(300)])
    await store.insert([new(owner=f"user{number % 4}") for number in range(300)])
    await claimed(store, "other", queued=250)
    tasks = store._db.tasks
    asked: list[tuple[Mapping[str, object], str, int]] = [
        ({"distinct": "tasks", "key": "owner", "query": {"due": "queued"}}, "to_claim", 6),
        ({"find": "tasks", "filter": {"due": "placed"}, "projection": {"_id": 1}}, "to_claim", 1),
        (
            {"find": "tasks", "filter": {"due": "queued", "owner": "user1"}, "sort": {"seq": 1}, "limit": 3},
            "to_claim",
            3,
        ),
        ({"find": "tasks", "filter": mongo._PAUSE_IS_OVER, "hint": "postponed"}, "postponed", 1),
        ({"distinct": "tasks", "key": "holder", "query": {"holder": {"$gte": ""}}}, "held", 2),
        ({"find": "tasks", "filter": {"owner": "ada", "key": "k"}}, "keys", 1),
        ({"count": "tasks", "query": {"state": "QUEUED"}, "limit": 7}, "by_state", 8),
    ]
    for command, index, most in asked:
        explained = await tasks.database.command("explain", dict(command), verbosity="executionStats")
        plan = explained["queryPlanner"]["winningPlan"]
        assert index in dict.fromkeys(name for _, name in _stages(plan)), (command, plan)
        assert explained["executionStats"]["totalKeysExamined"] <= most, command


# The database.


async def test_writes_are_confirmed_by_most_servers_and_on_their_disks_whatever_the_uri_says(uri: str) -> None:
    async with MongoStore(f"{uri}&w=0&journal=false&readPreference=secondary&maxPoolSize=7") as store:
        for collection in (store._db.tasks, store._db.parts, store._db.holders):
            assert collection.write_concern.document == {"w": "majority", "j": True}
            assert collection.read_concern.document == {"level": "majority"}
            assert collection.read_preference == pymongo.ReadPreference.PRIMARY
        assert store._db.client.options.pool_options.max_pool_size == 7
        await kept(store, new())
    async with MongoStore(uri) as store:
        assert store._db.client.options.pool_options.max_pool_size == 64


async def test_the_database_is_that_of_the_uri_or_one_of_our_name(server: Mongod, uri: str) -> None:
    async with MongoStore(uri) as store:
        assert store._db.tasks.database.name in uri
    with server.client() as client:
        try:
            async with MongoStore(server.url) as store:
                assert store._db.tasks.database.name == "tesapi"
        finally:
            client.drop_database("tesapi")


async def test_fields_of_a_newer_minor_schema_are_kept_and_its_database_is_used(server: Mongod, uri: str) -> None:
    async with MongoStore(uri) as store:
        (record,) = await kept(store, new())
        await store._db.tasks.update_one({"_id": record.id}, {"$set": {"newer": {"a": 1}}})
        await store._db.tasks.database["store"].update_one({}, {"$set": {"minor": 7, "hint": "x"}})
    async with MongoStore(uri) as store:
        assert await claimed(store) == [record.id]
        record = await stored(store, placed(record))
        await store.release("a", record.id)
        assert await store.load(record.id) == record
        row = await store._db.tasks.find_one({"_id": record.id})
        assert row is not None
        assert row["newer"] == {"a": 1}
        found = await store._db.tasks.database["store"].find_one({})
        assert found is not None
        assert (found["major"], found["minor"], found["hint"]) == (1, 7, "x")


async def test_an_older_minor_schema_is_brought_up_to_date(uri: str) -> None:
    async with MongoStore(uri) as store:
        (record,) = await kept(store, new())
        await store._db.tasks.database["store"].update_one({}, {"$set": {"minor": -1}})
        await store._db.tasks.drop_index("by_tag")
    async with MongoStore(uri) as store:
        assert await store.load(record.id) == record
        assert "by_tag" in await store._db.tasks.index_information()
        found = await store._db.tasks.database["store"].find_one({})
        assert found is not None
        assert found["minor"] == mongo_database.SCHEMA[1]


async def test_another_major_schema_is_refused_and_left_as_it_is(uri: str) -> None:
    async with MongoStore(uri) as store:
        await kept(store, new())
        await store._db.tasks.database["store"].update_one({}, {"$set": {"major": 2, "minor": 3}})
        await store._db.tasks.drop_index("by_tag")
        text = await refusal(uri)
        assert "has schema 2.3, and this version of tesapi knows 1.0" in text
        assert "by_tag" not in await store._db.tasks.index_information()


async def test_the_database_of_another_program_is_refused_and_left_as_it_is(server: Mongod, uri: str) -> None:
    name = uri.rpartition("/")[2].partition("?")[0]
    with server.client() as client:
        client[name]["tasks"].insert_one({"mine": True})
        assert "is that of another program: name another one" in await refusal(uri)
        assert client[name].list_collection_names() == ["tasks"]


@pytest.mark.parametrize("version", [views.RENDER_VERSION - 1, views.RENDER_VERSION + 1])
async def test_a_fragment_of_another_version_is_rendered_anew(store: MongoStore, version: int) -> None:
    (record,) = await kept(store, placed(new()))
    await store._db.tasks.update_one({"_id": record.id}, {"$set": {"rendered": version, "fragment": b"?"}})
    assert await store.view(record.id, View.BASIC) == views.render(record, View.BASIC)
    assert (await store.find(TaskQuery(view=View.BASIC))).views == [views.render(record, View.BASIC)]


async def test_a_record_that_cannot_be_read_holds_up_no_other(
    store: MongoStore, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = await kept(store, new(), new())
    broken = b'{"executors": [], "name": "a secret"}'
    await store._db.tasks.update_one({"_id": bad.id}, {"$set": {"document": broken}})
    assert await claimed(store) == [good.id]
    assert await claimed(store) == []
    assert f"The task {bad.id} cannot be read" in caplog.text
    assert "secret" not in caplog.text


# Starting, and errors.


@pytest.mark.parametrize(
    "uri",
    [
        "mongodb://user:se/cret@h/d",
        "mongodb://user:se:cret@h/d",
        "mongodb://user:secret@h:port/d",
        "mongodb://user:secret@h/d?authMechanism=secret",
        "mongodb://user:secret@h:0/d",
        "mongodb://user:secret@/d",
        "mongodb://user:secret@h/d?replicaset=a&unknown=secret",
    ],
)
async def test_what_the_driver_does_not_read_as_a_uri_is_refused_and_not_shown(uri: str) -> None:
    text = await refusal(uri)
    assert text.startswith("db.mongodb_uri is no URI of MongoDB")
    assert "cret" not in text


async def test_a_server_that_is_too_old_is_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mongo_database, "_OLDEST_WIRE", 99)
    assert "is older than 4.4.2" in await refusal(uri)


async def test_a_server_that_does_not_know_our_commands_is_refused(server: Mongod, uri: str) -> None:
    with server.failing("listCollections", errorCode=59):
        assert "is older than 4.4.2" in await refusal(uri)


async def test_a_database_that_cannot_be_reached_is_named_without_the_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mongo_database, "_START_PATIENCE_S", 0.3)
    with pytest.raises(StoreUnavailable) as caught:
        async with MongoStore("mongodb://user:secret@127.0.0.1:1,127.0.0.1:2/tes?replicaSet=rs0"):
            pass
    text = str(caught.value)
    assert text.startswith(
        "MongoDB at 127.0.0.1:1,127.0.0.1:2 does not answer as it should: none of its servers can be"
    )
    assert "[Errno 111] Connect" in text
    assert "secret" not in text


async def test_a_user_that_is_refused_is_told_so_and_no_password_is_shown(tmp_path: Path, mongod_program: Path) -> None:
    with Mongod(tmp_path, mongod_program, key="0123456789abcdef") as server:
        with server.client() as client:
            client.admin.command("createUser", "root", pwd="root", roles=["root"])
        with server.client(username="root", password="root") as client:
            for name, role in (("writer", "readWrite"), ("reader", "read")):
                client["tes"].command("createUser", name, pwd=PASSWORD, roles=[{"role": role, "db": "tes"}])

        def uri(user: str, password: str) -> str:
            return f"mongodb://{user}:{quote_plus(password)}@127.0.0.1:{server.port}/tes?replicaSet=rs0"

        async with MongoStore(uri("writer", PASSWORD)) as store:
            await kept(store, new())
        wrong = await refusal(uri("writer", f"{PASSWORD}x"))
        nobody = await refusal(uri("nobody", PASSWORD))
        weak = await refusal(uri("reader", PASSWORD))
        async with MongoStore(uri("writer", PASSWORD)) as store:
            with server.client(username="root", password="root") as client:
                client["tes"].command("updateUser", "writer", roles=[])
            with pytest.raises(StoreUnavailable, match=r"it refused \(Unauthorized\)"):
                await until_refused(store)
    assert "refused the user or the password" in wrong
    assert wrong == nobody
    assert "readWrite is needed" in weak
    for text in (wrong, weak):
        assert f"MongoDB at 127.0.0.1:{server.port} " in text
        assert PASSWORD not in text
        assert quote_plus(PASSWORD) not in text


async def until_refused(store: MongoStore) -> None:
    async with asyncio.timeout(30):
        while True:
            await store.insert([new()])


async def test_an_unknown_task_is_not_found_while_others_are_purged(store: MongoStore) -> None:
    (record,) = await kept(store, noted(done(placed(new())), "x" * 50_000))
    await store._db.parts.delete_many({})
    await store._db.tasks.delete_many({})
    for view in View:
        with pytest.raises(TaskNotFound):
            await store.view(record.id, view)


async def test_answers_come_in_time_however_long_others_have_been_asking(
    store: MongoStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked together has no deadline of whoever asked first."""
    monkeypatch.setattr(mongo, "_PATIENCE_S", 1.0)
    (record,) = await kept(store, new())
    end = time.monotonic() + 2.5

    async def look() -> None:
        while time.monotonic() < end:
            await store.load(record.id)

    await asyncio.gather(*(look() for _ in range(8)))
