"""The operations of TES 1.1, as one small ASGI application.

A task is read in less time than a web framework takes to find out which function reads it; so these five operations
are found by hand, and answered with the bytes that the store has. `openapi.py` documents them.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from starlette.types import Receive, Scope, Send

from tesapi.api import parameters, problems, requests
from tesapi.security.identity import Identity
from tesapi.settings import Settings
from tesapi.tasks import Tasks
from tesapi.tes.models import parse_document

Headers = Mapping[bytes, bytes]
Caller = Callable[[Headers], Identity]


@dataclass(frozen=True, slots=True)
class _Request:
    """What an operation gets to see. `task_id` is empty where the path names none."""

    task_id: str
    query_string: bytes
    headers: Headers
    receive: Receive


_Operation = Callable[[_Request], Awaitable[bytes]]
_CANCEL = ":cancel"
_DESTINATIONS = b"destinations=true"


class TesOperations:
    """Answers requests for the paths of TES; `service_info` gives what is to be told then, with `destinations`."""

    def __init__(
        self, settings: Settings, tasks: Tasks, service_info: Callable[[], Mapping[str, object]], caller: Caller
    ) -> None:
        self._tasks = tasks
        self._service_info = service_info
        self._plain_service_info = json.dumps(
            {name: value for name, value in service_info().items() if name != "destinations"}
        ).encode()
        self._max_body_bytes = settings.server.max_body_mb << 20
        self._caller = caller
        self._of_all: dict[str, _Operation] = {
            "GET": self._list_tasks,
            "HEAD": self._list_tasks,
            "POST": self._create_task,
        }
        self._of_task: dict[str, _Operation] = {"GET": self._get_task, "HEAD": self._get_task}
        self._of_cancel: dict[str, _Operation] = {"POST": self._cancel_task}
        self._of_service: dict[str, _Operation] = {"GET": self._get_service_info, "HEAD": self._get_service_info}

    async def __call__(self, path: str, headers: Headers, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request for `path`, which is counted from behind the API's prefix."""
        try:
            operations, task_id = self._operations(path)
            operation = operations.get(scope["method"])
            if operation is None:
                await problems.other_method(scope["method"], operations)(scope, receive, send)
                return
            body = await operation(_Request(task_id, scope["query_string"], headers, receive))
        except requests.ClientGone:
            return
        except Exception as error:  # noqa: BLE001 - the outermost place: every error becomes an answer
            await problems.of_error(scope, error)(scope, receive, send)
            return
        start = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": start})
        await send({"type": "http.response.body", "body": body})

    def _operations(self, path: str) -> tuple[Mapping[str, _Operation], str]:
        if path == "/tasks":
            return self._of_all, ""
        # An early client asks below /tasks, where it would be taken for a task's id.
        if path in {"/service-info", "/tasks/service-info"}:
            return self._of_service, ""
        head, tasks, task_id = path.partition("/tasks/")
        if head or not tasks or "/" in task_id:
            raise problems.NothingThere
        if task_id.endswith(_CANCEL):
            return self._of_cancel, task_id.removesuffix(_CANCEL)
        return self._of_task, task_id

    async def _get_task(self, request: _Request) -> bytes:
        view = parameters.view(request.query_string)
        return await self._tasks.view(request.task_id, view, self._caller(request.headers).owner)

    async def _create_task(self, request: _Request) -> bytes:
        key = requests.idempotency_key(request.headers)
        body = await requests.json_body(request.headers, request.receive, self._max_body_bytes)
        task_id = await self._tasks.create(parse_document(body), self._caller(request.headers).owner, key=key)
        return b'{"id":"%s"}' % task_id.encode()

    async def _list_tasks(self, request: _Request) -> bytes:
        query = parameters.query(request.query_string, self._caller(request.headers).owner)
        page = await self._tasks.find(query)
        token = b"" if page.next_token is None else b',"next_page_token":' + json.dumps(page.next_token).encode()
        return b'{"tasks":[%s]%s}' % (b",".join(page.views), token)

    async def _cancel_task(self, request: _Request) -> bytes:
        # Whatever stands in its body is nobody's business: clients send nothing, an object, or their task.
        await self._tasks.cancel(request.task_id, self._caller(request.headers).owner)
        return b"{}"

    async def _get_service_info(self, request: _Request) -> bytes:
        # Only for who asks: py-tes refuses a service-info that has more fields than it knows.
        if _DESTINATIONS not in request.query_string.split(b"&"):
            return self._plain_service_info
        return json.dumps(self._service_info()).encode()
