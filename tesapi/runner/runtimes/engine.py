"""The HTTP API of a container engine at a Unix socket. Source: Docker Engine API reference, v1.40 and later."""

from __future__ import annotations

import http.client
import json
import socket
from typing import IO, Any, Callable, Mapping, Optional, Sequence, Tuple, Union
from urllib.parse import quote, urlencode

Query = Union[Mapping[str, str], Sequence[Tuple[str, str]], None]

_ANSWER_S = 120.0
_MAX_MESSAGE = 1000


class EngineAway(Exception):
    """The engine does not answer; the text says what happened."""


class EngineRefused(Exception):
    """The engine answered, and would not."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("docker", timeout=_ANSWER_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(self.timeout)
            self.sock.connect(self._path)
        except OSError:
            self.sock.close()
            raise


class Answer:
    """An answer whose body comes when the engine has something to say."""

    def __init__(
        self, connection: http.client.HTTPConnection, sock: socket.socket, response: http.client.HTTPResponse
    ) -> None:
        self._connection = connection
        self._socket = sock
        self._response = response

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> bytes:
        """The whole body. Raises EngineAway."""
        try:
            return self._response.read()
        except (OSError, http.client.HTTPException) as error:
            raise EngineAway(_said(error)) from error

    def readline(self) -> bytes:
        """The next line of the body; empty at its end. Raises EngineAway."""
        try:
            return self._response.readline()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise EngineAway(_said(error)) from error

    def stream(self) -> IO[bytes]:
        """The body as a file."""
        return self._response

    def patient(self) -> None:
        """Wait for what comes next as long as it takes."""
        self._socket.settimeout(None)

    def taken_over(self) -> Tuple[socket.socket, bytes]:
        """After an answer 101: the connection as bytes in both directions, not blocking, and what came already."""
        self._socket.setblocking(False)
        return self._socket, self._response.fp.peek()

    def close(self) -> None:
        self._response.close()
        self._connection.close()


class Engine:
    """The engine that listens at the socket `path`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def call(self, method: str, path: str, body: object = None, query: Query = None) -> Any:
        """What the engine answers, parsed; None where that has no body. Raises EngineAway, EngineRefused.

        `body` is sent as JSON, and bytes and a file as they are.
        """
        answer = self.open(method, path, body, query)
        try:
            data = answer.read()
        finally:
            answer.close()
        try:
            return json.loads(data) if data.strip() else None
        except ValueError as error:
            raise EngineAway(f"its answer is no JSON: {error}") from error

    def open(
        self,
        method: str,
        path: str,
        body: Any = None,
        query: Query = None,
        headers: Optional[Mapping[str, str]] = None,
        asked: Optional[Callable[[socket.socket], None]] = None,
    ) -> Answer:
        """The engine's answer, its body unread. Raises EngineAway, EngineRefused.

        `asked` is given the connection as soon as the request is sent: to shut it down makes whoever waits return.
        """
        sent = dict(headers or {})
        if isinstance(body, dict):
            sent["Content-Type"] = "application/json"
            body = json.dumps(body).encode("ascii")
        connection = _Connection(self.path)
        try:
            connection.request(method, quote(path) + ("?" + urlencode(query) if query else ""), body, sent)
            sock = connection.sock
            if asked is not None:
                asked(sock)
            response = connection.getresponse()
            answer = Answer(connection, sock, response)
            if response.status >= 300 and response.status != 304:
                message = _message(response.read(1 << 20))
                answer.close()
                raise EngineRefused(response.status, message)
            return answer
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise EngineAway(_said(error)) from error


def _message(body: bytes) -> str:
    try:
        message = str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        message = body.decode("utf-8", "replace")
    return " ".join(message.split())[:_MAX_MESSAGE].rstrip(".")


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
