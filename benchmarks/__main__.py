"""`make bench`: each figure beside a reference that is measured in the same run, alternately; ratios of medians.

Absolute figures change from machine to machine. What is compared:

- creating a task durably, and reading one in the MINIMAL view, beside an *empty* FastAPI route that returns bytes, on
  the same uvicorn with the same settings, 64 connections, a body of 1.6 KB;
- no-op tasks on the local backend, from POST to COMPLETE, with bubblewrap and with Docker: beside a bare loop of bwrap
  or `docker run`, and beside one that starts the same runners; and where the time of one task alone goes;
- moving a file in and out (TESAPI_BENCH_MIB says how large), by `file` beside cp, by `http` beside curl.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile

from benchmarks import http, local, storage


def main() -> int:
    """Run the benchmarks that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help="which; all without a name")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, of which the median counts")
    options = parser.parse_args()
    for name, run in (
        ("http", http.run),
        ("local", local.bubblewrap),
        ("docker", local.docker),
        ("storage", storage.run),
    ):
        if not options.names or name in options.names:
            with tempfile.TemporaryDirectory() as folder:
                run(pathlib.Path(folder), options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
