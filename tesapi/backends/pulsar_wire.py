"""Pulsar's REST interface, as its server 0.16 really answers.

Everything but an upload's bytes travels in the query, the token too; JSON comes as text/html; a file that is not there
is a 500; an error of the operating system closes the connection without an answer; an unknown job is `lost`.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from tesapi.backends.health import Health
from tesapi.errors import BackendUnavailable

CONNECTIONS = 4
"""A Pulsar answers with four threads; more connections only wait in front of them."""

_OLDEST = (0, 15)
_TERMINAL = frozenset({"complete", "failed", "cancelled", "lost"})


class PulsarRefused(Exception):
    """Pulsar answered, and did not do it; it hardly ever says why."""


@dataclass(frozen=True, slots=True)
class PulsarAddress:
    """Where a Pulsar is and how to be let in. `token` is secret; `ca` and `certificate` are PEM files.

    `certificate` is for a proxy in front of it that asks its clients for one.
    """

    name: str
    url: str
    manager: str = ""
    token: str = ""
    ca: Path | None = None
    certificate: Path | None = None
    timeout_s: float = 30.0

    @property
    def base(self) -> str:
        """The URL below which the manager's routes lie."""
        root = self.url.rstrip("/")
        return f"{root}/managers/{quote(self.manager, safe='')}" if self.manager else root


@dataclass(frozen=True, slots=True)
class JobSetUp:
    """What Pulsar says when it has made a job's folder; `job_id` may be another one than was asked for."""

    job_id: str
    directory: str


@dataclass(frozen=True, slots=True)
class JobStatus:
    """What Pulsar knows of a job. The streams are there once it is over, and may lack their middle."""

    status: str
    returncode: int | None = None
    stdout: str = ""
    stderr: str = ""
    gone: bool = False
    """Whether Pulsar sees no folder of the job."""

    @property
    def over(self) -> bool:
        """Whether Pulsar will do nothing more about it, as far as it knows."""
        return self.status in _TERMINAL


def parse_status(answer: Mapping[str, Any]) -> JobStatus:
    """A status as it comes over REST and over a message queue. Raises ValueError where it is none."""
    status, code = answer.get("status"), answer.get("returncode")
    if not isinstance(status, str):
        raise ValueError(f"a status that is no text ({type(status).__name__})")  # noqa: TRY004 - it is of the wire
    streams = (answer.get("job_stdout"), answer.get("job_stderr"))
    stdout, stderr = (stream if isinstance(stream, str) else "" for stream in streams)
    # `lost` is also said, with all that there is in the folder, of a job that Pulsar ran before it was restarted.
    gone = status == "lost" and not answer.get("job_directory_contents")
    return JobStatus(status, code if isinstance(code, int) else None, stdout, stderr, gone)


class PulsarServer:
    """A client of one manager of one Pulsar. An async context manager.

    Raises BackendUnavailable where no answer can be had, naming the destination and never its token, and PulsarRefused
    where the answer is an error.
    """

    def __init__(self, address: PulsarAddress, health: Health) -> None:
        self.address = address
        self._health = health
        self._stack = AsyncExitStack()
        self.requests = 0

    async def __aenter__(self) -> Self:
        limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
        self._client = await self._stack.enter_async_context(
            httpx.AsyncClient(
                verify=_trust(self.address),
                timeout=httpx.Timeout(self.address.timeout_s, pool=None),
                limits=limits,
                follow_redirects=False,
                trust_env=False,
            )
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def version(self) -> str:
        """Which Pulsar it is; also tells whether the token and the manager are right."""
        answer = await self._json("GET", "/healthz", {})
        return str(answer.get("version", "unknown"))

    async def set_up(self, job_id: str) -> JobSetUp:
        """Make the job's folder; fine to repeat."""
        answer = await self._json("POST", "/jobs", {"job_id": job_id})
        try:
            return JobSetUp(str(answer["job_id"]), str(answer["job_directory"]))
        except KeyError as error:
            raise PulsarRefused(f"the answer to a set-up has no {error}") from error

    async def upload(self, job_id: str, kind: str, name: str, data: bytes) -> None:
        """Write a file below the job's folder, over one that is there; `kind` is Pulsar's type of path."""
        await self._call("POST", f"/jobs/{_id(job_id)}/files", {"name": name, "type": kind}, data)

    async def submit(self, job_id: str, command_line: str) -> None:
        """Have the job run. Only one call at a time may be under way for a job: Pulsar would run it twice.

        No answer does not mean that it does not run: it is to be asked for.
        """
        await self._call("POST", f"/jobs/{_id(job_id)}/submit", {"command_line": command_line}, b"", repeat=False)

    async def status(self, job_id: str) -> JobStatus:
        """What has become of the job."""
        answer = await self._json("GET", f"/jobs/{_id(job_id)}/status", {})
        try:
            return parse_status(answer)
        except ValueError as error:
            raise PulsarRefused(str(error)) from error

    async def status_if_told(self, job_id: str) -> JobStatus | None:
        """The same; None where Pulsar cannot say it, as when there is a byte in a stream that is no text."""
        try:
            return await self.status(job_id)
        except PulsarRefused:
            return None

    async def metadata(self, job_id: str, name: str) -> bytes | None:
        """A file of the job's metadata folder, also while it is being written; None where there is none (yet)."""
        query = {"name": name, "type": "output_metadata"}
        try:
            return await self._call("GET", f"/jobs/{_id(job_id)}/files", query)
        except PulsarRefused:
            return None

    async def cancel(self, job_id: str) -> None:
        """Kill the job's processes, where Pulsar knows of any."""
        await self._call("PUT", f"/jobs/{_id(job_id)}/cancel", {})

    async def delete(self, job_id: str) -> None:
        """Remove the job's folder; its processes are not touched."""
        await self._call("DELETE", f"/jobs/{_id(job_id)}", {})

    async def _json(self, method: str, path: str, query: Mapping[str, str]) -> dict[str, Any]:
        text = await self._call(method, path, query)
        try:
            answer = json.loads(text)
        except ValueError as error:
            raise PulsarRefused("the answer is not JSON; is it a Pulsar?") from error
        if not isinstance(answer, dict):
            raise PulsarRefused("the answer is not a JSON object; is it a Pulsar?")
        return answer

    async def _call(
        self, method: str, path: str, query: Mapping[str, str], data: bytes | None = None, *, repeat: bool = True
    ) -> bytes:
        """One request; once more where a connection that was kept turned out to be closed, and that is harmless."""
        try:
            return await self._once(method, path, query, data)
        except _Disconnected:
            if not repeat:
                raise
            return await self._once(method, path, query, data)

    async def _once(self, method: str, path: str, query: Mapping[str, str], data: bytes | None) -> bytes:
        private = {"private_token": self.address.token} if self.address.token else {}
        began = time.monotonic()
        self.requests += 1
        try:
            answer = await self._client.request(
                method, self.address.base + path, params={**query, **private}, content=data
            )
        except asyncio.CancelledError:
            raise
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as error:
            self._health.failed(f"it broke the connection off ({_said(error)})")
            raise _Disconnected(f"{self._who} broke the connection off.") from error
        except httpx.ConnectTimeout as error:
            raise self._away(f"no connection within {self.address.timeout_s:g} s", error) from error
        except httpx.TimeoutException as error:
            raise self._away(f"no answer within {self.address.timeout_s:g} s", error) from error
        except AttributeError as error:
            # anyio asks a connection for its peer's name, and trips where that was closed at the very same moment.
            raise self._away("it closed the connection at once", error) from error
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise self._away(_said(error), error) from error
        self._health.answered(time.monotonic() - began)
        if answer.status_code == 200:
            return answer.content
        if answer.status_code == 401:
            raise NotLetIn(f"{self._who} does not accept the token (private_token).")
        if answer.status_code in {502, 503, 504}:
            raise self._away(f"a proxy in front of it answers {answer.status_code}", None)
        raise PulsarRefused(f"{method} {_shown(path)} was answered with {answer.status_code}")

    def _away(self, why: str, error: Exception | None) -> BackendUnavailable:
        self._health.failed(why)
        problem = BackendUnavailable(f"{self._who} does not answer: {why}.")
        problem.__cause__ = error
        return problem

    @property
    def _who(self) -> str:
        return f"{self.address.name} ({shown_url(self.address.url)})"


class NotLetIn(BackendUnavailable):
    """The token is wrong."""


class _Disconnected(BackendUnavailable):
    """The connection was closed without an answer: by a server that went down, or by an error inside of it."""


def shown_url(url: str) -> str:
    """A URL without what may be secret in it."""
    parts = httpx.URL(url)
    return str(parts.copy_with(userinfo=b"", query=None, fragment=None)).rstrip("/")


def too_old(version: str) -> bool:
    """Whether a Pulsar of this version speaks another dialect."""
    numbers = version.split(".")[:2]
    return all(n.isdigit() for n in numbers) and tuple(int(n) for n in numbers) < _OLDEST


def _trust(address: PulsarAddress) -> ssl.SSLContext | bool:
    if not address.url.startswith("https"):
        return False
    context = ssl.create_default_context(cafile=None if address.ca is None else str(address.ca))
    if address.certificate is not None:
        context.load_cert_chain(str(address.certificate))
    return context


def _id(job_id: str) -> str:
    return quote(job_id, safe="")


def _shown(path: str) -> str:
    return path.split("?", 1)[0]


def _said(error: Exception) -> str:
    # httpx quotes no URL in these, but for invalid ones.
    return type(error).__name__ if isinstance(error, httpx.InvalidURL) else str(error) or type(error).__name__
