"""A TCP proxy that stands between a service and what it needs, and fails as networks do."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")

_CHUNK_BYTES = 64 << 10
_REQUEST = re.compile(rb"([A-Z]+) ([^ ?\r\n]*)[^ \r\n]* HTTP/1\.1\r\n")
_LONGEST_REQUEST_LINE = 128 << 10


class Proxy:
    """Takes connections at `port` of loopback for `target` ("host:port", or a URL). Faults last until `heal`.

    `connections` counts what was taken; `requests` are the HTTP requests that were seen, as "METHOD /path".
    """

    def __init__(self, target: str) -> None:
        split = urlsplit(target if "//" in target else f"//{target}")
        assert split.hostname is not None
        assert split.port is not None
        self._target = split.hostname, split.port
        self._url = split
        self.port = 0
        self.connections = 0
        self.requests: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._open: set[_Connection] = set()
        self._flowing = asyncio.Event()
        self._answer_bytes_left: int | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        self._in_loop(self._listen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._in_loop(self._refuse)
        self._in_loop(self._leave)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        """The target's URL with this proxy in its place."""
        userinfo = self._url.netloc.rpartition("@")[0]
        return self._url._replace(netloc=f"{userinfo}@127.0.0.1:{self.port}".lstrip("@")).geturl()

    def start(self) -> None:
        """The same as `heal`."""
        self.heal()

    def stop(self) -> None:
        """The same as `cut`."""
        self.cut()

    def cut(self) -> None:
        """Drop every connection, and refuse new ones."""
        self._in_loop(self._refuse)

    def drop(self) -> None:
        """Drop every connection; new ones are taken."""
        self._in_loop(self._drop)

    def stall(self) -> None:
        """Take connections and pass nothing on, in neither direction."""
        self._in_loop(self._pause)

    def reset_after(self, answer_bytes: int) -> None:
        """Pass so many more bytes of answers on, then reset the connection, and each that has an answer after it."""
        self._in_loop(self._limit, answer_bytes)

    def heal(self) -> None:
        """No faults any more. What was stalled goes on."""
        self._in_loop(self._listen)

    def count(self, pattern: str) -> int:
        """How many of the requests match a regular expression."""
        return sum(re.search(pattern, request) is not None for request in list(self.requests))

    def _in_loop(self, call: Callable[..., Coroutine[Any, Any, T]], *arguments: object) -> T:
        return asyncio.run_coroutine_threadsafe(call(*arguments), self._loop).result(timeout=10)

    async def _listen(self) -> None:
        self._answer_bytes_left = None
        self._flowing.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._drop()

    async def _drop(self) -> None:
        for connection in list(self._open):
            connection.reset()

    async def _leave(self) -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for child in left:
            child.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _pause(self) -> None:
        self._flowing.clear()

    async def _limit(self, answer_bytes: int) -> None:
        self._answer_bytes_left = answer_bytes

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connection = _Connection(writer)
        self._open.add(connection)
        try:
            await self._flowing.wait()
            upstream_reader, upstream = await asyncio.open_connection(*self._target)
            connection.upstream = upstream
            async with asyncio.TaskGroup() as children:
                children.create_task(self._pass_requests(reader, upstream))
                children.create_task(self._pass_answers(upstream_reader, connection))
        except* (OSError, asyncio.IncompleteReadError):
            connection.reset()
        finally:
            self._open.discard(connection)
            connection.close()

    async def _pass_requests(self, reader: asyncio.StreamReader, upstream: asyncio.StreamWriter) -> None:
        seen = b""
        while data := await reader.read(_CHUNK_BYTES):
            await self._flowing.wait()
            seen = self._note_requests(seen + data)
            upstream.write(data)
            await upstream.drain()
        with contextlib.suppress(OSError):
            upstream.write_eof()

    def _note_requests(self, text: bytes) -> bytes:
        end = 0
        for match in _REQUEST.finditer(text):
            self.requests.append(f"{match[1].decode()} {match[2].decode()}")
            end = match.end()
        return text[max(end, len(text) - _LONGEST_REQUEST_LINE) :]

    async def _pass_answers(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            await self._flowing.wait()
            if self._answer_bytes_left is not None:
                passed = data[: self._answer_bytes_left]
                self._answer_bytes_left -= len(passed)
                if len(passed) < len(data):
                    connection.writer.write(passed)
                    await connection.writer.drain()
                    raise ConnectionResetError
            connection.writer.write(data)
            await connection.writer.drain()
        with contextlib.suppress(OSError):
            connection.writer.write_eof()


class _Connection:
    """Both ends of one connection."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.upstream: asyncio.StreamWriter | None = None

    def reset(self) -> None:
        """End it with a reset, on both sides."""
        for end in (self.writer, self.upstream):
            if end is not None:
                raw = end.get_extra_info("socket")
                with contextlib.suppress(OSError):
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.transport.abort()

    def close(self) -> None:
        for end in (self.writer, self.upstream):
            if end is not None:
                end.close()
