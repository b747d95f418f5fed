"""The database file: it belongs to one process, and is in the schema that this version knows."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path

from tesapi.errors import ConfigurationProblem, StoreInUse

# What lists and claims touch is narrow; what is long lies beside it. A task can be claimed while nobody holds it and
# it is not postponed, and the partial indexes hold exactly those: claiming costs the same beside a million done tasks.
_SCHEMA_1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE holders (holder TEXT PRIMARY KEY, beat INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE tasks (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    state TEXT NOT NULL,
    work TEXT NOT NULL,
    revision INTEGER NOT NULL,
    holder TEXT,
    not_before REAL,
    created TEXT NOT NULL,
    name TEXT
);
CREATE INDEX tasks_by_owner ON tasks (owner, seq);
CREATE INDEX tasks_by_state ON tasks (state, owner, seq);
CREATE INDEX tasks_by_name ON tasks (name, owner, seq) WHERE name IS NOT NULL;
CREATE TABLE tags (key TEXT NOT NULL, value TEXT NOT NULL, owner TEXT NOT NULL, seq INTEGER NOT NULL,
    PRIMARY KEY (key, value, owner, seq)) WITHOUT ROWID;
CREATE INDEX tags_by_key ON tags (key, owner, seq);
CREATE INDEX tasks_to_place ON tasks (owner, seq) WHERE work = 'queued' AND holder IS NULL AND not_before IS NULL;
CREATE INDEX tasks_to_follow ON tasks (seq) WHERE work = 'placed' AND holder IS NULL AND not_before IS NULL;
CREATE INDEX tasks_held ON tasks (holder) WHERE holder IS NOT NULL;
CREATE INDEX tasks_postponed ON tasks (not_before) WHERE not_before IS NOT NULL;
CREATE TABLE documents (seq INTEGER PRIMARY KEY, json BLOB NOT NULL);
CREATE TABLE progress (seq INTEGER PRIMARY KEY, json BLOB NOT NULL);
CREATE TABLE fragments (seq INTEGER PRIMARY KEY, version INTEGER NOT NULL, json BLOB NOT NULL);
"""
# How many tasks are placed at a destination is counted in an index that holds just those.
_SCHEMA_2 = """
ALTER TABLE tasks ADD COLUMN destination TEXT;
UPDATE tasks SET destination = (
    SELECT json_extract(CAST(p.json AS TEXT), '$.attempts[#-1].destination') FROM progress p
    WHERE p.seq = tasks.seq AND json_valid(CAST(p.json AS TEXT))
) WHERE work = 'placed';
CREATE INDEX tasks_by_destination ON tasks (destination) WHERE destination IS NOT NULL;
"""
_SCHEMA_3 = """
ALTER TABLE tasks ADD COLUMN key TEXT;
ALTER TABLE tasks ADD COLUMN key_digest TEXT;
CREATE UNIQUE INDEX tasks_by_key ON tasks (owner, key) WHERE key IS NOT NULL;
"""
# When nothing was left to do about a task; for those of earlier schemas, when its job had ended.
_SCHEMA_4 = """
ALTER TABLE tasks ADD COLUMN done REAL;
UPDATE tasks SET done = CAST(strftime('%s', coalesce((
    SELECT json_extract(CAST(p.json AS TEXT), '$.attempts[#-1].ended') FROM progress p
    WHERE p.seq = tasks.seq AND json_valid(CAST(p.json AS TEXT))
), created)) AS REAL) WHERE work = 'done';
CREATE INDEX tasks_done ON tasks (done) WHERE done IS NOT NULL;
"""
# A row of this view becomes one of each table, so that many tasks come in with one statement.
_ARRIVALS = """
CREATE TEMP VIEW arrivals AS
    SELECT t.seq, t.id, t.owner, t.state, t.work, t.revision, t.created, t.name, t.destination, t.done,
        d.json AS document, p.json AS progress, f.version, f.json AS fragment
    FROM main.tasks t, main.documents d, main.progress p, main.fragments f;
CREATE TEMP TRIGGER arrive INSTEAD OF INSERT ON arrivals BEGIN
    INSERT INTO tasks (seq, id, owner, state, work, revision, created, name, destination, done)
        VALUES (new.seq, new.id, new.owner, new.state, new.work, new.revision, new.created, new.name, new.destination,
            new.done);
    INSERT INTO documents (seq, json) VALUES (new.seq, new.document);
    INSERT INTO progress (seq, json) VALUES (new.seq, new.progress);
    INSERT INTO fragments (seq, version, json) VALUES (new.seq, new.version, new.fragment);
END;
"""
_BUSY_PATIENCE_S = 1.0
# Taken as it is needed. What a list touches lies further apart the more tasks there are, and is read again and again.
_CACHE_KIB = 64 * 1024
_MIGRATIONS = (_SCHEMA_1, _SCHEMA_2, _SCHEMA_3, _SCHEMA_4)
"""Step n leads from schema n to n + 1; what has been released is never changed, only followed by another step."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """The database belongs to this process alone; the lock ends with the process, however that ends."""
    with _usable(path):
        lock = Path(f"{path.resolve()}.lock")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.read(descriptor, 20).decode("ascii", "replace").strip()
            raise StoreInUse(
                f"The database {path} is in use by process {pid or '(starting)'}. SQLite serves one process; for more"
                " processes or hosts use MongoDB (db.mongodb_uri)."
            ) from error
        except OSError as error:
            raise ConfigurationProblem(
                f"{lock} cannot be locked ({error.strerror}): put the database (db.sqlite_path) on a file system with"
                " locks, such as a disk of this machine."
            ) from error
        with _usable(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
            # Before there is any connection: closing a file gives up all POSIX locks of the process on it, and SQLite
            # works with those. Its other files get the mode of this one.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def connected(path: Path, *, read_only: bool = False) -> Iterator[sqlite3.Connection]:
    """A connection for any thread, one at a time; each statement is a transaction until one is begun."""
    with _usable(path):
        db = sqlite3.connect(path, timeout=_BUSY_PATIENCE_S, isolation_level=None, check_same_thread=False)
    with contextlib.closing(db):
        with _usable(path):
            db.execute(f"PRAGMA query_only = {read_only:d}")
            db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        yield db


def prepared(db: sqlite3.Connection, path: Path) -> str:
    """The database in the schema of this version, and nobody holding a lease; the id of the store."""
    with _usable(path):
        _migrated(db, path)
        db.execute("PRAGMA synchronous = FULL")
        db.executescript(_ARRIVALS)
        db.execute("INSERT OR IGNORE INTO meta VALUES ('id', ?)", (uuid.uuid4().hex,))
        # The lock says that whoever held these leases is dead: nobody has to wait until they go stale.
        db.execute("UPDATE tasks SET holder = NULL WHERE holder IS NOT NULL")
        db.execute("DELETE FROM holders")
        (store_id,) = db.execute("SELECT value FROM meta WHERE key = 'id'").fetchone()
    return str(store_id)


def _migrated(db: sqlite3.Connection, path: Path) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > len(_MIGRATIONS):
        raise ConfigurationProblem(
            f"The database {path} has schema {version}, and this version of tesapi knows none above"
            f" {len(_MIGRATIONS)}: start the newer version again, or name another file (db.sqlite_path)."
        )
    if version == 0 and db.execute("SELECT 1 FROM sqlite_master").fetchone():
        raise ConfigurationProblem(f"{path} is the database of another program: name another file (db.sqlite_path).")
    (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise ConfigurationProblem(
            f"The file system of {path} cannot hold a database in WAL mode, as network file systems cannot: put it"
            " (db.sqlite_path) on a disk of this machine."
        )
    for number, step in enumerate(_MIGRATIONS[version:], start=version + 1):
        db.executescript(f"BEGIN IMMEDIATE; {step} PRAGMA user_version = {number}; COMMIT;")


@contextlib.contextmanager
def _usable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigurationProblem(
            f"The database {path} cannot be opened: {error.filename}: {error.strerror}."
        ) from error
    except sqlite3.Error as error:
        raise ConfigurationProblem(f"The database {path} cannot be used: {error}.") from error
