"""The MongoDB database: how it is reached, what is heard of its errors, its indexes, its schema, its clock."""

from __future__ import annotations

import contextlib
import re
import time
import uuid
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pymongo
from pymongo import ASCENDING, DESCENDING, AsyncMongoClient, IndexModel
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    DuplicateKeyError,
    InvalidOperation,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
    WriteConcernError,
)
from pymongo.read_concern import ReadConcern
from pymongo.read_preferences import ReadPreference

from tesapi.errors import ConfigurationProblem, StoreUnavailable

Row = dict[str, Any]

APP_NAME = "tesapi"
SCHEMA = (1, 0)
"""Major and minor. What a minor step adds, older processes keep as they find it and do not need, so that both may run
beside each other; a major step is one that they would not understand, and they refuse the database then."""

_DEFAULT_NAME = "tesapi"
# What the URI may say as well. A server that was away for a moment is looked at again soon.
_DEFAULTS: Mapping[str, Any] = {"maxPoolSize": 64, "heartbeatFrequencyMS": 2000}
_START_PATIENCE_S = 30.0
_OLDEST_WIRE = 9
_OLDEST = "4.4.2"
_HOLDERS_STAY_S = 86400
_LOOKS_AT_THE_CLOCK = 5
_AUTHENTICATION_FAILED, _UNAUTHORIZED, _COMMAND_NOT_FOUND = 18, 13, 59

BY_SEQ, BY_OWNER, BY_STATE, BY_NAME, BY_TAG = "by_seq", "by_owner", "by_state", "by_name", "by_tag"
TO_CLAIM, HELD, POSTPONED, SLOTS, KEYS, DONE = "to_claim", "held", "postponed", "slots", "keys", "done"


def _some(field: str) -> Mapping[str, object]:
    return {field: {"$exists": True}}


# Every list is read in order from an index that ends in (owner, seq). Those by owner and by state hold all that the
# MINIMAL view shows, and no task is read for it. A task has `due` while it can be claimed, `holder` while it is leased,
# and so on: those indexes hold only what is under way, and a million done tasks make none of them longer.
_INDEXES = [
    IndexModel([("seq", DESCENDING)], name=BY_SEQ, unique=True),
    IndexModel([("owner", ASCENDING), ("seq", DESCENDING), ("state", ASCENDING), ("_id", ASCENDING)], name=BY_OWNER),
    IndexModel([("state", ASCENDING), ("owner", ASCENDING), ("seq", DESCENDING), ("_id", ASCENDING)], name=BY_STATE),
    IndexModel(
        [("name", ASCENDING), ("owner", ASCENDING), ("seq", DESCENDING)],
        name=BY_NAME,
        partialFilterExpression=_some("name"),
    ),
    IndexModel(
        [("tags", ASCENDING), ("owner", ASCENDING), ("seq", DESCENDING)],
        name=BY_TAG,
        partialFilterExpression=_some("tags"),
    ),
    IndexModel(
        [("due", ASCENDING), ("owner", ASCENDING), ("seq", ASCENDING)],
        name=TO_CLAIM,
        partialFilterExpression=_some("due"),
    ),
    IndexModel(
        [("holder", ASCENDING), ("state", ASCENDING), ("_id", ASCENDING)],
        name=HELD,
        partialFilterExpression=_some("holder"),
    ),
    IndexModel([("not_before", ASCENDING)], name=POSTPONED, partialFilterExpression=_some("not_before")),
    IndexModel(
        [("destination", ASCENDING), ("slot", ASCENDING)],
        name=SLOTS,
        unique=True,
        partialFilterExpression=_some("slot"),
    ),
    IndexModel(
        [("owner", ASCENDING), ("key", ASCENDING)], name=KEYS, unique=True, partialFilterExpression=_some("key")
    ),
    IndexModel([("done", ASCENDING), ("seq", ASCENDING)], name=DONE, partialFilterExpression=_some("done")),
]


class NotSeenYet(PyMongoError):
    """A write is there, and not yet on as many servers as it has to be: look again."""


@dataclass(frozen=True, slots=True)
class Database:
    """The collections, and what can be done with them. Reads give only what most servers have, and no crash undoes."""

    where: str
    store_id: str
    client: AsyncMongoClient[Row]
    tasks: AsyncCollection[Row]
    parts: AsyncCollection[Row]
    holders: AsyncCollection[Row]
    transactions: bool

    @contextlib.contextmanager
    def answering(self, patience_s: float) -> Iterator[None]:
        """What is asked inside is to be answered within `patience_s` in all; raises StoreUnavailable."""
        with unavailable(self.where), pymongo.timeout(patience_s):
            yield

    async def ahead_s(self) -> float:
        """How far the server's clock is ahead of this machine's; 0 where it may as well be the same."""
        least, most = float("-inf"), float("inf")
        for _ in range(_LOOKS_AT_THE_CLOCK):
            before = time.time()
            hello = await self.client.admin.command("hello")
            after = time.time()
            theirs: float = hello["localTime"].timestamp()
            least, most = max(least, theirs - after), min(most, theirs + 0.001 - before)
        return min(most, max(least, 0.0))


@contextlib.contextmanager
def unavailable(where: str) -> Iterator[None]:
    """Errors of the driver become StoreUnavailable, of which no word is of a document or a password."""
    try:
        yield
    except PyMongoError as error:
        raise StoreUnavailable(f"{where} does not answer as it should: {_sentence(error)}.") from error


def _sentence(error: PyMongoError) -> str:
    match error:
        case InvalidOperation():
            return "this process has closed its connections"
        case ServerSelectionTimeoutError():
            reason = re.split(r" \(configured timeouts|, Timeout:", str(error))[0]
            return f"none of its servers can be reached and takes writes ({reason[:200]})"
        case BulkWriteError() | WriteConcernError():
            return "it did not confirm a write"
        case DuplicateKeyError():
            return "there is such a task already"
        case _ if error.timeout:
            return "it took too long"
        case OperationFailure():
            return f"it refused ({(error.details or {}).get('codeName') or error.code})"
        case AutoReconnect() | ConnectionFailure():
            return "the connection was lost"
        case _:
            return type(error).__name__


def is_unknown(error: PyMongoError) -> bool:
    """Whether a write that raised it may have been done, or may be done when it is tried again."""
    if isinstance(error, BulkWriteError):
        return not error.details["writeErrors"]
    unknown = isinstance(error, ConnectionFailure | WriteConcernError | NotSeenYet)
    return not error.timeout and (unknown or error.has_error_label("RetryableWriteError"))


@contextlib.asynccontextmanager
async def connected(uri: str) -> AsyncIterator[Database]:
    """The database that `uri` names, by default `tesapi`, with all that has to be in it.

    Raises ConfigurationProblem where it cannot be used as it is, and StoreUnavailable where it cannot be reached now.
    """
    where = f"MongoDB at {re.split('[/?]', re.split('@|://', uri)[-1])[0]}"
    options = {name: value for name, value in _DEFAULTS.items() if f"{name.lower()}=" not in uri.lower()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # of an option that the driver would pass over
            client: AsyncMongoClient[Row] = AsyncMongoClient(
                uri, appname=APP_NAME, w="majority", journal=True, tz_aware=True, **options
            )
        named = client.get_default_database(_DEFAULT_NAME)
    except (PyMongoError, ValueError, UserWarning):
        # Not its text, which may hold parts of the password; nor the cause, which a traceback would show.
        raise ConfigurationProblem(
            "db.mongodb_uri is no URI of MongoDB: write mongodb://USER:PASSWORD@HOST:PORT/DATABASE, with all but"
            " letters and digits of user and password percent-encoded, and only with options that MongoDB knows."
        ) from None
    async with client:
        db = named.with_options(read_concern=ReadConcern("majority"), read_preference=ReadPreference.PRIMARY)
        with _usable(where, db.name):
            with pymongo.timeout(_START_PATIENCE_S):
                hello = await client.admin.command("hello")
                if hello["maxWireVersion"] < _OLDEST_WIRE:
                    raise _too_old(where)
                store_id = await _store_id(db.get_collection("store"), await db.list_collection_names(), where, db.name)
            # Where there are many tasks, a new index takes its time.
            await db.get_collection("tasks").create_indexes(_INDEXES)
            await db.get_collection("holders").create_index("seen", expireAfterSeconds=_HOLDERS_STAY_S)
        tasks, parts, holders = (db.get_collection(name) for name in ("tasks", "parts", "holders"))
        transactions = "setName" in hello or hello.get("msg") == "isdbgrid"
        yield Database(f"{where}, database {db.name},", store_id, client, tasks, parts, holders, transactions)


@contextlib.contextmanager
def _usable(where: str, name: str) -> Iterator[None]:
    try:
        with unavailable(where):
            yield
    except StoreUnavailable as error:
        cause = error.__cause__
        code = cause.code if isinstance(cause, OperationFailure) else None
        if code == _COMMAND_NOT_FOUND:
            raise _too_old(where) from None
        if code == _AUTHENTICATION_FAILED:
            raise ConfigurationProblem(
                f"{where} refused the user or the password of db.mongodb_uri; if the user is not one of the database"
                f" {name}, say of which (authSource=...)."
            ) from None
        if code == _UNAUTHORIZED:
            raise ConfigurationProblem(
                f"{where} does not let the user of db.mongodb_uri work with the database {name}: readWrite is needed."
            ) from None
        if isinstance(cause, ConfigurationError):
            raise ConfigurationProblem(f"{where} cannot be used: {cause}") from None
        raise


def _too_old(where: str) -> ConfigurationProblem:
    return ConfigurationProblem(f"{where} is older than {_OLDEST}, which is the oldest that will do.")


async def _store_id(store: AsyncCollection[Row], there: list[str], where: str, name: str) -> str:
    """The id of the store. The database is new, or of a schema that this version can work with."""
    if there and "store" not in there:
        raise ConfigurationProblem(
            f"The database {name} of {where} is that of another program: name another one at the end of db.mongodb_uri."
        )
    major, minor = SCHEMA
    new = {"id": uuid.uuid4().hex, "major": major, "minor": minor}
    with contextlib.suppress(DuplicateKeyError):  # another process begins at the same time
        await store.update_one({"_id": "store"}, {"$setOnInsert": new}, upsert=True)
    found = await store.find_one({"_id": "store"})
    if found is None:
        raise NotSeenYet
    if found["major"] != major:
        raise ConfigurationProblem(
            f"The database {name} of {where} has schema {found['major']}.{found['minor']}, and this version of tesapi"
            f" knows {major}.{minor} and later ones of {major}: start the other version again, or name another one."
        )
    await store.update_one({"_id": "store"}, {"$max": {"minor": minor}})
    return str(found["id"])
