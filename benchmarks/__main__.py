"""`make bench`: each figure beside a reference that is measured in the same run, alternately; ratios of medians.

Absolute figures change from machine to machine. What is compared:

- creating a task durably, and reading one in the MINIMAL view, beside an *empty* FastAPI route that returns bytes, on
  the same uvicorn with the same settings, 64 connections, a body of 1.6 KB;
- pages of 256 tasks beside 10,000 and beside `--size` tasks, by each filter;
- both of these with the tasks in MongoDB (`http_mongodb`, `lists_mongodb`);
- what the service takes while nobody asks it for anything;
- no-op tasks on the local backend, from POST to COMPLETE, beside bare loops that start the same sandboxes,
  and the same runners; on bubblewrap and on Docker;
- no-op tasks through a real Pulsar over REST, beside a client that does the least for the same jobs; cancel there; and
  what 1,000 jobs in flight take that nobody looks at;
- no-op tasks on a Pulsar behind a RabbitMQ, beside a bare client of the broker that has the same jobs run;
- what 10,000 jobs take that run at a simulated Pulsar behind a RabbitMQ;
- tasks that two dispatchers drive from one MongoDB, beside one alone, at a simulated destination;
- moving a file in and out (TESAPI_BENCH_MIB says how large), by `file` beside cp, by `http` beside curl.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile
from collections.abc import Callable

from benchmarks import dispatchers, http, idle, lists, local, mongodb, pulsar, pulsar_amqp, storage
from tesapi.store.sqlite import SqliteStore


def main() -> int:
    """Run the benchmarks that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help="which; all without a name")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, of which the median counts")
    parser.add_argument("--size", type=int, default=100_000, help="how many tasks the long lists are beside")
    options = parser.parse_args()
    cases: dict[str, Callable[[pathlib.Path], None]] = {
        "http": lambda folder: http.run(folder, options.rounds),
        "lists": lambda folder: lists.run(
            options.rounds, options.size, lambda name: SqliteStore(folder / f"{name}.db")
        ),
        "http_mongodb": lambda folder: mongodb.run_http(folder, options.rounds),
        "lists_mongodb": lambda folder: mongodb.run_lists(folder, options.rounds, options.size),
        "idle": idle.run,
        "local": lambda folder: local.bubblewrap(folder, options.rounds),
        "docker": lambda folder: local.docker(folder, options.rounds),
        "pulsar": lambda folder: pulsar.run(folder, options.rounds),
        "pulsar_amqp": lambda folder: pulsar_amqp.run(folder, options.rounds),
        "idle_amqp": pulsar_amqp.run_idle,
        "dispatchers": lambda folder: dispatchers.run(folder, options.rounds),
        "storage": lambda folder: storage.run(folder, options.rounds),
    }
    for name, run in cases.items():
        if not options.names or name in options.names:
            with tempfile.TemporaryDirectory() as folder:
                run(pathlib.Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
