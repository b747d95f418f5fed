"""The store for more than one process or host: a MongoDB database, on a replica set or a single server.

A task is one document of `tasks`, with all that lists, claims and leases touch; a change of it is one write, which
happens wholly or not at all. Texts of up to some kilobytes stand in it as well: its TES document, its progress, its
BASIC view. Longer ones lie beside it, in as many documents of `parts` as they need, under a name that no other write
uses: they are written first and referred to then, so that whoever reads finds them whole.

*A write whose answer did not come may have been done, or be done later.* So each carries a token of its own by which
it is found again, and is repeated until its fate is known or patience ends. What a caller did not hear of is found by
its next call: a replaced record by `load`, and tasks that were leased by the next `claim` of the same holder.

Numbers that give tasks their order, pauses, and the time at which a task was done are of the server's clock: the clocks
of the processes may differ.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

import uuid_utils
from pymongo.asynchronous.cursor import AsyncCursor
from pymongo.errors import BulkWriteError, DocumentTooLarge, DuplicateKeyError, OperationFailure, PyMongoError

from tesapi.errors import (
    DestinationFull,
    FieldProblem,
    InvalidDocument,
    KeyReused,
    StoreUnavailable,
    TaskNotFound,
)
from tesapi.store import mongo_lists
from tesapi.store.base import Page, TaskQuery
from tesapi.store.mongo_database import (
    BY_STATE,
    DONE,
    HELD,
    KEYS,
    POSTPONED,
    SLOTS,
    TO_CLAIM,
    Database,
    NotSeenYet,
    Row,
    connected,
    is_unknown,
)
from tesapi.store.together import Together
from tesapi.store.tokens import page_token, position
from tesapi.tes import views
from tesapi.tes.models import TaskDocument, View
from tesapi.tes.record import TaskRecord, Work, dump_progress, parse_progress
from tesapi.tes.states import State

T = TypeVar("T")

_log = logging.getLogger(__name__)

_PATIENCE_S = 10.0
_PAUSE_S = 0.05
_INLINE_BYTES = 16 << 10
_PART_BYTES = 8 << 20  # a document of MongoDB has at most 16 MiB
_PAGE_BYTES = 32 << 20  # a page that has more is full, whatever its size: documents may have megabytes
_LONGEST_PAUSE_S = 3600.0
_TIME_ANEW_S = 60.0
_WRITES_KNOWN = 5
_CLAIMS_KNOWN = 1000
_AT_ONCE, _ASKERS = 500, 2
_LONG_ID = 1000
_RIPE_S = 86400.0  # no write takes so long
_DUPLICATE, _TOO_LARGE = 11000, 10334

_MINIMAL = {"_id": 1, "seq": 1, "state": 1}
_BASIC = {**_MINIMAL, "owner": 1, "rendered": 1, "fragment": 1, "document": 1}
_RECORD = {**_MINIMAL, "owner": 1, "revision": 1, "created": 1, "document": 1, "progress": 1}
_SHOWN = {View.MINIMAL: {**_MINIMAL, "owner": 1}, View.BASIC: _BASIC, View.FULL: _RECORD}
_NEWS: Sequence[Mapping[str, Any]] = [
    {
        "$match": {
            "$or": [
                {"operationType": "insert"},
                {"updateDescription.updatedFields.state": State.CANCELING.value},
            ]
        }
    },
    {"$project": {"operationType": 1}},
]
_NEWS_AWAITED_MS = 10_000
_WATCH_AGAIN_S = 2.0
_UNAUTHORIZED, _NO_STREAMS = 13, 40573
_REPLACED = {"_id": 0, "progress.token": 1, "progress.count": 1}
_REFERENCES = {"document.token": 1, "document.count": 1, "progress.token": 1, "progress.count": 1}

_Stages = list[Mapping[str, Any]]

_CLAIMABLE = [Work.QUEUED.value, Work.PLACED.value]
_DUE = {"$set": {"due": {"$cond": [{"$in": ["$work", _CLAIMABLE]}, "$work", "$$REMOVE"]}}}
_FREE: _Stages = [_DUE, {"$unset": ["holder", "claim"]}]
_DUE_AGAIN: _Stages = [_DUE, {"$unset": "not_before"}]
_PAUSE_IS_OVER = {
    "not_before": {"$exists": True},
    "$expr": {
        "$or": [
            {"$lte": ["$not_before", "$$NOW"]},
            # The server's clock has been set back.
            {"$gt": ["$not_before", {"$add": ["$$NOW", int(_LONGEST_PAUSE_S * 1000)]}]},
        ]
    },
}


class MongoStore:
    """Keeps records in the database that `uri` names. Entering raises ConfigurationProblem where it cannot be used.

    `clock` is the monotonic clock by which leases go stale.
    """

    def __init__(self, uri: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._uri = uri
        self._clock = clock
        self._resources = contextlib.AsyncExitStack()
        self._at_work: set[asyncio.Task[Any]] = set()
        self._served_last: str | None = None
        self._seen: dict[str, tuple[int, float]] = {}
        self._unheard: dict[str, list[bytes]] = {}
        self._leases: dict[tuple[str, str], bytes] = {}
        self._swept = ""
        self._arrivals = Together(self._add_together, at_once=_AT_ONCE, askers=_ASKERS)
        self._rows_by_id = {
            view: Together(functools.partial(self._find_together, fields), at_once=_AT_ONCE, askers=_ASKERS)
            for view, fields in _SHOWN.items()
        }

    @property
    def id(self) -> str:
        return self._db.store_id

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            self._db = await stack.enter_async_context(connected(self._uri))
            self._numbers = _Numbers(self._db)
            stack.push_async_callback(self._finished)
            self._resources = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._resources.aclose()

    # Making tasks.

    async def insert(self, records: Sequence[TaskRecord]) -> None:
        if not records:
            return
        rows = await self._rows(records)
        taken = await (self._surely(lambda: self._add_all(rows)) if len(rows) > 1 else self._added(rows[0]))
        if taken:
            await self._drop_parts(rows)
            raise StoreUnavailable(f"{self._db.where} did not take it: there is such a task already.")

    async def insert_once(self, record: TaskRecord, key: str, digest: str) -> str:
        rows = await self._rows([record])
        rows[0] |= {"key": key, "key_digest": digest}

        async def add() -> str:
            if not await self._add(rows):
                return record.id
            known = await self._keyed(record.owner, key, digest)
            if known is None:  # it is not seen yet, or was purged just now
                raise NotSeenYet
            return known

        try:
            task_id = await self._surely(add)
        except KeyReused:
            await self._drop_parts(rows)
            raise
        if task_id != record.id:
            await self._drop_parts(rows)
        return task_id

    async def keyed(self, owner: str, key: str, digest: str) -> str | None:
        with self._db.answering(_PATIENCE_S):
            return await self._keyed(owner, key, digest)

    async def _keyed(self, owner: str, key: str, digest: str) -> str | None:
        row = await self._db.tasks.find_one({"owner": owner, "key": key}, {"key_digest": 1}, hint=KEYS)
        if row is None:
            return None
        if row["key_digest"] != digest:
            raise KeyReused(key, row["_id"])
        return str(row["_id"])

    async def _rows(self, records: Sequence[TaskRecord]) -> list[Row]:
        numbers = await self._surely(lambda: self._numbers.take(len(records)))
        token = _token()
        rows = [_row(record, seq, token) for record, seq in zip(records, numbers, strict=True)]
        for record, row in zip(records, rows, strict=True):
            if "done" in row:
                row["done"] = await self._theirs(row["done"])
            row["document"] = await self._stowed(record.id, views.dump_document(record.document))
            row |= await self._changing(record)
        await self._number_slots(rows)
        return rows

    async def _added(self, row: Row) -> bool:
        """Insert a task, and with it those that come meanwhile; whether somebody has its id.

        What the driver does for each command takes longer than what the server does for each task.
        """
        if sum(len(text) for text in (row.get("name", ""), *row.get("tags", ()))) > _INLINE_BYTES:
            return bool(await self._surely(lambda: self._add([row])))
        return await self._arrivals.answer(row)

    async def _add_together(self, rows: Sequence[Row]) -> list[bool]:
        taken = await self._surely(lambda: self._add(rows))
        return [any(row is each for each in taken) for row in rows]

    async def _add(self, rows: Sequence[Row]) -> list[Row]:
        """Insert tasks, each for itself; those whose id or key somebody else has."""
        try:
            with _short_enough():
                await self._db.tasks.insert_many(rows, ordered=False)
        except BulkWriteError as error:
            if any(problem["code"] != _DUPLICATE for problem in error.details["writeErrors"]):
                raise
            if error.details["writeConcernErrors"]:
                raise NotSeenYet from error
            return await self._taken(rows, error)
        return []

    async def _taken(self, rows: Sequence[Row], error: BulkWriteError) -> list[Row]:
        clashes = {problem["index"]: set(problem["keyPattern"]) for problem in error.details["writeErrors"]}
        ids = [rows[index]["_id"] for index in clashes]
        there = {row["_id"]: row async for row in self._db.tasks.find({"_id": {"$in": ids}}, {"writes": 1})}
        taken, again = [], []
        for index, fields in clashes.items():
            row = rows[index]
            if row["_id"] in there:
                if row["writes"][0] not in there[row["_id"]]["writes"]:
                    taken.append(row)
            elif fields == {"_id"}:
                raise NotSeenYet  # perhaps it is ours
            elif "key" in fields:
                taken.append(row)
            else:
                again.append(row)
        if again:
            await self._number_anew(again)
            taken += await self._add(again)
        return taken

    async def _add_all(self, rows: list[Row]) -> bool:
        """Insert tasks, all or none; whether somebody has the id of one of them.

        Only a replica set can do so at once. Without one they come one after the other, and go again if one is refused;
        should this process die meanwhile, some of them stay.
        """
        if not self._db.transactions:
            taken = await self._add(rows)
            if taken:
                own = {"_id": {"$in": [row["_id"] for row in rows]}, "writes": rows[0]["writes"][0]}
                await self._db.tasks.delete_many(own)
            return bool(taken)

        async def add(session: Any) -> None:
            await self._db.tasks.insert_many(rows, session=session)

        try:
            with _short_enough():
                async with self._db.client.start_session() as session:
                    await session.with_transaction(add)
        except BulkWriteError as error:
            problems = error.details["writeErrors"]
            if not problems or any(problem["code"] != _DUPLICATE for problem in problems):
                raise
            if "_id" in problems[0]["keyPattern"]:
                there = await self._db.tasks.find_one({"_id": rows[0]["_id"]}, {"writes": 1})
                return there is None or rows[0]["writes"][0] not in there["writes"]
            await self._number_anew(rows)
            raise NotSeenYet from error
        return False

    async def _number_anew(self, rows: list[Row]) -> None:
        for row, seq in zip(rows, await self._numbers.take(len(rows)), strict=True):
            row["seq"] = seq
        await self._number_slots(rows)

    async def _number_slots(self, rows: list[Row]) -> None:
        """Give those that are placed already a place at their destinations, which nobody else has."""
        placed = [row for row in rows if "destination" in row]
        for destination in {row["destination"] for row in placed}:
            with self._db.answering(_PATIENCE_S):
                used = set(await self._slots(destination))
            free = (number for number in itertools.count() if number not in used)
            for row, slot in zip((row for row in placed if row["destination"] == destination), free, strict=False):
                row["slot"] = slot

    # Reading.

    async def load(self, task_id: str, *, owner: str | None = None) -> TaskRecord:
        with self._db.answering(_PATIENCE_S):
            return _record(await self._one(task_id, View.FULL, owner))

    async def view(self, task_id: str, view: View, *, owner: str | None = None) -> bytes:
        with self._db.answering(_PATIENCE_S):
            shown = await self._rendered(view, await self._one(task_id, view, owner))
            if shown is None:
                raise TaskNotFound(task_id)
            return shown

    async def find(self, query: TaskQuery) -> Page:
        before = position(self._db.store_id, query)
        fields = _MINIMAL if query.view is View.MINIMAL else _SHOWN[query.view]
        shown: list[bytes] = []
        bytes_so_far, last = 0, 0
        with self._db.answering(_PATIENCE_S):
            async with await mongo_lists.page(self._db.tasks, query, before, fields) as cursor:
                async for row in cursor:
                    if len(shown) == query.size or bytes_so_far > _PAGE_BYTES:
                        return Page(shown, page_token(self._db.store_id, query, last))
                    rendered = await self._rendered(query.view, row)
                    if rendered is not None:
                        shown.append(rendered)
                        bytes_so_far, last = bytes_so_far + len(rendered), row["seq"]
        return Page(shown, None)

    async def _one(self, task_id: str, view: View, owner: str | None) -> Row:
        row = None
        with contextlib.suppress(UnicodeEncodeError):  # text that is no Unicode, and so nobody's id
            if len(task_id.encode()) <= _LONG_ID:
                row = await self._rows_by_id[view].answer(task_id)
            else:
                row = await self._db.tasks.find_one({"_id": task_id}, _SHOWN[view])
            row = await self._whole(row, _SHOWN[view])
        if row is None or (owner is not None and owner != row["owner"]):
            raise TaskNotFound(task_id)
        return row

    async def _find_together(self, fields: Mapping[str, int], task_ids: Sequence[str]) -> list[Row | None]:
        with self._db.answering(_PATIENCE_S):
            if len(task_ids) == 1:
                return [await self._db.tasks.find_one({"_id": task_ids[0]}, fields)]
            cursor = self._db.tasks.find({"_id": {"$in": list(set(task_ids))}}, fields, batch_size=len(task_ids))
            rows = {row["_id"]: row async for row in cursor}
            return [rows.get(task_id) for task_id in task_ids]

    async def _rendered(self, view: View, row: Row) -> bytes | None:
        """None where the task has been purged meanwhile."""
        task_id, state = row["_id"], State(row["state"])
        if view is View.MINIMAL:
            return views.minimal(task_id, state)
        if view is View.BASIC and row["rendered"] == views.RENDER_VERSION and "fragment" in row:
            fragment = row["fragment"]
            if not fragment.startswith(b","):
                return views.with_fragment(task_id, state, fragment, b"")
            # Only the document may lie beside it, which never changes.
            document = (await self._whole(row, _BASIC) or row)["document"]
            return views.with_fragment(task_id, state, fragment, document) if isinstance(document, bytes) else None
        if view is View.BASIC:
            whole = await self._whole(await self._db.tasks.find_one({"_id": task_id}, _RECORD), _RECORD)
        else:
            whole = await self._whole(row, _RECORD)
        return None if whole is None else views.render(_record(whole), view)

    async def _whole(self, row: Row | None, fields: Mapping[str, int]) -> Row | None:
        """The row with what lies beside it; a later one where it has been changed meanwhile, or None."""
        while row is not None:
            beside = {name: row[name] for name in ("document", "progress") if isinstance(row.get(name), dict)}
            found = {name: await self._gathered(reference) for name, reference in beside.items()}
            if None not in found.values():
                return row | found
            row = await self._db.tasks.find_one({"_id": row["_id"]}, fields)
            if row is not None and all(row.get(name) == reference for name, reference in beside.items()):
                raise ValueError("Parts of the task are missing.")
        return None

    # Texts beside the tasks.

    async def _stowed(self, task_id: str, text: bytes) -> bytes | Row:
        """What stands in the task for `text`: itself, or where it lies."""
        if len(text) <= _INLINE_BYTES:
            return text
        token = uuid_utils.uuid7().hex
        pieces = [text[start : start + _PART_BYTES] for start in range(0, len(text), _PART_BYTES)]
        for number, piece in enumerate(pieces):
            part = {"_id": f"{token}-{number}", "task": task_id, "data": piece}

            async def keep(part: Row = part) -> None:
                with contextlib.suppress(DuplicateKeyError):  # the name is ours alone: it came through before
                    await self._db.parts.insert_one(part)

            await self._surely(keep)
        return {"token": token, "count": len(pieces)}

    async def _gathered(self, reference: Row) -> bytes | None:
        names = _part_names(reference)
        pieces = {part["_id"]: part["data"] async for part in self._db.parts.find({"_id": {"$in": names}})}
        return b"".join(pieces[name] for name in names) if len(pieces) == len(names) else None

    async def _drop_parts(self, rows: Iterable[Row]) -> None:
        if names := _parts_of(rows):
            with contextlib.suppress(StoreUnavailable), self._db.answering(_PATIENCE_S):
                await self._db.parts.delete_many({"_id": {"$in": names}})

    async def _changing(self, record: TaskRecord) -> Row:
        """What of the texts is another one with each revision. A long view is not kept, but rendered when it is asked
        for."""
        fragment = views.basic_fragment(record)
        short = {"fragment": fragment} if len(fragment) <= _INLINE_BYTES else {}
        progress = await self._stowed(record.id, dump_progress(record.progress))
        return {"progress": progress, "rendered": views.RENDER_VERSION, **short}

    # Changing tasks.

    async def replace(self, record: TaskRecord, *, at_most: int | None = None) -> bool:
        changing = await self._changing(record)
        token = _token()
        try:
            before = await self._surely(lambda: self._swap(record, changing, token, at_most))
        except DestinationFull:
            await self._drop_parts([changing])
            raise
        await self._drop_parts([changing] if before is None else [before])
        return before is not None

    async def _swap(self, record: TaskRecord, changing: Row, token: bytes, at_most: int | None) -> Row | None:
        """The row as it was before, as far as it refers to parts; None where somebody was faster."""
        destination = _destination(record)
        wanted: Row = {"_id": record.id, "revision": record.revision}
        slot: int | str | None = None
        if destination is not None and at_most is None:  # it mostly has its place there already
            placed = wanted | {"destination": destination}
            if (before := await self._changed(placed, record, changing, token, "$slot")) is not None:
                return before
        if destination is not None:
            here = await self._db.tasks.find_one(wanted, {"destination": 1, "slot": 1})
            if here is None:
                return await self._before(record, token)
            own = here.get("slot") if here.get("destination") == destination else None
            slot = _slot(destination, await self._slots(destination), own, at_most)
        before = await self._changed(wanted, record, changing, token, slot)
        return await self._before(record, token) if before is None else before

    async def _changed(
        self, wanted: Row, record: TaskRecord, changing: Row, token: bytes, slot: int | str | None
    ) -> Row | None:
        change = _change(record, changing, token, slot)
        try:
            return await self._db.tasks.find_one_and_update(wanted, change, _REPLACED)
        except DuplicateKeyError as error:
            raise NotSeenYet from error  # somebody else has that slot now

    async def _before(self, record: TaskRecord, token: bytes) -> Row | None:
        """As `_swap`, where the revision is another one: perhaps because this very change came through before."""
        row = await self._db.tasks.find_one({"_id": record.id}, {"revision": 1, "writes": 1})
        if row is None:
            return None
        if row["revision"] == record.revision:
            raise NotSeenYet
        return {} if token in row["writes"] else None

    async def _slots(self, destination: str) -> list[int]:
        taken = {"destination": destination, "slot": {"$gte": 0}}
        return [row["slot"] async for row in self._db.tasks.find(taken, {"_id": 0, "slot": 1}, hint=SLOTS)]

    async def queued(self, *, at_most: int) -> int:
        with self._db.answering(_PATIENCE_S):
            if at_most <= 0:
                return 0
            return await self._db.tasks.count_documents({"state": State.QUEUED.value}, limit=at_most, hint=BY_STATE)

    async def occupied(self) -> Mapping[str, int]:
        count: _Stages = [{"$match": {"slot": {"$gte": 0}}}, {"$group": {"_id": "$destination", "count": {"$sum": 1}}}]
        with self._db.answering(_PATIENCE_S):
            return {row["_id"]: row["count"] async for row in await self._db.tasks.aggregate(count, hint=SLOTS)}

    # Removing tasks.

    async def purge(self, *, before: datetime | None = None, keep: int | None = None, limit: int) -> int:
        with self._db.answering(_PATIENCE_S):
            while rows := await self._doomed(before, keep, limit):
                own = {"_id": {"$in": [row["_id"] for row in rows]}, "work": Work.DONE.value}
                removed = (await self._db.tasks.delete_many(own)).deleted_count
                await self._drop_parts(rows)
                if removed:  # otherwise another process was faster
                    return removed
            await self._sweep()
        return 0

    async def _sweep(self) -> None:
        """Remove old parts that no task refers to, of writes that were not done: some at a time, round and round."""
        ripe = f"{int(1000 * (time.time() - _RIPE_S)):012x}"  # their names begin with the time
        old = self._db.parts.find({"_id": {"$gt": self._swept, "$lt": ripe}}, {"task": 1})
        parts = await old.sort("_id", 1).limit(_AT_ONCE).to_list()
        self._swept = parts[-1]["_id"] if len(parts) == _AT_ONCE else ""
        owners = {"_id": {"$in": list({part["task"] for part in parts})}}
        used = set(_parts_of([row async for row in self._db.tasks.find(owners, {"_id": 1, **_REFERENCES})]))
        if lost := [part["_id"] for part in parts if part["_id"] not in used]:
            await self._db.parts.delete_many({"_id": {"$in": lost}})

    async def _doomed(self, before: datetime | None, keep: int | None, limit: int) -> list[Row]:
        until = None if before is None else await self._theirs(before)
        last: tuple[datetime, int] | None = None
        if keep is not None:
            newest_first = self._over({"done": 1, "seq": 1}).sort([("done", -1), ("seq", -1)])
            last = next(((row["done"], row["seq"]) for row in await newest_first.skip(keep).to_list(1)), None)
        if until is None and last is None:
            return []
        oldest_first = self._over({"done": 1, "seq": 1, **_REFERENCES}).sort([("done", 1), ("seq", 1)])
        rows = await oldest_first.limit(limit).to_list()
        return [
            row
            for row in rows
            if (until is not None and row["done"] < until) or (last is not None and (row["done"], row["seq"]) <= last)
        ]

    def _over(self, fields: Mapping[str, int]) -> AsyncCursor[Row]:
        return self._db.tasks.find({"done": {"$exists": True}}, fields, hint=DONE)

    async def _theirs(self, moment: datetime) -> datetime:
        """`moment`, of this machine's clock, by that of the server."""
        return moment + timedelta(seconds=await self._numbers.ahead_s())

    async def purgeable(self, *, before: datetime | None = None, keep: int | None = None) -> int:
        with self._db.answering(_PATIENCE_S):
            return await self._purgeable(before, keep)

    async def _purgeable(self, before: datetime | None, keep: int | None) -> int:
        count = 0
        if before is not None:
            count = await self._db.tasks.count_documents({"done": {"$lt": await self._theirs(before)}}, hint=DONE)
        if keep is not None:
            done = await self._db.tasks.count_documents({"done": {"$exists": True}}, hint=DONE)
            count = max(count, done - keep)
        return count

    # Leasing.

    async def claim(
        self, holder: str, *, queued: int, ttl: timedelta, passed_over: Collection[str] = ()
    ) -> list[TaskRecord]:
        claiming = asyncio.ensure_future(self._claim(holder, queued, ttl, passed_over))
        try:
            return await asyncio.shield(claiming)
        except asyncio.CancelledError:
            self._later(self._give_back(holder, claiming))
            raise

    async def _claim(self, holder: str, queued: int, ttl: timedelta, passed_over: Collection[str]) -> list[TaskRecord]:
        """Lease under a token of its own what is due, and read what has that token.

        A claim whose end nobody heard of may have leased tasks, or do so later: they come to the next one.
        """
        token = _token()
        unheard = self._unheard.setdefault(holder, [])
        try:
            with self._db.answering(_PATIENCE_S):
                await self._set_free(holder, ttl)
                followed = {"due": Work.PLACED.value, "destination": {"$nin": list(passed_over)}}
                placed = await self._db.tasks.find(followed, {"_id": 1}).to_list()
                earlier = unheard[-_CLAIMS_KNOWN:]
                unheard[:] = [*earlier, token]
                rows = await self._leased_earlier(holder, token, earlier) if earlier else []
                rows += await self._lease(holder, token, [row["_id"] for row in placed])
                rows.sort(key=lambda row: int(row["seq"]))
                while queued > 0 and (next_ones := await self._in_turn(queued)):
                    taken = await self._lease(holder, token, next_ones)
                    queued -= len(taken)
                    rows += taken
                records = [await self._readable(row) for row in rows]
        except StoreUnavailable:
            # While nothing was seen, nobody was seen standing still.
            self._seen.clear()
            raise
        unheard.remove(token)
        self._leases |= {(holder, row["_id"]): token for row in rows}
        return [record for record in records if record is not None]

    async def _set_free(self, holder: str, ttl: timedelta) -> None:
        """Make due what has waited long enough, and what those held who have not renewed for `ttl`."""
        tasks = self._db.tasks
        waiting, holders = await asyncio.gather(
            tasks.find_one(_PAUSE_IS_OVER, {"_id": 1}, hint=POSTPONED),
            tasks.distinct("holder", {"holder": {"$gte": ""}}),
        )
        if waiting is not None:
            await self._surely(lambda: tasks.update_many(_PAUSE_IS_OVER, _DUE_AGAIN, hint=POSTPONED))
        stale = await self._stale(holders, ttl) - {holder}  # a taker lives
        if stale:
            await self._surely(lambda: tasks.update_many({"holder": {"$in": list(stale)}}, _FREE))

    async def _stale(self, holders: list[str], ttl: timedelta) -> set[str]:
        """Those whose number has stood still for `ttl`, of the holders that hold anything."""
        found = self._db.holders.find({"_id": {"$in": holders}}) if holders else None
        raised = {} if found is None else {row["_id"]: row["beat"] async for row in found}
        beats = {holder: raised.get(holder, 0) for holder in holders}
        now = self._clock()
        first_seen = {holder: (beat, now) for holder, beat in beats.items()}
        self._seen = first_seen | {holder: seen for holder, seen in self._seen.items() if beats.get(holder) == seen[0]}
        return {holder for holder, (_, since) in self._seen.items() if now - since >= ttl.total_seconds()}

    async def _in_turn(self, wanted: int) -> list[str]:
        """Up to `wanted` queued tasks, the oldest of each owner in turn, beginning behind the owner served last."""
        names = sorted(await self._db.tasks.distinct("owner", {"due": Work.QUEUED.value}))
        first = next((at for at, name in enumerate(names) if self._served_last is None or name > self._served_last), 0)
        owners = [*names[first:], *names[:first]][:wanted]
        found: dict[str, list[Row]] = {owner: [] for owner in owners}
        missing = wanted
        while owners and missing > 0:
            share = math.ceil(missing / len(owners))
            more = await asyncio.gather(*(self._oldest(owner, found[owner], share) for owner in owners))
            for owner, rows in zip(owners, more, strict=True):
                found[owner] += rows
                missing -= len(rows)
            owners = [owner for owner, rows in zip(owners, more, strict=True) if len(rows) == share]
        turns = itertools.zip_longest(*([(owner, row["_id"]) for row in rows] for owner, rows in found.items()))
        in_turn = [task for turn in turns for task in turn if task is not None][:wanted]
        if in_turn:
            self._served_last = in_turn[-1][0]
        return [task_id for _, task_id in in_turn]

    async def _oldest(self, owner: str, behind: list[Row], count: int) -> list[Row]:
        wanted: Row = {"due": Work.QUEUED.value, "owner": owner}
        if behind:
            wanted["seq"] = {"$gt": behind[-1]["seq"]}
        return await self._db.tasks.find(wanted, {"seq": 1}, hint=TO_CLAIM).sort("seq", 1).limit(count).to_list()

    async def _lease(self, holder: str, token: bytes, task_ids: list[str]) -> list[Row]:
        """Lease those that are still due; their rows, in the order of `task_ids`."""
        if not task_ids:
            return []
        due = {"_id": {"$in": task_ids}, "due": {"$in": _CLAIMABLE}}
        lease = {"$set": {"holder": holder, "claim": token}, "$unset": {"due": 1}}
        await self._surely(lambda: self._db.tasks.update_many(due, lease))
        own = {"_id": {"$in": task_ids}, "holder": holder, "claim": token}
        rows = {row["_id"]: row async for row in self._db.tasks.find(own, _RECORD)}
        return [rows[task_id] for task_id in task_ids if task_id in rows]

    async def _leased_earlier(self, holder: str, token: bytes, earlier: list[bytes]) -> list[Row]:
        """What this holder leased without hearing of it. It is found again if this one goes unheard as well."""
        own = {"holder": holder, "claim": {"$in": earlier}}
        await self._surely(lambda: self._db.tasks.update_many(own, {"$set": {"claim": token}}))
        return await self._db.tasks.find({"holder": holder, "claim": token}, _RECORD).to_list()

    async def _readable(self, row: Row) -> TaskRecord | None:
        """The record; None, with a word in the log, of one that cannot be read: the others are not to suffer.

        Its lease is kept, so that it is not tried again and again, as long as the holder lives.
        """
        try:
            whole = await self._whole(row, _RECORD)
            return None if whole is None else _record(whole)
        except (ValueError, KeyError) as error:
            # Not its text, which may hold values of the document.
            _log.error("The task %s cannot be read (%s), and waits for an operator.", row["_id"], type(error).__name__)
            return None

    async def _give_back(self, holder: str, claiming: asyncio.Task[list[TaskRecord]]) -> None:
        """Nobody has heard of these leases: as long as the holder lives, nobody would ever give them back."""
        with contextlib.suppress(StoreUnavailable):
            for record in await claiming:
                await self.release(holder, record.id)

    async def watch(self, tell: Callable[[], None]) -> None:
        if not self._db.transactions:  # nor has it change streams
            return
        told = False
        while True:
            try:
                async with await self._db.tasks.watch(_NEWS, max_await_time_ms=_NEWS_AWAITED_MS) as news:
                    tell()  # of what was done before
                    async for _ in news:
                        tell()
            except PyMongoError as error:
                denied = isinstance(error, OperationFailure) and error.code in (_UNAUTHORIZED, _NO_STREAMS)
                if denied or not told:
                    _log.info(
                        "%s does not tell what is new, which is looked for instead (%s).",
                        self._db.where,
                        type(error).__name__,
                    )
                told = True
                if denied:
                    return
            await asyncio.sleep(_WATCH_AGAIN_S)

    async def renew(self, holder: str, task_ids: Collection[str]) -> Mapping[str, State]:
        raised = {"$inc": {"beat": 1}, "$currentDate": {"seen": True}}
        asked = frozenset(task_ids)
        try:
            await self._surely(lambda: self._db.holders.update_one({"_id": holder}, raised, upsert=True))
            with self._db.answering(_PATIENCE_S):
                rows = self._db.tasks.find({"holder": holder}, {"state": 1}, hint=HELD)
                held = {row["_id"]: State(row["state"]) async for row in rows}
        except StoreUnavailable:
            self._seen.clear()
            raise
        for key in [key for key in self._leases if key[0] == holder and key[1] not in held]:
            del self._leases[key]
        return {task_id: state for task_id, state in held.items() if task_id in asked}

    async def canceling(self, holder: str) -> Collection[str]:
        own = {"holder": holder, "state": State.CANCELING.value}
        with self._db.answering(_PATIENCE_S):
            return [row["_id"] async for row in self._db.tasks.find(own, {"_id": 1}, hint=HELD)]

    async def release(self, holder: str, task_id: str, *, not_before: datetime | None = None) -> None:
        own: Row = {"_id": task_id, "holder": holder}
        if (token := self._leases.get((holder, task_id))) is not None:
            # It may come through late, and is not to end a lease that was taken since.
            own["claim"] = token
        change = _FREE
        if not_before is not None:
            pause_s = not_before.timestamp() - time.time()
            pause_ms = int(1000 * min(max(pause_s, 0.0), _LONGEST_PAUSE_S))
            change = [{"$set": {"not_before": {"$add": ["$$NOW", pause_ms]}}}, {"$unset": ["holder", "claim", "due"]}]
        await self._surely(lambda: self._db.tasks.update_one(own, change))
        self._leases.pop((holder, task_id), None)

    # Asking the database.

    async def _surely(self, write: Callable[[], Awaitable[T]]) -> T:
        """What `write` answers. It is run again where nobody knows what it did: then it finds what it has done."""
        with self._db.answering(_PATIENCE_S):
            while True:
                try:
                    return await write()
                except PyMongoError as error:
                    if not is_unknown(error):
                        raise
                await asyncio.sleep(_PAUSE_S * random.random())  # noqa: S311

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._at_work.add(task)
        task.add_done_callback(self._at_work.discard)

    async def _finished(self) -> None:
        await asyncio.gather(*self._at_work, return_exceptions=True)
        await self._arrivals.finished()
        for rows in self._rows_by_id.values():
            await rows.finished()


class _Numbers:
    """Gives tasks their numbers: milliseconds of the server's clock, and below them what no other process has."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._salt = random.getrandbits(20)
        self._last = 0
        self._ahead_s = 0.0
        self._measured = float("-inf")

    async def take(self, count: int) -> range:
        """Numbers that are greater than all that this process has given."""
        milliseconds = int(1000 * (time.time() + await self.ahead_s()))
        first = max(self._last + 1, (milliseconds << 20) + self._salt)
        self._last = first + count - 1
        return range(first, first + count)

    async def ahead_s(self) -> float:
        """How far the server's clock is ahead, by a look at it that is not old."""
        if time.monotonic() - self._measured > _TIME_ANEW_S:
            self._ahead_s = await self._db.ahead_s()
            self._measured = time.monotonic()
        return self._ahead_s


def _token() -> bytes:
    return uuid_utils.uuid4().bytes


def _parts_of(rows: Iterable[Row]) -> list[str]:
    """The names of the parts that rows refer to."""
    references = [row[name] for row in rows for name in ("document", "progress") if isinstance(row.get(name), dict)]
    return [name for reference in references for name in _part_names(reference)]


def _part_names(reference: Row) -> list[str]:
    return [f"{reference['token']}-{number}" for number in range(reference["count"])]


@contextlib.contextmanager
def _short_enough() -> Iterator[None]:
    """What MongoDB does not take because it is too long is the name or the tags: nothing else long is in a task."""
    try:
        yield
    except (DocumentTooLarge, OperationFailure) as error:
        if isinstance(error, OperationFailure) and error.code != _TOO_LARGE:
            raise
        allowed = "less than 16 MB of both, the tags counted twice"
        raise InvalidDocument([FieldProblem("tags", "they and the name are too long", allowed)]) from None


def _slot(destination: str, used: list[int], own: int | None, at_most: int | None) -> int:
    """A number at `destination` that is not used; of two that take the same, the database refuses one.

    So there are never more than `at_most` while all numbers are below it. Where some are not, because more were allowed
    before, each of them takes one away from those that may be given. Raises DestinationFull.
    """
    if at_most is not None and len(used) - (own is not None) >= at_most:
        raise DestinationFull(destination, at_most)
    if own is not None:
        return own
    if at_most is None:
        below = 2 * len(used) + 16
    else:
        below = at_most
        while sum(number >= below for number in used) > at_most - below:
            below -= 1
    free = sorted(set(range(below)).difference(used))
    if not free:
        raise DestinationFull(destination, at_most or 0)
    return random.choice(free)  # noqa: S311


def _destination(record: TaskRecord) -> str | None:
    """Where the task takes up room."""
    return record.attempt.destination if record.work is Work.PLACED and record.attempt is not None else None


def _row(record: TaskRecord, seq: int, token: bytes) -> Row:
    """A new task, without its texts."""
    document, work, destination = record.document, record.work, _destination(record)
    optional = {
        "name": document.name,
        "tags": mongo_lists.indexed_tags(document.tags.items()) if document.tags else None,
        "due": work.value if work.value in _CLAIMABLE else None,
        "destination": destination,
        "done": datetime.fromtimestamp(time.time(), UTC) if work is Work.DONE else None,
    }
    return {
        "_id": record.id,
        "seq": seq,
        "owner": record.owner,
        "state": record.state.value,
        "work": work.value,
        "revision": record.revision,
        "created": record.created.isoformat(),
        "writes": [token],
        **{name: value for name, value in optional.items() if value is not None},
    }


def _change(record: TaskRecord, changing: Row, token: bytes, slot: int | str | None) -> list[Row]:
    """The stages of an update to the next revision. Fields that this version does not know stay as they are."""
    work, destination = record.work, _destination(record)
    texts = {name: {"$literal": value} for name, value in changing.items()}
    leased = {"$ne": [{"$type": "$holder"}, "missing"]}
    return [
        {
            "$set": {
                "state": record.state.value,
                "work": work.value,
                "revision": record.revision + 1,
                "due": "$$REMOVE" if work is Work.DONE else {"$cond": [leased, "$$REMOVE", work.value]},
                "not_before": "$$REMOVE",
                "destination": "$$REMOVE" if destination is None else {"$literal": destination},
                "slot": "$$REMOVE" if slot is None else slot,
                "done": "$$NOW" if work is Work.DONE else "$$REMOVE",
                "writes": {"$slice": [{"$concatArrays": [[token], "$writes"]}, _WRITES_KNOWN]},
                "fragment": "$$REMOVE",
                **texts,
            }
        }
    ]


def _record(row: Row) -> TaskRecord:
    return TaskRecord(
        id=row["_id"],
        owner=row["owner"],
        document=TaskDocument.model_validate_json(row["document"]),
        created=datetime.fromisoformat(row["created"]),
        state=State(row["state"]),
        revision=row["revision"],
        progress=parse_progress(row["progress"]),
    )
