"""Moving one large file: by `file` beside cp, and by `http` beside curl and the same local server."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from tesapi.runner.storage.base import Storages
from tests.jobs import until

_MIB = int(os.environ.get("TESAPI_BENCH_MIB", "256"))


def run(folder: pathlib.Path, rounds: int) -> None:
    """Measure and print. TESAPI_BENCH_MIB=1024 moves a GiB; the default is a quarter of that."""
    source, target = folder / "source", folder / "target"
    with source.open("wb") as file:
        for _ in range(_MIB):
            file.write(os.urandom(1 << 20))
    storages = Storages({"file": {"roots": [str(folder)]}, "http": {}})
    with _server(source) as url:
        cases: dict[str, Callable[[], object]] = {
            "cp": lambda: subprocess.run(["cp", source, target], check=True),
            "file, in": lambda: _get(storages, f"file://{source}", target),
            "file, out": lambda: storages.of("file:").put(str(source), f"file://{target}", _go_on),
            "curl, in": lambda: _curl("-o", str(target), url),
            "http, in": lambda: _get(storages, url, target),
            "curl, out": lambda: _curl("-T", str(source), url),
            "http, out": lambda: storages.of(url).put(str(source), url, _go_on),
        }
        if shutil.which("curl") is None:
            print("storage: http is not measured, for there is no curl to measure it beside (apt-get install curl)")
            cases = {name: case for name, case in cases.items() if name in ("cp", "file, in", "file, out")}
        took: dict[str, list[float]] = {name: [] for name in cases}
        for number in range(rounds):
            names = list(cases)
            for name in names[number % len(names) :] + names[: number % len(names)]:  # nobody is always the first
                target.unlink(missing_ok=True)
                os.sync()  # nobody is to wait for what another wrote
                began = time.perf_counter()
                cases[name]()
                took[name].append(time.perf_counter() - began)
    print(f"Storage, one file of {_MIB} MiB, {rounds} rounds")
    for name, seconds in took.items():
        reference = "cp" if name.startswith("file") else name.replace("http", "curl")
        median = statistics.median(seconds)
        ratio = median / statistics.median(took[reference])
        beside = "" if name == reference else f"   {ratio:5.2f} of the time of {reference.partition(',')[0]}"
        print(f"  {name:<10} {_MIB / median:8.0f} MiB/s{beside}")


def _go_on() -> None:
    pass


def _get(storages: Storages, url: str, target: pathlib.Path) -> None:
    storages.of(url).get(url, str(target), _go_on)


def _curl(*arguments: str) -> None:
    subprocess.run(["curl", "--silent", "--show-error", "--fail", *arguments], check=True)


@contextlib.contextmanager
def _server(file: pathlib.Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    with subprocess.Popen([sys.executable, "-m", "benchmarks.web_server", str(port), str(file)]) as process:
        until(lambda: _listens(port), "the web server")
        yield f"http://127.0.0.1:{port}/file"
        process.terminate()


def _listens(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0
