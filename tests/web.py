"""A web server that says exactly what a test wants, well-behaved or not."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import NamedTuple, Self


class Request(NamedTuple):
    """What a client asked."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes


Answer = bytes | Iterable[bytes] | Callable[[Request], bytes | Iterable[bytes]]


def answer(status: str, body: bytes = b"", **headers: object) -> bytes:
    """A whole answer. Headers as `Retry_After=1`; a Content-Length that fits is added where none is given."""
    fields = {"Content-Length": len(body)} | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value is not None)
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


class Deaf(bytes):
    """An answer that is given without reading the body of the request."""


class Web:
    """A server at `url`. Each target has its answers, one a request; the last one is for all that follow.

    An answer in parts is sent part by part; a connection is closed at its end. What was asked is in `requests`.
    """

    def __init__(self, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family)
        self._tls = tls
        self._answers: dict[str, list[Answer]] = {}
        self._connections: set[socket.socket] = set()
        self.port: int = self._socket.getsockname()[1]
        place = f"[{host}]" if ":" in host else host
        self.url = f"{'https' if tls else 'http'}://{place}:{self.port}"
        self.requests: list[Request] = []
        self.closing = threading.Event()

    def on(self, target: str, *answers: Answer) -> str:
        """Say what is answered to requests for `target`; its URL."""
        self._answers[target] = list(answers)
        return self.url + target

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self._connections.add(connection)
                threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), contextlib.ExitStack() as stack:
            stack.callback(self._connections.discard, connection)
            stack.enter_context(connection)
            if self._tls is not None:
                connection = stack.enter_context(self._tls.wrap_socket(connection, server_side=True))
            self._converse(connection)

    def _converse(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as reader:
            method, target, _ = reader.readline().decode("ascii").split(" ")
            headers = dict(re.findall(r"(?m)^([^:]+): (.*)\r\n", "".join(self._lines(reader))))
            answers = self._answers.get(target, [answer("404 Not Found")])
            chosen = answers.pop(0) if len(answers) > 1 else answers[0]
            deaf = isinstance(chosen, Deaf)
            body = b"" if deaf else reader.read(int(headers.get("Content-Length", 0)))
            request = Request(method, target, headers, body)
            self.requests.append(request)
            said = chosen(request) if callable(chosen) else chosen
            for part in [said] if isinstance(said, bytes) else said:
                if self.closing.is_set():
                    return
                connection.sendall(part)

    def _lines(self, reader: Iterable[bytes]) -> Iterable[str]:
        for line in reader:
            if line == b"\r\n":
                return
            yield line.decode("ascii")

    def stall(self, *first: bytes) -> Iterable[bytes]:
        """Say something, and then nothing any more, and keep the connection."""
        yield from first
        self.closing.wait()
