"""What only the SQLite store promises: its file, its lock, its schema, its transactions, its indexes."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tesapi.errors import ConfigurationProblem, InvalidDocument, StoreUnavailable, TaskNotFound
from tesapi.store import sqlite, sqlite_file, sqlite_lists
from tesapi.store.base import TaskQuery
from tesapi.store.sqlite import SqliteStore
from tesapi.tes import views
from tesapi.tes.models import View
from tesapi.tes.states import State
from tests.contract.records import MINUTE, NOON, done, ended, kept, new, placed, stored


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "tesapi.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqliteStore]:
    async with SqliteStore(path) as store:
        yield store


async def refusal(path: Path) -> str:
    with pytest.raises(ConfigurationProblem) as caught:
        async with SqliteStore(path):
            pass
    return str(caught.value)


def in_writer(store: SqliteStore, statement: str) -> asyncio.Future[list[tuple[object, ...]]]:
    return store._writer.submit(lambda db: db.execute(statement).fetchall())


# One process.

_OTHER_PROCESS = """
import asyncio, sys
from pathlib import Path
from tesapi.store.sqlite import SqliteStore
from tests.contract.records import MINUTE, new

async def main():
    async with SqliteStore(Path(sys.argv[1])) as store:
        await store.insert([new(task_id="first"), new(task_id="second")])
        await store.claim("other", queued=1, ttl=MINUTE)
        print("inserted", flush=True)
        await asyncio.sleep(3600)

asyncio.run(main())
"""


@contextmanager
def another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the store open, and has inserted two tasks and claimed one."""
    command = [sys.executable, "-c", _OTHER_PROCESS, str(path)]
    repository = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=repository) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "inserted\n"
            yield process
        finally:
            process.kill()


async def test_a_second_process_is_told_who_uses_the_database_and_what_to_do(path: Path) -> None:
    with another_process(path) as process:
        sentence = await refusal(path)
    assert f"in use by process {process.pid}" in sentence
    assert "SQLite serves one process" in sentence
    assert "MongoDB" in sentence


async def test_a_database_is_not_opened_twice_under_two_names(path: Path, store: SqliteStore, tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(path)
    for name in (path, link):
        assert f"in use by process {os.getpid()}" in await refusal(name)
    await kept(store, new())


async def test_what_was_inserted_survives_the_kill_of_its_process_and_its_leases_do_not(path: Path) -> None:
    with another_process(path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        async with SqliteStore(path) as store:
            assert (await store.load("first")).id == "first"
            assert [record.id for record in await store.claim("a", queued=9, ttl=MINUTE)] == ["first", "second"]


async def test_closing_writes_what_was_submitted(path: Path) -> None:
    records = [new() for _ in range(50)]
    async with SqliteStore(path) as store:
        inserts = [asyncio.ensure_future(store.insert([record])) for record in records]
        await asyncio.sleep(0)
    await asyncio.gather(*inserts)
    async with SqliteStore(path) as store:
        assert len((await store.find(TaskQuery())).views) == 50


# The file.


async def test_the_folder_and_the_files_are_their_owners_only(path: Path, store: SqliteStore) -> None:
    await kept(store, new())
    assert path.parent.stat().st_mode & 0o777 == 0o700
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    assert modes == dict.fromkeys(["tesapi.db", "tesapi.db.lock", "tesapi.db-wal", "tesapi.db-shm"], 0o600)


async def test_every_commit_reaches_the_disk(store: SqliteStore) -> None:
    assert await in_writer(store, "PRAGMA journal_mode") == [("wal",)]
    assert await in_writer(store, "PRAGMA synchronous") == [(2,)]


async def test_each_store_has_an_id_and_takes_only_its_own_tokens(store: SqliteStore, tmp_path: Path) -> None:
    async with SqliteStore(tmp_path / "other.db") as other:
        assert other.id != store.id
        for each in (store, other):
            await kept(each, new(), new())
        token = (await other.find(TaskQuery(size=1))).next_token
    with pytest.raises(InvalidDocument):
        await store.find(TaskQuery(token=token))


async def test_a_path_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.db").mkdir()
    assert f"{tmp_path}/file: File exists" in await refusal(tmp_path / "file" / "tesapi.db")
    assert f"{tmp_path}/folder.db: Is a directory" in await refusal(tmp_path / "folder.db")


async def test_a_file_that_is_no_database_of_ours_is_left_as_it_is(tmp_path: Path) -> None:
    text, foreign = tmp_path / "notes.txt", tmp_path / "foreign.db"
    text.write_text("Not a database. " * 100)
    assert "file is not a database" in await refusal(text)
    assert text.read_text() == "Not a database. " * 100
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE tasks (id)")
    db.close()
    before = foreign.read_bytes()
    assert "is the database of another program" in await refusal(foreign)
    assert foreign.read_bytes() == before


async def test_a_file_system_without_locks_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert "put the database (db.sqlite_path) on a file system with locks" in await refusal(path)


# The schema.


async def test_a_newer_schema_is_refused_and_left_as_it_is(path: Path) -> None:
    async with SqliteStore(path) as store:
        (record,) = await kept(store, new())
        version = len(sqlite_file._MIGRATIONS)
        await in_writer(store, f"PRAGMA user_version = {version + 1}")
    assert f"has schema {version + 1}" in await refusal(path)
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT id FROM tasks").fetchall() == [(record.id,)]
    db.close()


async def test_an_older_schema_is_brought_up_to_date_step_by_step(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with SqliteStore(path) as store:
        (record,) = await kept(store, new())
    steps = ("ALTER TABLE tasks ADD COLUMN one;", "ALTER TABLE tasks ADD COLUMN two;")
    version = len(sqlite_file._MIGRATIONS)
    monkeypatch.setattr(sqlite_file, "_MIGRATIONS", (*sqlite_file._MIGRATIONS, *steps))
    for _ in range(2):
        async with SqliteStore(path) as store:
            assert await in_writer(store, "SELECT id, one, two FROM tasks") == [(record.id, None, None)]
            assert await in_writer(store, "PRAGMA user_version") == [(version + 2,)]


async def test_what_was_placed_under_the_first_schema_is_counted_under_this_one(path: Path) -> None:
    queued, under_way, settled, over = new(), placed(new()), ended(placed(new(), "far")), done(placed(new()))
    damaged = placed(new(task_id="damaged"))
    path.parent.mkdir()
    with sqlite3.connect(path) as db:
        db.executescript(f"{sqlite_file._SCHEMA_1} PRAGMA user_version = 1;")
        for seq, record in enumerate((queued, under_way, settled, over, damaged), start=1):
            (*task, _, _), document, progress, fragment, _ = sqlite._columns(record)
            columns = "(seq, id, owner, state, work, revision, created, name)"
            db.execute(f"INSERT INTO tasks {columns} VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (seq, *task))
            db.execute("INSERT INTO documents VALUES (?, ?)", (seq, document))
            db.execute("INSERT INTO progress VALUES (?, ?)", (seq, b"\0" if record is damaged else progress))
            db.execute("INSERT INTO fragments VALUES (?, ?, ?)", (seq, views.RENDER_VERSION, fragment))
    db.close()
    async with SqliteStore(path) as store:
        assert await store.occupied() == {"local": 1, "far": 1}
        for record in (queued, under_way, settled, over):
            assert await store.load(record.id) == record
        assert await store.purgeable(before=NOON + timedelta(seconds=1)) == 1
        assert await store.purgeable(before=NOON - timedelta(seconds=1)) == 0


async def test_a_step_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with SqliteStore(path) as store:
        (record,) = await kept(store, new())
    with monkeypatch.context() as patched:
        step = "ALTER TABLE tasks ADD COLUMN one; INSERT INTO nowhere VALUES (1);"
        patched.setattr(sqlite_file, "_MIGRATIONS", (*sqlite_file._MIGRATIONS, step))
        assert "no such table: nowhere" in await refusal(path)
    async with SqliteStore(path) as store:
        assert await store.load(record.id) == record
        with pytest.raises(StoreUnavailable, match="no such column: one"):
            await in_writer(store, "SELECT one FROM tasks")


@pytest.mark.parametrize("version", [views.RENDER_VERSION - 1, views.RENDER_VERSION + 1])
async def test_a_fragment_of_another_version_is_rendered_anew(store: SqliteStore, version: int) -> None:
    (record,) = await kept(store, placed(new()))
    await in_writer(store, f"UPDATE fragments SET version = {version}, json = x'00'")
    assert await store.view(record.id, View.BASIC) == views.render(record, View.BASIC)
    assert (await store.find(TaskQuery(view=View.BASIC))).views == [views.render(record, View.BASIC)]


# Transactions.


async def test_what_gathers_while_the_writer_is_busy_becomes_one_transaction(store: SqliteStore) -> None:
    go_on = threading.Event()
    statements: list[str] = []
    store._writer._db.set_trace_callback(statements.append)
    busy = store._writer.submit(lambda _: go_on.wait())
    inserts = [asyncio.ensure_future(store.insert([new()])) for _ in range(50)]
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(busy, *inserts)
    assert statements.count("COMMIT") <= 2
    assert len((await store.find(TaskQuery())).views) == 50


async def test_a_bad_operation_fails_alone_in_its_transaction(store: SqliteStore) -> None:
    go_on = threading.Event()
    (record,) = await kept(store, new())
    fresh, change = new(), placed(record)
    busy = store._writer.submit(lambda _: go_on.wait())
    answers = asyncio.gather(
        store.insert([fresh]),
        store.insert([new(task_id="twice"), new(task_id="twice")]),
        store.replace(change),
        store._writer.submit(lambda _: 1 / 0),
        store.claim("a", queued=1, ttl=MINUTE),
        return_exceptions=True,
    )
    await asyncio.sleep(0)
    go_on.set()
    await busy
    inserted, duplicate, replaced, bug, claimed = await answers
    assert (inserted, replaced) == (None, True)
    assert isinstance(duplicate, StoreUnavailable)
    assert isinstance(duplicate.__cause__, sqlite3.IntegrityError)
    assert isinstance(bug, ZeroDivisionError)
    assert isinstance(claimed, list)
    assert [each.id for each in claimed] == [record.id, fresh.id]
    with pytest.raises(TaskNotFound):
        await store.load("twice")


async def test_a_full_disk_leaves_nothing_half_made_and_is_survived(store: SqliteStore) -> None:
    (record,) = await kept(store, placed(new()))
    ((pages,),) = await in_writer(store, "PRAGMA page_count")
    await in_writer(store, f"PRAGMA max_page_count = {pages}")
    large = [new(name="x" * 100_000) for _ in range(5)]
    answers = await asyncio.gather(*(store.insert([each]) for each in large), return_exceptions=True)
    assert [type(answer) for answer in answers] == [StoreUnavailable] * 5
    assert "database or disk is full" in str(answers[0])
    with pytest.raises(StoreUnavailable):
        await store.insert([new(), large[0]])
    with pytest.raises(StoreUnavailable):
        await store.insert_once(large[0], "k", "digest")
    assert await store.keyed("ada", "k", "digest") is None
    assert (await store.find(TaskQuery())).views == [views.render(record, View.MINIMAL)]
    assert await in_writer(store, "SELECT count(*) FROM documents") == [(1,)]
    await in_writer(store, "PRAGMA max_page_count = 1000000")
    await store.insert(large)
    assert await store.load(large[4].id) == large[4]
    record = await stored(store, ended(record))
    assert await store.claim("a", queued=0, ttl=MINUTE) == [record]


# Indexes.


async def test_lists_and_claims_are_read_from_indexes_however_many_tasks_are_done(store: SqliteStore) -> None:
    over = done(placed(new()))
    rows = [sqlite._columns(new(owner=f"user{number % 7}")) for number in range(50)]
    for number in range(2000):
        (task_id, _, *rest), *beside = sqlite._columns(over)
        rows.append(((f"{task_id}-{number}", f"user{number % 7}", *rest), *beside))  # type: ignore[arg-type]
    await store._writer.submit(lambda db: sqlite._insert(db, rows))
    by_owner, by_seq = "USING INDEX tasks_by_owner", "USING INTEGER PRIMARY KEY (rowid<?)"
    lists = {
        TaskQuery(): by_seq,
        TaskQuery(owner="user3"): by_owner,
        TaskQuery(owner="user3", state=State.COMPLETE): "INDEX tasks_by_state (state=? AND owner=? AND seq<?)",
        TaskQuery(owner="user3", name_prefix="rare"): "INDEX tasks_by_name (name>? AND name<?)",
        TaskQuery(owner="user3", name_prefix="count"): by_owner,
        TaskQuery(owner="user3", tags=(("lab", ""),)): "INDEX tags_by_key (key=? AND owner=? AND seq<?)",
        TaskQuery(owner="user3", tags=(("lab", "x"),)): "PRIMARY KEY (key=? AND value=? AND owner=? AND seq<?)",
    }
    for query, index in lists.items():
        for select in sqlite._SELECT.values():
            text, named = sqlite_lists.statement(store._page_reads, query, select, 1000)
            plan = [row[3] for row in store._page_reads.execute(f"EXPLAIN QUERY PLAN {text}", named)]
            assert any(index in step for step in plan), (query, plan)
            assert not any(step.startswith("SCAN") and "g" not in step.split() for step in plan), plan
            if "name" not in index:
                assert not any("TEMP B-TREE" in step for step in plan), plan
    expected = {
        **{select + sqlite._BY_ID: "sqlite_autoindex_tasks_1" for select in sqlite._SELECT.values()},
        sqlite._TO_FOLLOW: "INDEX tasks_to_follow",
        sqlite._TO_PLACE_FIRST: "INDEX tasks_to_place",
        sqlite._TO_PLACE_NEXT: "INDEX tasks_to_place (owner>?)",
        sqlite._DUE_AGAIN: "INDEX tasks_postponed (not_before<?)",
        sqlite._TOO_FAR_OFF: "INDEX tasks_postponed (not_before>?)",
        sqlite._DROP_LEASES: "INDEX tasks_held (holder=?)",
        sqlite._RELEASE: "sqlite_autoindex_tasks_1",
        sqlite._HELD: "INDEX tasks_held (holder=?)",
        sqlite._CANCELING: "INDEX tasks_held (holder=?)",
        sqlite._LEASING: "INDEX tasks_held (holder=?)",
        sqlite._KEYED: "INDEX tasks_by_key (owner=? AND key=?)",
        sqlite._DONE_BEFORE: "COVERING INDEX tasks_done (done<?)",
        sqlite._DONE: "COVERING INDEX tasks_done",
        sqlite._DONE_FIRST: "INDEX tasks_done",
        sqlite._QUEUED: "COVERING INDEX tasks_by_state (state=?)",
        sqlite._PLACED_AT: "COVERING INDEX tasks_by_destination (destination=?)",
        sqlite._PLACED: "COVERING INDEX tasks_by_destination",
    }
    for statement, index in expected.items():
        names = {"owner": "user3", "before": 1000, "limit": 10}
        values = names if ":limit" in statement else ("x",) * statement.count("?")
        plan = await store._writer.submit(
            lambda db, statement=statement, values=values: db.execute(  # type: ignore[misc]
                f"EXPLAIN QUERY PLAN {statement}", values
            ).fetchall()
        )
        steps = [step for *_, step in plan]
        assert any(index in step for step in steps), (statement, steps)
        assert not any("TEMP B-TREE" in step or step in {"SCAN t", "SCAN tasks"} for step in steps), (statement, steps)


async def test_a_record_that_cannot_be_read_holds_up_no_other(
    store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = new(), new()
    await store.insert([bad, good])
    await in_writer(
        store,
        'UPDATE documents SET json = \'{"executors": [], "name": "a secret"}\''
        f" WHERE seq = (SELECT seq FROM tasks WHERE id = '{bad.id}')",
    )
    assert [record.id for record in await store.claim("a", queued=5, ttl=MINUTE)] == [good.id]
    assert await store.claim("a", queued=5, ttl=MINUTE) == []
    assert f"The task {bad.id} cannot be read" in caplog.text
    assert "secret" not in caplog.text


async def test_a_pause_ends_when_the_clock_was_set_back(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    record = new()
    await store.insert([record])
    await store.claim("a", queued=1, ttl=MINUTE)
    await store.release("a", record.id, not_before=datetime.now(UTC) + timedelta(seconds=30))
    assert await store.claim("a", queued=1, ttl=MINUTE) == []
    day_before = time.time() - 86400
    monkeypatch.setattr("time.time", lambda: day_before)
    assert len(await store.claim("a", queued=1, ttl=MINUTE)) == 1


async def test_a_page_of_large_tasks_is_full_sooner(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "_PAGE_BYTES", 1000)
    records = [new() for _ in range(10)]
    await store.insert(records)
    seen: list[str] = []
    pages, token = 0, None
    while pages == 0 or token is not None:
        page = await store.find(TaskQuery(view=View.FULL, size=256, token=token))
        assert 1 <= len(page.views) < 10
        seen += [json.loads(task)["id"] for task in page.views]
        pages, token = pages + 1, page.next_token
    assert seen == [record.id for record in reversed(records)]


async def test_nothing_is_left_of_a_purged_task(store: SqliteStore) -> None:
    await kept(store, *(done(placed(new(tags={"a": "1", "ü": "\0", "": ""}))) for _ in range(5)))
    (stays,) = await kept(store, new(tags={"a": "1"}))
    assert await store.purge(keep=0, limit=10) == 5
    for table in ("tasks", "documents", "progress", "fragments", "tags"):
        assert await in_writer(store, f"SELECT count(*) FROM {table}") == [(1,)], table
    assert await store.load(stays.id) == stays


async def test_a_purge_of_large_tasks_is_done_in_smaller_steps(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_PURGE_BYTES", 1000)
    await kept(store, *(done(placed(new())) for _ in range(10)))
    counts = []
    while count := await store.purge(keep=0, limit=100):
        counts.append(count)
    assert sum(counts) == 10
    assert max(counts) < 5


async def test_the_number_of_a_purged_task_is_not_given_again(path: Path) -> None:
    async with SqliteStore(path) as store:
        records = await kept(store, new(), *(done(placed(new())) for _ in range(3)))
        token = (await store.find(TaskQuery(size=1))).next_token
        assert await store.purge(keep=0, limit=10) == 3
        await kept(store, done(placed(new())))
        assert await store.purge(keep=0, limit=10) == 1
    async with SqliteStore(path) as store:
        await kept(store, *(new() for _ in range(3)))
        page = await store.find(TaskQuery(token=token))
        assert [json.loads(view)["id"] for view in page.views] == [records[0].id]


async def test_a_record_that_cannot_be_read_is_purged_like_any_other(store: SqliteStore) -> None:
    await kept(store, *(done(placed(new())) for _ in range(3)))
    await in_writer(store, "UPDATE documents SET json = x'00ff' WHERE seq = 2")
    assert await store.purge(keep=0, limit=10) == 3
    assert await in_writer(store, "SELECT count(*) FROM tasks") == [(0,)]
