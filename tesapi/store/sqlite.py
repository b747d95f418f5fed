"""The embedded store: one SQLite file that serves one process.

One thread writes. It takes whatever has gathered, runs it as one transaction, and answers after the commit: each
caller waits for the disk once, and all of them together. What is read by its id is read on the event loop's own thread
from a connection of its own, which the writer never blocks (WAL); pages are read on a thread of theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from tesapi.errors import DestinationFull, KeyReused, StoreUnavailable, TaskNotFound
from tesapi.store import sqlite_lists
from tesapi.store.base import Page, TaskQuery
from tesapi.store.sqlite_file import connected, locked, prepared
from tesapi.store.tokens import page_token, position
from tesapi.tes import views
from tesapi.tes.models import TaskDocument, View
from tesapi.tes.record import TaskRecord, Work, dump_progress, parse_progress
from tesapi.tes.states import State

T = TypeVar("T")
Row = tuple[Any, ...]
_Doomed = tuple[int, list[tuple[str, str]]]
_Columns = tuple[Row, bytes, bytes, bytes, tuple[tuple[str, str], ...]]

_MINIMAL = "SELECT t.seq, t.id, t.owner, t.state FROM tasks t"
_BASIC = (
    "SELECT t.seq, t.id, t.owner, t.state, f.version, f.json, d.json"
    " FROM tasks t JOIN fragments f USING (seq) JOIN documents d USING (seq)"
)
_RECORD = (
    "SELECT t.seq, t.id, t.owner, t.state, t.revision, t.created, d.json, p.json"
    " FROM tasks t JOIN documents d USING (seq) JOIN progress p USING (seq)"
)
_SELECT = {View.MINIMAL: _MINIMAL, View.BASIC: _BASIC, View.FULL: _RECORD}
_BY_ID = " WHERE t.id = ?"
_BY_SEQ = " WHERE t.seq = ?"

_TO_FOLLOW = (
    "SELECT seq, destination FROM tasks WHERE work = 'placed' AND holder IS NULL AND not_before IS NULL ORDER BY seq"
)
_TO_PLACE_FIRST = (
    "SELECT seq, owner FROM tasks WHERE work = 'queued' AND holder IS NULL AND not_before IS NULL"
    " ORDER BY owner, seq LIMIT 1"
)
_TO_PLACE_NEXT = (
    "SELECT seq, owner FROM tasks WHERE work = 'queued' AND holder IS NULL AND not_before IS NULL AND owner > ?"
    " ORDER BY owner, seq LIMIT 1"
)
_DUE_AGAIN = "UPDATE tasks SET not_before = NULL WHERE not_before <= ?"
_TOO_FAR_OFF = "UPDATE tasks SET not_before = NULL WHERE not_before > ?"
_LEASE = "UPDATE tasks SET holder = ? WHERE seq = ?"
_DROP_LEASES = "UPDATE tasks SET holder = NULL WHERE holder = ?"
_RELEASE = "UPDATE tasks SET holder = NULL, not_before = ? WHERE id = ? AND holder = ?"
_HELD = "SELECT id, state FROM tasks WHERE holder = ?"
_CANCELING = "SELECT id FROM tasks WHERE holder = ? AND +state = 'CANCELING'"
_LEASING = "SELECT holder, beat FROM holders h WHERE EXISTS (SELECT 1 FROM tasks t WHERE t.holder = h.holder)"
_RAISE = "INSERT INTO holders VALUES (?, 1) ON CONFLICT (holder) DO UPDATE SET beat = beat + 1"
_KEYED = "SELECT id, key_digest FROM tasks WHERE owner = ? AND key = ?"
_DONE_BEFORE = "SELECT count(*) FROM tasks WHERE done < ?"
_DONE = "SELECT count(*) FROM tasks WHERE done IS NOT NULL"
_DONE_FIRST = (
    "SELECT t.seq, length(d.json) + length(p.json),"
    " CASE WHEN json_valid(CAST(d.json AS TEXT)) THEN json_extract(CAST(d.json AS TEXT), '$.tags') END"
    " FROM tasks t JOIN documents d USING (seq) JOIN progress p USING (seq)"
    " WHERE t.done IS NOT NULL ORDER BY t.done, t.seq LIMIT ?"
)
_LAST_SEQ = (
    "SELECT max(coalesce((SELECT max(seq) FROM tasks), 0),"
    " coalesce((SELECT CAST(value AS INTEGER) FROM meta WHERE key = 'last_seq'), 0))"
)
_QUEUED = "SELECT count(*) FROM (SELECT 1 FROM tasks WHERE state = 'QUEUED' LIMIT ?)"
_PLACED_AT = "SELECT count(*) FROM tasks WHERE destination = ?"
_PLACED = "SELECT destination, count(*) FROM tasks WHERE destination IS NOT NULL GROUP BY destination"

_log = logging.getLogger(__name__)

_SEQ_MAX = 2**63 - 1
_MAX_BATCH = 512
_PAGE_BYTES = 32 << 20  # a page that has more is full, whatever its size: documents may have megabytes
_PURGE_BYTES = 32 << 20  # what is freed in one transaction: freeing reads it, and others wait
_LONGEST_PAUSE_S = 3600.0
_ROWS_AT_ONCE = (64, 32, 16, 8, 4, 2, 1)  # few different statements: SQLite prepares each of them only once


class SqliteStore:
    """Keeps records in the SQLite file at `path`. Entering raises ConfigurationProblem where it cannot be used.

    `clock` is the monotonic clock by which leases go stale.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._id = ""
        self._resources = contextlib.ExitStack()
        self._served_last: str | None = None
        self._seen: dict[str, tuple[int, float]] = {}

    @property
    def id(self) -> str:
        return self._id

    async def __aenter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self._path))
            write = stack.enter_context(connected(self._path))
            self._id = prepared(write, self._path)
            self._loop_reads = stack.enter_context(connected(self._path, read_only=True))
            self._page_reads = stack.enter_context(connected(self._path, read_only=True))
            self._page_thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="sqlite-pages"))
            self._writer = _Writer(write, self._path)
            stack.callback(self._writer.close)
            self._resources = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    async def insert(self, records: Sequence[TaskRecord]) -> None:
        await self._writer.insert([_columns(record) for record in records])

    async def insert_once(self, record: TaskRecord, key: str, digest: str) -> str:
        columns = _columns(record)
        answer = await self._writer.submit(lambda db: _insert_once(db, record, columns, key, digest))
        if isinstance(answer, KeyReused):
            raise answer
        return answer

    async def keyed(self, owner: str, key: str, digest: str) -> str | None:
        with self._answering():
            answer = _keyed(self._loop_reads, owner, key, digest)
        if isinstance(answer, KeyReused):
            raise answer
        return answer

    async def load(self, task_id: str, *, owner: str | None = None) -> TaskRecord:
        return _record(self._one(_RECORD, task_id, owner))

    async def view(self, task_id: str, view: View, *, owner: str | None = None) -> bytes:
        row = self._one(_SELECT[view], task_id, owner)
        with self._answering():
            return _rendered(self._loop_reads, view, row)

    async def find(self, query: TaskQuery) -> Page:
        before = position(self._id, query)
        return await self._on_page_thread(lambda: self._page(query, _SEQ_MAX if before is None else before))

    async def replace(self, record: TaskRecord, *, at_most: int | None = None) -> bool:
        progress, fragment = dump_progress(record.progress), views.basic_fragment(record)
        answer = await self._writer.submit(lambda db: _replace(db, record, progress, fragment, at_most))
        if isinstance(answer, DestinationFull):
            raise answer
        return answer

    async def queued(self, *, at_most: int) -> int:
        with self._answering():
            (count,) = self._loop_reads.execute(_QUEUED, (at_most,)).fetchone()
            return int(count)

    async def occupied(self) -> Mapping[str, int]:
        with self._answering():
            return dict(self._loop_reads.execute(_PLACED).fetchall())

    async def claim(
        self, holder: str, *, queued: int, ttl: timedelta, passed_over: Collection[str] = ()
    ) -> list[TaskRecord]:
        claimed = self._writer.submit(lambda db: self._claim(db, holder, queued, ttl, passed_over))
        try:
            return await asyncio.shield(claimed)
        except asyncio.CancelledError:
            claimed.add_done_callback(lambda claimed: self._give_back(holder, claimed))
            raise

    async def watch(self, tell: Callable[[], None]) -> None:
        return  # all that is done is done by this process

    async def renew(self, holder: str, task_ids: Collection[str]) -> Mapping[str, State]:
        return await self._writer.submit(lambda db: _renew(db, holder, frozenset(task_ids)))

    async def canceling(self, holder: str) -> Collection[str]:
        with self._answering():
            return [task_id for (task_id,) in self._loop_reads.execute(_CANCELING, (holder,))]

    async def release(self, holder: str, task_id: str, *, not_before: datetime | None = None) -> None:
        due = None if not_before is None else not_before.timestamp()
        await self._writer.submit(lambda db: db.execute(_RELEASE, (due, task_id, holder)))

    async def purge(self, *, before: datetime | None = None, keep: int | None = None, limit: int) -> int:
        doomed = await self._on_page_thread(lambda: self._doomed(before, keep, limit))
        return await self._writer.submit(lambda db: _purge(db, doomed)) if doomed else 0

    async def purgeable(self, *, before: datetime | None = None, keep: int | None = None) -> int:
        return await self._on_page_thread(lambda: self._purgeable(before, keep))

    # Reading.

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        if self._writer.closed:
            raise StoreUnavailable(f"The database {self._path} is closed.")
        try:
            yield
        except sqlite3.Error as error:
            raise StoreUnavailable(f"The database {self._path} does not answer: {error}.") from error

    async def _on_page_thread(self, read: Callable[[], T]) -> T:
        with self._answering():
            return await asyncio.get_running_loop().run_in_executor(self._page_thread, read)

    def _one(self, select: str, task_id: str, owner: str | None) -> Row:
        try:
            with self._answering():
                row: Row | None = self._loop_reads.execute(select + _BY_ID, (task_id,)).fetchone()
        except UnicodeEncodeError:  # text that is no Unicode, and so nobody's id
            row = None
        if row is None or (owner is not None and owner != row[2]):
            raise TaskNotFound(task_id)
        return row

    def _page(self, query: TaskQuery, before: int) -> Page:
        statement, values = sqlite_lists.statement(self._page_reads, query, _SELECT[query.view], before)
        shown: list[bytes] = []
        bytes_so_far, last = 0, 0
        for row in self._page_reads.execute(statement, values):
            if len(shown) == query.size or bytes_so_far > _PAGE_BYTES:
                return Page(shown, page_token(self._id, query, last))
            shown.append(_rendered(self._page_reads, query.view, row))
            bytes_so_far, last = bytes_so_far + len(shown[-1]), row[0]
        return Page(shown, None)

    def _purgeable(self, before: datetime | None, keep: int | None) -> int:
        count = 0
        if before is not None:
            (count,) = self._page_reads.execute(_DONE_BEFORE, (before.timestamp(),)).fetchone()
        if keep is not None:
            (done,) = self._page_reads.execute(_DONE).fetchone()
            count = max(count, done - keep)
        return count

    def _doomed(self, before: datetime | None, keep: int | None, limit: int) -> list[_Doomed]:
        """The next tasks to purge. Looking them up takes longer than removing them, and here nobody waits for it."""
        doomed: list[_Doomed] = []
        freed = 0
        for seq, size, tags in self._page_reads.execute(_DONE_FIRST, (min(limit, self._purgeable(before, keep)),)):
            doomed.append((seq, [*json.loads(tags or "{}").items()]))
            freed += size
            if freed > _PURGE_BYTES:
                break
        return doomed

    # Leasing; on the writer's thread.

    def _claim(
        self, db: sqlite3.Connection, holder: str, queued: int, ttl: timedelta, passed_over: Collection[str]
    ) -> list[TaskRecord]:
        db.execute(_DUE_AGAIN, (time.time(),))
        db.execute(_TOO_FAR_OFF, (time.time() + _LONGEST_PAUSE_S,))  # the machine's clock has been set back
        db.executemany(_DROP_LEASES, [(stale,) for stale in self._stale(db, ttl) - {holder}])  # a taker lives
        placed = [seq for seq, destination in db.execute(_TO_FOLLOW) if destination not in passed_over]
        db.executemany(_LEASE, [(holder, seq) for seq in placed])
        taken = placed + self._in_turn(db, holder, queued)
        if taken:
            db.execute("INSERT OR IGNORE INTO holders VALUES (?, 0)", (holder,))
        rows = [db.execute(_RECORD + _BY_SEQ, (seq,)).fetchone() for seq in taken]
        return [record for row in rows if (record := _readable(row)) is not None]

    def _in_turn(self, db: sqlite3.Connection, holder: str, queued: int) -> list[int]:
        """Lease one task of the owner whose name follows that of the one served last, round and round."""
        taken: list[int] = []
        while len(taken) < queued:
            row = db.execute(_TO_PLACE_NEXT, (self._served_last,)).fetchone() or db.execute(_TO_PLACE_FIRST).fetchone()
            if row is None:
                break
            seq, self._served_last = row
            db.execute(_LEASE, (holder, seq))
            taken.append(seq)
        return taken

    def _stale(self, db: sqlite3.Connection, ttl: timedelta) -> set[str]:
        """Those whose number has stood still for `ttl`, of the holders that hold anything."""
        now = self._clock()
        beats: dict[str, int] = dict(db.execute(_LEASING).fetchall())
        first_seen = {holder: (beat, now) for holder, beat in beats.items()}
        self._seen = first_seen | {holder: seen for holder, seen in self._seen.items() if beats.get(holder) == seen[0]}
        return {holder for holder, (_, since) in self._seen.items() if now - since >= ttl.total_seconds()}

    def _give_back(self, holder: str, claimed: asyncio.Future[list[TaskRecord]]) -> None:
        """Nobody has heard of these leases: as long as the holder lives, nobody would ever give them back."""
        if claimed.exception() is None:
            values = [(None, record.id, holder) for record in claimed.result()]
            with contextlib.suppress(StoreUnavailable):
                self._writer.submit(lambda db: db.executemany(_RELEASE, values))


# Inside a transaction of the writer.


def _insert(db: sqlite3.Connection, rows: Sequence[_Columns]) -> None:
    (last,) = db.execute(_LAST_SEQ).fetchone()
    numbered = list(enumerate(rows, start=last + 1))
    arrivals = [
        (seq, *task, document, progress, views.RENDER_VERSION, fragment)
        for seq, (task, document, progress, fragment, _) in numbered
    ]
    _insert_into(db, "arrivals", arrivals)
    _insert_into(db, "tags", [(key, value, task[1], seq) for seq, (task, *_, tags) in numbered for key, value in tags])


def _insert_once(
    db: sqlite3.Connection, record: TaskRecord, columns: _Columns, key: str, digest: str
) -> str | KeyReused:
    """What there is to answer; an error is not raised, as in `_replace`."""
    known = _keyed(db, record.owner, key, digest)
    if known is not None:
        return known
    _insert(db, [columns])
    db.execute("UPDATE tasks SET key = ?, key_digest = ? WHERE id = ?", (key, digest, record.id))
    return record.id


def _keyed(db: sqlite3.Connection, owner: str, key: str, digest: str) -> str | KeyReused | None:
    row = db.execute(_KEYED, (owner, key)).fetchone()
    if row is None:
        return None
    task_id, first = row
    return str(task_id) if first == digest else KeyReused(key, task_id)


def _insert_into(db: sqlite3.Connection, table: str, rows: Sequence[Row]) -> None:
    """Insert `rows`, many with each statement.

    The interpreter's lock is given up around every statement, and this thread has to queue for it again behind the
    event loop.
    """
    done = 0
    for size in _ROWS_AT_ONCE:
        while done + size <= len(rows):
            some = rows[done : done + size]
            values = ", ".join([f"({', '.join('?' * len(some[0]))})"] * size)
            db.execute(f"INSERT INTO {table} VALUES {values}", list(itertools.chain.from_iterable(some)))  # noqa: S608
            done += size


def _replace(
    db: sqlite3.Connection, record: TaskRecord, progress: bytes, fragment: bytes, at_most: int | None
) -> bool | DestinationFull:
    """What there is to answer. DestinationFull is not raised: the rest of the transaction is not to suffer."""
    row = db.execute("SELECT seq, destination FROM tasks WHERE id = ? AND revision = ?", (record.id, record.revision))
    seq, before = row.fetchone() or (None, None)
    if seq is None:
        return False
    destination = _destination(record)
    if at_most is not None and destination is not None:
        (others,) = db.execute(_PLACED_AT, (destination,)).fetchone()
        if others - (before == destination) >= at_most:
            return DestinationFull(destination, at_most)
    db.execute(
        "UPDATE tasks SET state = ?, work = ?, revision = revision + 1, not_before = NULL, destination = ?, done = ?"
        " WHERE seq = ?",
        (record.state.value, record.work.value, destination, _done_now(record), seq),
    )
    db.execute("UPDATE progress SET json = ? WHERE seq = ?", (progress, seq))
    db.execute("UPDATE fragments SET version = ?, json = ? WHERE seq = ?", (views.RENDER_VERSION, fragment, seq))
    return True


def _purge(db: sqlite3.Connection, doomed: Sequence[_Doomed]) -> int:
    # No number is given again: it stands in page tokens.
    (last,) = db.execute(_LAST_SEQ).fetchone()
    db.execute("INSERT INTO meta VALUES ('last_seq', ?1) ON CONFLICT (key) DO UPDATE SET value = ?1", (str(last),))
    removed = 0
    for seq, tags in doomed:
        row = db.execute("DELETE FROM tasks WHERE seq = ? AND work = 'done' RETURNING owner", (seq,)).fetchone()
        if row is None:
            continue
        removed += 1
        for table in ("documents", "progress", "fragments"):
            db.execute(f"DELETE FROM {table} WHERE seq = ?", (seq,))  # noqa: S608 - names of this module
        tag = "DELETE FROM tags WHERE key = ? AND value = ? AND owner = ? AND seq = ?"
        db.executemany(tag, [(key, value, row[0], seq) for key, value in tags])
    return removed


def _renew(db: sqlite3.Connection, holder: str, task_ids: frozenset[str]) -> dict[str, State]:
    db.execute(_RAISE, (holder,))
    return {task_id: State(state) for task_id, state in db.execute(_HELD, (holder,)) if task_id in task_ids}


# Rows and records.


def _destination(record: TaskRecord) -> str | None:
    """Where the task takes up room."""
    return record.attempt.destination if record.work is Work.PLACED and record.attempt is not None else None


def _done_now(record: TaskRecord) -> float | None:
    return time.time() if record.work is Work.DONE else None


def _columns(record: TaskRecord) -> _Columns:
    created, name, work = record.created.isoformat(), record.document.name, record.work
    where, when = _destination(record), _done_now(record)
    task = (record.id, record.owner, record.state.value, work.value, record.revision, created, name, where, when)
    document = views.dump_document(record.document)
    tags = tuple((record.document.tags or {}).items())
    return task, document, dump_progress(record.progress), views.basic_fragment(record), tags


def _record(row: Row) -> TaskRecord:
    _, task_id, owner, state, revision, created, document, progress = row
    return TaskRecord(
        id=task_id,
        owner=owner,
        document=TaskDocument.model_validate_json(document),
        created=datetime.fromisoformat(created),
        state=State(state),
        revision=revision,
        progress=parse_progress(progress),
    )


def _readable(row: Row) -> TaskRecord | None:
    """The record; None, with a word in the log, of one that cannot be read: the others are not to suffer.

    Its lease is kept, so that it is not tried again and again, until the next start.
    """
    try:
        return _record(row)
    except ValueError as error:
        # Not its text, which may hold values of the document.
        _log.error("The task %s cannot be read (%s), and waits for an operator.", row[1], type(error).__name__)
        return None


def _rendered(db: sqlite3.Connection, view: View, row: Row) -> bytes:
    match view:
        case View.MINIMAL:
            return views.minimal(row[1], State(row[3]))
        case View.BASIC:
            seq, task_id, _, state, version, fragment, document = row
            if version != views.RENDER_VERSION:
                record = _record(db.execute(_RECORD + _BY_SEQ, (seq,)).fetchone())
                return views.render(record, View.BASIC)
            return views.with_fragment(task_id, State(state), fragment, document)
        case View.FULL:
            return views.full(_record(row))


# Writing.


@dataclass(slots=True)
class _Write(Generic[T]):
    """What a caller wants written, and where the answer goes. It may be run again after a rollback.

    Without an operation it is new tasks, as `rows`.
    """

    operation: Callable[[sqlite3.Connection], T] | None
    answer: asyncio.Future[T]
    rows: Sequence[_Columns] = ()
    result: T | None = None
    error: Exception | None = None

    def tell(self) -> None:
        if self.answer.done():  # whoever asked was canceled
            return
        if self.error is None:
            self.answer.set_result(self.result)  # type: ignore[arg-type]
        else:
            self.answer.set_exception(self.error)


class _Writer:
    """The thread that owns the connection `db`."""

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        self._db = db
        self._path = path
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[list[_Write[Any]] | None] = queue.SimpleQueue()
        self._asked: list[_Write[Any]] = []
        self.closed = False
        self._thread = threading.Thread(target=self._work, name="sqlite-writer", daemon=True)
        self._thread.start()

    def submit(self, operation: Callable[[sqlite3.Connection], T]) -> asyncio.Future[T]:
        """Have `operation` run inside a transaction; its answer comes when that is durable, or StoreUnavailable."""
        return self._submit(_Write(operation, self._loop.create_future()))

    def insert(self, rows: Sequence[_Columns]) -> asyncio.Future[None]:
        """Have new tasks inserted; answered as `submit` does."""
        return self._submit(_Write(None, self._loop.create_future(), rows))

    def _submit(self, write: _Write[T]) -> asyncio.Future[T]:
        if self.closed:
            raise StoreUnavailable(f"The database {self._path} is closed.")
        if not self._asked:
            # What the loop is asked for in one round goes over together: a thread is not woken for each of them.
            self._loop.call_soon(self._hand_over)
        self._asked.append(write)
        return write.answer

    def _hand_over(self) -> None:
        if self._asked:
            self._queue.put(self._asked)
            self._asked = []

    def close(self) -> None:
        """Write what has been submitted, and end."""
        self.closed = True
        self._hand_over()
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        more = True
        while more:
            batch, more = self._gathered()
            if not self._commit(batch) and len(batch) > 1:
                # Perhaps one of them spoils it for the others: then it is to be the only one that fails.
                for write in batch:
                    self._commit([write])
            self._loop.call_soon_threadsafe(_tell, batch)

    def _gathered(self) -> tuple[list[_Write[Any]], bool]:
        batch: list[_Write[Any]] = []
        while (asked := self._queue.get()) is not None:
            batch += asked
            if len(batch) >= _MAX_BATCH or self._queue.empty():
                return batch, True
        return batch, False

    def _commit(self, batch: Sequence[_Write[Any]]) -> bool:
        """Whether the batch is on the disk, as one transaction; where it is not, each of it has the error."""
        error = self._transact(batch)
        for write in batch:
            write.error = error
        return error is None

    def _transact(self, batch: Sequence[_Write[Any]]) -> Exception | None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for inserting, writes in itertools.groupby(batch, lambda write: write.operation is None):
                self._run(inserting, writes)
            self._db.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - whoever asked gets it
            with contextlib.suppress(sqlite3.Error):  # of some errors SQLite has rolled back by itself
                self._db.execute("ROLLBACK")
            if not isinstance(error, sqlite3.Error):
                return error
            problem = StoreUnavailable(f"The database {self._path} did not take it: {error}.")
            problem.__cause__ = error
            return problem
        return None

    def _run(self, inserting: bool, writes: Iterable[_Write[Any]]) -> None:
        if inserting:
            _insert(self._db, [row for write in writes for row in write.rows])
            return
        for write in writes:
            if write.operation is not None:
                write.result = write.operation(self._db)


def _tell(batch: Sequence[_Write[Any]]) -> None:
    for write in batch:
        write.tell()
