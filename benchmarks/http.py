"""Creating and reading tasks beside an empty route."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import pathlib
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import cast

import uvloop

from tests.jobs import until
from tests.services.server import Server

_CONNECTIONS = 64
_REQUESTS = 12800


def _body() -> bytes:
    document = {
        "name": "benchmark",
        "inputs": [{"url": f"file:///data/in/{n}", "path": f"/work/in/{n}", "type": "FILE"} for n in range(2)],
        "outputs": [{"url": "file:///data/out", "path": "/work/out", "type": "FILE"}],
        "executors": [{"image": "alpine", "command": ["sh", "-c", "x" * 1100], "workdir": "/work", "env": {"A": "b"}}],
        "resources": {"cpu_cores": 100_000, "ram_gb": 1.5, "disk_gb": 10},
        "tags": {f"key{n}": "value" for n in range(5)},
    }
    return json.dumps(document).encode()


def run(folder: pathlib.Path, rounds: int, **settings: str) -> None:
    """Measure and print."""
    body = _body()
    # Without a destination there is no room, and nothing is claimed: only the API is measured.
    quiet = {"LOCAL__ENABLE": "false", "LOGGING__LEVEL": "info", **settings}
    with Server(folder, **quiet) as server, _empty() as empty_port:
        port = int(server.url.rpartition(":")[2])
        task_id = server.post(json.loads(body))
        cases = {
            "an empty route": (empty_port, _request("POST", "/", body)),
            "create a task": (port, _request("POST", "/ga4gh/tes/v1/tasks", body)),
            "read it, MINIMAL": (port, _request("GET", f"/ga4gh/tes/v1/tasks/{task_id}", b"")),
            "read it, BASIC": (port, _request("GET", f"/ga4gh/tes/v1/tasks/{task_id}?view=BASIC", b"")),
            "read it, FULL": (port, _request("GET", f"/ga4gh/tes/v1/tasks/{task_id}?view=FULL", b"")),
        }
        rates: dict[str, list[float]] = {name: [] for name in cases}
        late: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds):
            for name, (to, request) in cases.items():
                rate, p99 = uvloop.run(_load(to, request))
                rates[name].append(rate)
                late[name].append(p99)
    reference = statistics.median(rates["an empty route"])
    print(f"HTTP, {_CONNECTIONS} connections, body of {len(body)} bytes, {rounds} rounds of {_REQUESTS} requests")
    for name, values in rates.items():
        rate, p99 = statistics.median(values), statistics.median(late[name])
        print(f"  {name:<20} {rate:8.0f}/s   p99 {p99 * 1e3:6.1f} ms   {rate / reference:5.2f} of the empty route")


@contextlib.contextmanager
def _empty() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    with subprocess.Popen([sys.executable, "-m", "benchmarks.empty", str(port)]) as process:
        until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, "the empty route")
        yield port
        process.terminate()


def _request(method: str, path: str, body: bytes) -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def _load(port: int, request: bytes) -> tuple[float, float]:
    """Requests per second, and the 99th percentile of the seconds that an answer took."""
    loop = asyncio.get_running_loop()
    took: list[float] = []
    connections = [_Connection(request, took, loop.create_future()) for _ in range(_CONNECTIONS)]
    began = time.perf_counter()
    for connection in connections:
        await loop.create_connection(functools.partial(_same, connection), "127.0.0.1", port)
    await asyncio.gather(*(connection.done for connection in connections))
    seconds = time.perf_counter() - began
    return len(took) / seconds, statistics.quantiles(took, n=100)[98]


def _same(connection: _Connection) -> _Connection:
    return connection


class _Connection(asyncio.Protocol):
    """Sends its next request when the answer to the last one is complete. Streams would be slower than the server."""

    def __init__(self, request: bytes, took: list[float], done: asyncio.Future[None]) -> None:
        self.done = done
        self._request = request
        self._took = took
        self._left = _REQUESTS // _CONNECTIONS
        self._answer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its classes
        self._send()

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, end, body = self._answer.partition(b"\r\n\r\n")
        if not end:
            return
        if not head.startswith(b"HTTP/1.1 200"):
            self.done.set_exception(RuntimeError(head.decode()))
            return
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if len(body) < int(length):
            return
        self._took.append(time.perf_counter() - self._began)
        self._answer = b""
        if self._left:
            self._send()
        else:
            self._transport.close()
            self.done.set_result(None)

    def _send(self) -> None:
        self._left -= 1
        self._began = time.perf_counter()
        self._transport.write(self._request)
