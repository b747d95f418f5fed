"""TES over HTTP, as any TES server speaks it. What goes wrong is told in one sentence, without secrets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, unquote, urlencode, urlsplit

import httpx

from tesapi.cli.exits import (
    AnswerLost,
    ClientProblem,
    NotFound,
    NotPermitted,
    Refused,
    ServerFailed,
    Unreachable,
    UsageProblem,
)
from tesapi.cli.show import plain
from tesapi.cli.tasks import Task

DEFAULT_URL = "http://localhost:8080"

_BASES = ("/ga4gh/tes/v1", "/v1", "")
_TIMEOUT = httpx.Timeout(30, connect=10)
_MAX_DETAIL = 600
_PAGE = 256

_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError, httpx.UnsupportedProtocol)


class Client:
    """A TES server, found by TES_URL: the server's address, with or without the path of its API.

    The path is looked for by asking; a request that changes something is sent once, and only when the path is known.
    Every method raises Unreachable, ServerFailed, NotPermitted and Refused.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._url, user, password = _address(environ.get("TES_URL", "").strip() or DEFAULT_URL)
        self.shown = plain(self._url)
        token = environ.get("TES_TOKEN", "").strip()
        if not (token.isascii() and token.isprintable()):
            raise UsageProblem("TES_TOKEN has characters in it that no token has.")
        headers = {"Accept": "application/json", "User-Agent": "tesapi"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        auth = httpx.BasicAuth(user, password) if not token and (user or password) else None
        try:
            self._http = httpx.Client(headers=headers, auth=auth, timeout=_TIMEOUT)
        except (ValueError, ImportError, httpx.InvalidURL) as error:
            raise UsageProblem(f"The proxy that the environment names cannot be used: {plain(str(error))}") from error
        self._base: str | None = None
        self._info: dict[str, Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def connect(self) -> None:
        """Find the API below the address. Asked again, it does nothing."""
        if self._base is not None:
            return
        candidates = [self._url + base for base in _BASES]
        if self._url.endswith(_BASES[:2]):
            candidates.insert(0, candidates.pop())
        first_problem: ClientProblem | None = None
        for path, is_it in (("/service-info", _is_service_info), ("/tasks?page_size=1", _is_list)):
            for base in candidates:
                try:
                    found = self._look(base + path)
                except (NotPermitted, ServerFailed) as problem:
                    first_problem = first_problem or problem
                    continue
                if found is not None and is_it(found):
                    self._base = base
                    self._info = found if is_it is _is_service_info else {}
                    return
        if first_problem is not None:
            raise first_problem
        raise ServerFailed(f"What answers at {self.shown} is no TES server; TES_URL says which one to use.")

    def _look(self, url: str) -> dict[str, Any] | None:
        """The JSON object there, or None where there is something else."""
        answer = self._send("GET", url)
        if answer.is_redirect:
            # Not followed: the credentials are for the server that was named.
            where = plain(_without_credentials(answer.headers.get("Location", "")))
            raise ServerFailed(f"{self.shown} leads on to {where}: set TES_URL to the server itself.")
        if answer.status_code in (401, 403) or answer.status_code >= 500:
            raise self._problem(answer)
        return _object(answer) if answer.status_code == 200 else None

    def service_info(self) -> dict[str, Any]:
        """What the server tells of itself; empty where it has no service-info."""
        self.connect()
        return dict(self._info or {})

    def destinations(self) -> list[Any]:
        """The places where the server runs tasks, as it tells of them. Raises ServerFailed where it does not."""
        self.connect()
        found = self._json("GET", "/service-info?destinations=true").get("destinations")
        if not isinstance(found, list):
            raise ServerFailed(f"{self.shown} does not tell of its destinations.")
        return found

    def create(self, document: Mapping[str, Any]) -> str:
        """Have a task made; its id. Sent once: raises AnswerLost where it is not known whether the task was made."""
        self.connect()
        body = self._json("POST", "/tasks", json.dumps(document))
        task_id = body.get("id")
        if not isinstance(task_id, str) or not task_id:
            raise AnswerLost(f"{self.shown} took the task and did not tell its id; tesapi list shows the tasks.")
        return task_id

    def get(self, task_id: str, view: str = "FULL") -> Task:
        """A task. Raises NotFound."""
        path = f"/tasks/{_segment(task_id)}?view={view}"
        self.connect()
        return self._json("GET", path)

    def cancel(self, task_id: str) -> None:
        """Ask for a task to be canceled. Raises NotFound."""
        path = f"/tasks/{_segment(task_id)}:cancel"
        self.connect()
        self._json("POST", path, "")

    def find(
        self, *, view: str, state: str, name_prefix: str, tags: Sequence[tuple[str, str]], limit: int
    ) -> Iterator[Task]:
        """The tasks that fit, page by page, and at most `limit` of them unless that is 0."""
        self.connect()
        query: list[tuple[str, str]] = [("view", view)]
        query += [("state", state)] if state else []
        query += [("name_prefix", name_prefix)] if name_prefix else []
        query += [part for key, value in tags for part in (("tag_key", key), ("tag_value", value))]
        left, token, seen = limit, "", set[str]()
        while True:
            size = min(left, _PAGE) if limit else _PAGE
            page = [*query, ("page_size", str(size)), *([("page_token", token)] if token else [])]
            body = self._json("GET", f"/tasks?{urlencode(page)}")
            for task in body.get("tasks") or []:
                if isinstance(task, dict) and _fits(task, state, name_prefix, tags):
                    yield task
                    left -= 1
                    if limit and not left:
                        return
            token = body.get("next_page_token") or ""
            if not token or token in seen:
                return
            seen.add(token)

    def _json(self, method: str, path: str, body: str | None = None) -> dict[str, Any]:
        answer = self._send(method, f"{self._base}{path}", body)
        if not answer.is_success:
            raise self._problem(answer)
        found = _object(answer)
        if found is None and path.endswith(":cancel"):
            return {}  # some servers say nothing at all
        if found is None:
            kind = AnswerLost if method == "POST" else ServerFailed
            raise kind(f"{self.shown} answers {method} {plain(path)} with something that is no TES answer.")
        return found

    def _send(self, method: str, url: str, body: str | None = None) -> httpx.Response:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            return self._http.request(method, url, content=body, headers=headers)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError) as error:
            raise UsageProblem(f"TES_URL {self.shown} is not a URL of a server: {plain(str(error))}.") from error
        except httpx.RequestError as error:
            reason = _reason(error)
            if method == "GET" or isinstance(error, _NOT_SENT):
                hint = "" if self._base else " TES_URL says which server to use."
                raise Unreachable(f"No TES server answers at {self.shown}: {reason}.{hint}") from error
            raise AnswerLost(
                f"The request was sent to {self.shown} once, and its answer was lost ({reason}): it may have been done "
                f"or not; look with tesapi list before sending it again."
            ) from error

    def _problem(self, answer: httpx.Response) -> ClientProblem:
        status = answer.status_code
        detail = _detail(answer)
        ending = f": {detail}" if detail else "."
        if status in (401, 403):
            known = "authorization" in answer.request.headers
            hint = "the credentials that were sent do not do" if known else "set TES_TOKEN"
            return NotPermitted(f"{self.shown} does not permit it ({status}; {hint}){ending}")
        if status == 404:
            return NotFound(detail or f"{self.shown} has no such task.")
        if status == 429 or status >= 500:
            return ServerFailed(f"{self.shown} failed ({status}){ending}")
        return Refused(f"{self.shown} refused it ({status}){ending}")


def _address(text: str) -> tuple[str, str, str]:
    """TES_URL without credentials and trailing slashes, the user and the password. Raises UsageProblem."""
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        fine = False
    if not fine or parts.query or parts.fragment or plain(url) != url:
        # It is not quoted: where it cannot be read, a password in it cannot be hidden.
        raise UsageProblem(f"TES_URL is to be the http or https address of a server, such as {DEFAULT_URL}.")
    netloc = parts.netloc.rpartition("@")[2]
    address = f"{parts.scheme}://{netloc}{parts.path.rstrip('/')}"
    return address, unquote(parts.username or ""), unquote(parts.password or "")


def _without_credentials(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", url).partition("?")[0]


def _segment(task_id: str) -> str:
    if not task_id or task_id in (".", ".."):
        raise UsageProblem(f"{task_id!r} is not the id of a task.")
    return quote(task_id, safe="", errors="surrogateescape")


def _object(answer: httpx.Response) -> dict[str, Any] | None:
    try:
        found = answer.json()
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_service_info(found: Mapping[str, Any]) -> bool:
    kind = found.get("type")
    artifact = kind.get("artifact") if isinstance(kind, dict) else None
    # Servers of TES 1.0 tell no type; another GA4GH service would tell another one.
    return str(artifact).lower() == "tes" if artifact else bool(found.keys() & {"storage", "name", "doc", "id"})


def _is_list(found: Mapping[str, Any]) -> bool:
    return isinstance(found.get("tasks"), list)


def _fits(task: Task, state: str, name_prefix: str, tags: Sequence[tuple[str, str]]) -> bool:
    """Whether a task is one of those that were asked for; not every server knows the filters."""
    if state and task.get("state") != state:
        return False
    if set(task) <= {"id", "state"}:
        return True  # the MINIMAL view does not tell the rest
    found = task.get("tags")
    found = found if isinstance(found, dict) else {}
    return str(task.get("name") or "").startswith(name_prefix) and all(
        key in found and value in ("", found[key]) for key, value in tags
    )


def _detail(answer: httpx.Response) -> str:
    """What the server says about it; empty where it says nothing that could be read."""
    found = _object(answer) or {}
    texts = [found.get(key) for key in ("detail", "message", "msg", "error", "title")]
    text = next((text for text in texts if isinstance(text, str) and text), "")
    if not text and answer.headers.get("Content-Type", "").startswith("text/plain"):
        text = answer.text
    text = plain(text).strip()
    return text if len(text) <= _MAX_DETAIL else text[:_MAX_DETAIL] + "…"


def _reason(error: httpx.RequestError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "it takes too long"
    text = re.sub(r"^\[(Errno|SSL)[^\]]*\] *", "", str(error)) or type(error).__name__
    return plain(text).strip().rstrip(".")
