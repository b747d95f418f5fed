"""A TES server that is not ours, and does as a test tells it: over real HTTP, on a port of its own."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

INFO = {"id": "x", "name": "x", "type": {"group": "org.ga4gh", "artifact": "tes", "version": "1.1.0"}}
COMPLETE = {"state": "COMPLETE", "logs": [{"logs": [{"exit_code": 0, "stdout": "done\n"}]}]}


class Asked(NamedTuple):
    """A request."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes


class HangUp(Exception):
    """Close the connection instead of answering."""


Answer = tuple[int, Any]


class Foreign:
    """Answers below `base`, and 404 elsewhere. `answer` gives the status and what is sent: JSON, or bytes."""

    def __init__(self, base: str, answer: Callable[[Asked], Answer]) -> None:
        self.asked: list[Asked] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _any(self) -> None:
                parts = urlsplit(self.path)
                length = int(self.headers.get("Content-Length", 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                asked = Asked(self.command, parts.path, parts.query, headers, self.rfile.read(length))
                outer.asked.append(asked)
                inside = parts.path.startswith(base + "/")
                try:
                    status, body = (
                        answer(asked._replace(path=parts.path.removeprefix(base))) if inside else (404, {"detail": "?"})
                    )
                except HangUp:
                    self.close_connection = True
                    return
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                if status in (301, 302, 307, 308):
                    self.send_header("Location", "http://user:hush@elsewhere.example/x?key=hush")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = _any  # noqa: N815

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def posts(self) -> list[Asked]:
        """The requests that wanted to change something."""
        return [asked for asked in self.asked if asked.method == "POST"]


def ordinary(asked: Asked) -> Answer:
    """A server on which every task is complete at once."""
    if asked.path == "/service-info":
        return 200, INFO
    if asked.path == "/tasks" and asked.method == "POST":
        return 200, {"id": "t-1"}
    if asked.path == "/tasks":
        return 200, {"tasks": [{"id": "t-1", "state": "COMPLETE"}]}
    if asked.path == "/tasks/t-1:cancel":
        return 200, {}
    if asked.path == "/tasks/t-1":
        return 200, {"id": "t-1", **COMPLETE}
    return 404, {"detail": "no such task"}
