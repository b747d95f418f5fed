"""Creating and reading tasks beside an empty route."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from tests.jobs import until
from tests.services.server import Server

_CONNECTIONS = 64
_REQUESTS = 6400


def _body() -> bytes:
    document = {
        "name": "benchmark",
        "inputs": [{"url": f"file:///data/in/{n}", "path": f"/work/in/{n}", "type": "FILE"} for n in range(2)],
        "outputs": [{"url": "file:///data/out", "path": "/work/out", "type": "FILE"}],
        "executors": [{"image": "alpine", "command": ["sh", "-c", "x" * 900], "workdir": "/work", "env": {"A": "b"}}],
        "resources": {"cpu_cores": 100_000, "ram_gb": 1.5, "disk_gb": 10},
        "tags": {f"key{n}": "value" for n in range(5)},
    }
    return json.dumps(document).encode()


def run(folder: pathlib.Path, rounds: int) -> None:
    """Measure and print."""
    body = _body()
    # Without a destination there is no room, and nothing is claimed: only the API is measured.
    with Server(folder, LOCAL__ENABLE="false", LOGGING__LEVEL="info") as server, _empty() as empty_port:
        port = int(server.url.rpartition(":")[2])
        task_id = server.post(json.loads(body))
        cases = {
            "an empty route": (empty_port, _request("POST", "/", body)),
            "create a task": (port, _request("POST", "/ga4gh/tes/v1/tasks", body)),
            "read it, MINIMAL": (port, _request("GET", f"/ga4gh/tes/v1/tasks/{task_id}", b"")),
        }
        rates: dict[str, list[float]] = {name: [] for name in cases}
        late: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds):
            for name, (to, request) in cases.items():
                rate, p99 = asyncio.run(_load(to, request))
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
    took: list[float] = []

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(_REQUESTS // _CONNECTIONS):
            began = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(head.decode())
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            took.append(time.perf_counter() - began)
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(connection() for _ in range(_CONNECTIONS)))
    seconds = time.perf_counter() - began
    return len(took) / seconds, statistics.quantiles(took, n=100)[98]
