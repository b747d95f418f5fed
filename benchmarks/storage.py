"""Moving one large file: by `file` beside cp (and sync), and by `http` beside curl and the same local server."""

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

Case = Callable[[], object]

_MIB = int(os.environ.get("TESAPI_BENCH_MIB", "256"))


def run(folder: pathlib.Path, rounds: int) -> None:
    """Measure and print. TESAPI_BENCH_MIB=1024 moves a GiB; the default is a quarter of that."""
    source, target = folder / "source", folder / "target"
    with source.open("wb") as file:
        for _ in range(_MIB):
            file.write(os.urandom(1 << 20))
    storages = Storages({"file": {"roots": [str(folder)]}, "http": {}})
    with _server(source) as url:
        pairs: dict[str, tuple[Case, str, Case]] = {
            "file, in": (lambda: _get(storages, f"file://{source}", target), "cp", lambda: _cp(source, target)),
            "file, out": (  # what is stored has to survive a power cut, which cp alone does not see to
                lambda: storages.of("file:").put(str(source), f"file://{target}", _go_on),
                "cp and sync of the file",
                lambda: (_cp(source, target), subprocess.run(["sync", target], check=True)),
            ),
            "http, in": (lambda: _get(storages, url, target), "curl", lambda: _curl("-o", str(target), url)),
            "http, out": (
                lambda: storages.of(url).put(str(source), url, _go_on),
                "curl",
                lambda: _curl("-T", str(source), url),
            ),
        }
        if shutil.which("curl") is None:
            print("storage: http is not measured, for there is no curl to measure it beside (apt-get install curl)")
            pairs = {name: pair for name, pair in pairs.items() if name.startswith("file")}
        took: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
        for number in range(-1, rounds):  # the first round warms the caches, and does not count
            for name, (ours, _, theirs) in pairs.items():
                seconds = _in_turn(target, ours, theirs, theirs_first=number % 2 == 0)
                if number >= 0:
                    took[name].append(seconds)
    print(f"Storage, one file of {_MIB} MiB, {rounds} rounds, load {os.getloadavg()[0]:.1f}; medians")
    for name, seconds_of_both in took.items():
        ours, theirs = (statistics.median(seconds) for seconds in zip(*seconds_of_both, strict=True))
        ratio = statistics.median(reference / own for own, reference in seconds_of_both)
        print(
            f"  {name:<9} {_MIB / ours:7.0f} MiB/s, {ratio:5.2f} of the speed of {pairs[name][1]} beside it"
            f" ({_MIB / theirs:.0f} MiB/s)"
        )


def _in_turn(target: pathlib.Path, ours: Case, theirs: Case, *, theirs_first: bool) -> tuple[float, float]:
    """The seconds of each, one right after the other, so that both meet the same machine."""
    seconds = []
    for case in (theirs, ours) if theirs_first else (ours, theirs):
        target.unlink(missing_ok=True)
        os.sync()  # nobody is to wait for what another wrote
        began = time.perf_counter()
        case()
        seconds.append(time.perf_counter() - began)
    first, second = seconds
    return (second, first) if theirs_first else (first, second)


def _cp(source: pathlib.Path, target: pathlib.Path) -> None:
    subprocess.run(["cp", source, target], check=True)


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
