"""Files on web servers, http and https: GET and PUT, over connections that are checked and never waited for in vain.

One request, one connection. Every hop of a redirect is judged as the first one. A download that breaks off goes on
where it was, if the server says that the file is the same; where it cannot say, from the start.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import time
from email.utils import parsedate_to_datetime
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional, Sequence, Set

from .addresses import Policy, literal
from .base import StorageFailure, StoredFile, shown
from .web_url import WebUrl, parse
from .wire import Failed, Patience, Wire, dial

_CHUNK = 256 << 10
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 10
_BUSY = (408, 429, 502, 503, 504)
_LONGEST_WAIT_S = 60.0
_GB = 1_000_000_000
_LOOK_AT_DISK_EVERY = 64 << 20
_WORTH_MORE_TRIES = 16 << 20
_COMPRESSED = (".gz", ".tgz", ".bgz", ".svgz", ".z", ".br", ".zst", ".bz2")

Check = Callable[[], None]


class Limits(NamedTuple):
    """What a job's document may say of http; see docs/storage.md."""

    deny_networks: Sequence[str] = ()
    connect_s: float = 20.0
    stall_s: float = 120.0
    min_bytes_s: float = 1000.0
    max_gb: Optional[float] = None
    keep_free_gb: float = 1.0
    tries: int = 5
    backoff_s: float = 0.5


class _Answer(NamedTuple):
    url: WebUrl
    response: http.client.HTTPResponse
    wire: Wire
    heard_all: bool


class HttpStorage:
    """`settings` are Limits as a table."""

    def __init__(self, settings: Dict[str, Any]) -> None:
        self._download: Optional[_Download] = None
        self._limits = Limits(**settings)
        self._policy = Policy(self._limits.deny_networks)
        self._patience = Patience(self._limits.connect_s, self._limits.stall_s, self._limits.min_bytes_s)

    def unsupported(self, url: str, operation: str) -> Optional[str]:
        try:
            parsed = parse(url)
        except ValueError as error:
            return f"{shown(url)}: {error}."
        objection = self._policy.objection_to(literal(parsed.host, parsed.port))
        if objection is not None:
            return f"{shown(url)}: the host {parsed.host} is refused: {objection}."
        if operation == "get_directory":
            return f"{shown(url)}: web servers have no directories; each file needs an input of its own."
        return None

    @property
    def total(self) -> Optional[int]:
        return None if self._download is None else self._download.size

    def get(self, url: str, path: str, check: Check) -> None:
        try:
            target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except OSError as error:
            raise StorageFailure(f"{shown(url)} cannot be staged in: {error.strerror}.") from error
        try:
            download = self._download = _Download(target, url, self._limits)

            def attempt() -> None:
                with self._ask("GET", parse(url), download.headers(), None, check) as answer:
                    download.take(answer)

            self._insist(attempt, f"{shown(url)} cannot be read", check, download.is_worth_more_tries)
        finally:
            os.close(target)

    def make_folder(self, url: str) -> None:
        pass

    def put(self, path: str, url: str, check: Check) -> StoredFile:
        try:
            source = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError as error:
            raise StorageFailure(f"{shown(url)} cannot be written: {error.strerror}.") from error
        try:
            size = os.fstat(source).st_size

            def attempt() -> None:
                with self._ask("PUT", parse(url), {"Content-Length": str(size)}, (source, size), check) as answer:
                    _expect(answer, 200, 201, 202, 204)
                    if not answer.heard_all:
                        raise Failed("the server accepted it before it had all of it")

            self._insist(attempt, f"{shown(url)} cannot be written", check, lambda: False)
        finally:
            os.close(source)
        return StoredFile(shown(url), size)

    def _insist(self, attempt: Callable[[], None], complaint: str, check: Check, more: Callable[[], bool]) -> None:
        """Try until it succeeds, or there is no point any more; `more` says that the tries are counted anew."""
        tries = 0
        while True:
            try:
                attempt()
                return
            except Failed as failed:
                tries = 1 if more() else tries + 1
                if not failed.again or tries >= self._limits.tries:
                    raise StorageFailure(f"{complaint}: {failed}.") from failed
                pause_s = max(failed.wait_s, self._limits.backoff_s * 2 ** (tries - 1))
            except ValueError as error:  # of `parse`, for which `unsupported` has been asked
                raise StorageFailure(f"{complaint}: {error}.") from error
            _sleep(min(pause_s, _LONGEST_WAIT_S), check)

    @contextlib.contextmanager
    def _ask(
        self, method: str, url: WebUrl, headers: Dict[str, str], body: Optional[tuple[int, int]], check: Check
    ) -> Iterator[_Answer]:
        """The answer of the server that redirects lead to."""
        seen: Set[str] = set()
        while True:
            if url.text in seen:
                raise Failed("it redirects in a ring")
            if len(seen) > _MOST_REDIRECTS:
                raise Failed(f"it redirects more than {_MOST_REDIRECTS} times")
            seen.add(url.text)
            try:
                with self._exchange(method, url, headers, body, check) as answer:
                    if answer.response.status not in _REDIRECTS:
                        yield answer
                        return
                    following = _redirect(answer, method)
            except Failed as failed:
                if len(seen) == 1:
                    raise
                clause = f"it redirects to {shown(url.text)}, and there {failed}"
                raise Failed(clause, again=failed.again, wait_s=failed.wait_s) from failed
            url = following

    @contextlib.contextmanager
    def _exchange(
        self, method: str, url: WebUrl, headers: Dict[str, str], body: Optional[tuple[int, int]], check: Check
    ) -> Iterator[_Answer]:
        """One request and the head of its answer."""
        wire = dial(url.host, url.port, self._policy, self._patience, check)
        try:
            if url.scheme == "https":
                wire.secure(url.host)
            wire.say(_head(method, url, headers))
            heard_all = body is None or wire.send_file(*body)
            wire.answer_within_stall_s()
            yield _Answer(url, _response(wire, method), wire, heard_all)
        except http.client.RemoteDisconnected as error:
            raise Failed("the server closed the connection without an answer", again=True) from error
        except http.client.IncompleteRead as error:
            raise Failed("the server broke off in the middle of the file", again=True) from error
        except (http.client.HTTPException, ValueError) as error:
            raise Failed(f"the server does not speak HTTP ({type(error).__name__})") from error
        finally:
            wire.hang_up()


class _Download:
    """One file on its way to the descriptor `target`, over as many answers as it takes. `size` is known with one."""

    def __init__(self, target: int, url: str, limits: Limits) -> None:
        self._target = target
        self._url = url
        self._limits = limits
        self._have = 0
        self._most = 0
        self.size: Optional[int] = None
        self._validator: Optional[str] = None

    def headers(self) -> Dict[str, str]:
        """What to ask for: the rest where that is possible, else everything."""
        if not self._have or self._validator is None:
            return {}
        return {"Range": f"bytes={self._have}-", "If-Range": self._validator}

    def is_worth_more_tries(self) -> bool:
        """Whether there is much more of the file than when this was last true."""
        if self._have < self._most + _WORTH_MORE_TRIES:
            return False
        self._most = self._have
        return True

    def take(self, answer: _Answer) -> None:
        """Write what the server sends. Raises Failed, and StorageFailure where it is ours."""
        response = answer.response
        asked = bool(self.headers())
        if asked and response.status == 416:
            self._have, self._validator = 0, None
            raise Failed("the server has less than it sent before", again=True)
        _expect(answer, 200, *((206,) if asked else ()))
        _refuse_coding(answer)
        announced = _length(response)
        if response.status == 206:
            self._continue(response, announced)
        else:
            self._begin(response, announced)
        self._read(answer)

    def _begin(self, response: http.client.HTTPResponse, announced: Optional[int]) -> None:
        self._have, self.size = 0, announced
        with self._our_own():
            os.ftruncate(self._target, 0)
            os.lseek(self._target, 0, os.SEEK_SET)
        self._validator = None
        if response.getheader("Accept-Ranges", "").strip().lower() != "none" and announced is not None:
            self._validator = _validator(response)

    def _continue(self, response: http.client.HTTPResponse, announced: Optional[int]) -> None:
        """What begins where we are, and is of the file that we have begun. Anything else is begun anew."""
        validator, self._validator = self._validator, None
        expected = f"bytes {self._have}-{(self.size or 0) - 1}/{self.size}"
        if (response.getheader("Content-Range") or "").strip().replace("bytes=", "bytes ") != expected:
            raise Failed("the server sends another part of the file than it was asked for", again=True)
        if announced is not None and announced != (self.size or 0) - self._have:
            raise Failed("the server contradicts itself on the size of the file", again=True)
        if _validator(response) not in (None, validator):
            raise Failed("the file changed while it was read", again=True)
        self._validator = validator

    def _read(self, answer: _Answer) -> None:
        wire, response, size = answer.wire, answer.response, self.size
        if size is not None:
            self._refuse_size(size)
        wire.flow()
        looked = self._have
        buffer = memoryview(bytearray(_CHUNK))  # one for all: fresh memory costs more than what is copied there
        while size is None or self._have < size:
            if response.chunked:
                data = memoryview(response.read1(_CHUNK))
            else:
                most = _CHUNK if size is None else min(_CHUNK, size - self._have)
                data = wire.take(buffer[:most])
            if not data:
                break
            if size is None and self._have + len(data) >= looked:
                looked = self._have + _LOOK_AT_DISK_EVERY
                self._refuse_size(looked)
            self._write(data)
            wire.moved(len(data))
        if size is None:
            return
        if self._have < size:
            raise Failed(f"the server broke off after {self._have} of {size} bytes", again=True)
        if not response.chunked and wire.has_more(1.0 if response.will_close else 0.05):
            raise Failed(f"the server sends more than the {size} bytes that it announced")

    def _write(self, data: memoryview) -> None:
        if self._limits.max_gb is not None and self._have + len(data) > self._limits.max_gb * _GB:
            raise Failed(f"it is larger than {self._limits.max_gb:g} GB (storage.http.max_gb)")
        self._have += len(data)
        with self._our_own():
            while data:
                data = data[os.write(self._target, data) :]

    def _refuse_size(self, size: int) -> None:
        """Raise where a file of `size` bytes would be too much, of which we have a part already."""
        if self.size is not None and self._limits.max_gb is not None and size > self._limits.max_gb * _GB:
            raise Failed(f"it is larger than {self._limits.max_gb:g} GB (storage.http.max_gb)")
        with self._our_own():
            disk = os.fstatvfs(self._target)
        if size - self._have > disk.f_bavail * disk.f_frsize - self._limits.keep_free_gb * _GB:
            how_large = "it has no end, and" if self.size is None else f"it has {size} bytes, and"
            raise Failed(f"{how_large} would fill the disk, of which {self._limits.keep_free_gb:g} GB are kept free")

    @contextlib.contextmanager
    def _our_own(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageFailure(f"{shown(self._url)} cannot be staged in: {error.strerror}.") from error


def _head(method: str, url: WebUrl, headers: Dict[str, str]) -> bytes:
    fields = {"Host": url.authority, "User-Agent": "tesapi", "Accept": "*/*", "Accept-Encoding": "identity"}
    if url.authorization is not None:
        fields["Authorization"] = url.authorization
    fields.update(headers)
    fields["Connection"] = "close"
    lines = [f"{method} {url.target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode("ascii")


def _response(wire: Wire, method: str) -> http.client.HTTPResponse:
    """The head of the answer that counts: those before it say that there will be one."""
    while True:
        response = http.client.HTTPResponse(wire, method=method)  # type: ignore[arg-type]
        response.begin()
        if response.status >= 200:
            return response
        response.fp = None  # type: ignore[assignment] # the stream goes on


def _expect(answer: _Answer, *statuses: int) -> None:
    status = answer.response.status
    if status not in statuses:
        # The number's name, not the server's words: nobody knows what is in them.
        said = f"the server answers {status} {http.client.responses.get(status, '')}".rstrip()
        raise Failed(said, again=status in _BUSY, wait_s=_retry_after(answer.response))


def _retry_after(response: http.client.HTTPResponse) -> float:
    said = (response.getheader("Retry-After") or "").strip()
    if said.isdecimal():
        return min(float(said), _LONGEST_WAIT_S)
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except (TypeError, ValueError, IndexError, OverflowError):
        return 0.0


def _redirect(answer: _Answer, method: str) -> WebUrl:
    status = answer.response.status
    if method == "PUT" and status not in (307, 308):
        _expect(answer)
    location = answer.response.getheader("Location")
    if not location:
        raise Failed(f"the server answers {status} without saying where to go")
    try:
        location = location.encode("latin-1").decode("utf-8", "surrogateescape")
        return answer.url.moved_to(location)
    except ValueError as error:
        raise Failed(f"it redirects to {shown(location)}, where it cannot be followed: {error}") from error


def _refuse_coding(answer: _Answer) -> None:
    """A file that is something.gz is often called encoded; any other is not the file while it is encoded."""
    coding = answer.response.getheader("Content-Encoding", "identity").strip().lower()
    if coding not in ("", "identity") and not answer.url.path.lower().endswith(_COMPRESSED):
        raise Failed("the server sends it compressed (Content-Encoding), which it was not asked for")
    if not answer.response.chunked and answer.response.getheader("Transfer-Encoding", "identity").lower() != "identity":
        raise Failed("the server sends it in a Transfer-Encoding that it was not asked for")


def _length(response: http.client.HTTPResponse) -> Optional[int]:
    said = {text.strip() for text in response.headers.get_all("Content-Length", ())}
    if response.chunked or not said:
        return None
    text = said.pop()
    if said or not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise Failed("the server announces no size that makes sense (Content-Length)")
    return int(text)


def _validator(response: http.client.HTTPResponse) -> Optional[str]:
    """What tells whether a file is still the same: a strong ETag, else when it was modified."""
    tag = (response.getheader("ETag") or "").strip()
    if tag.isascii() and tag.startswith('"') and tag.endswith('"') and len(tag) > 1:
        return tag
    date = (response.getheader("Last-Modified") or "").strip()
    return date if date.isascii() and date else None


def _sleep(seconds: float, check: Check) -> None:
    due = time.monotonic() + seconds
    while True:
        check()
        left = due - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(left, 0.2))
