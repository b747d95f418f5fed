"""The benchmarks of the HTTP interface and of lists, in MongoDB: a replica set of one on this machine."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

from benchmarks import http, lists
from tesapi.store.mongo import MongoStore
from tests.mongod import Mongod, install


def run_http(folder: pathlib.Path, rounds: int) -> None:
    """As `http.run`."""
    with _mongod(folder) as mongod:
        http.run(folder, rounds, DB__MONGODB_URI=mongod.database_url("http"))


def run_lists(folder: pathlib.Path, rounds: int, size: int) -> None:
    """As `lists.run`."""
    with _mongod(folder) as mongod:
        lists.run(rounds, size, lambda name: MongoStore(mongod.database_url(name)))


@contextlib.contextmanager
def _mongod(folder: pathlib.Path) -> Iterator[Mongod]:
    with Mongod(folder / "mongod", install()) as mongod:
        print("In MongoDB:")
        yield mongod
