"""CreateTask, GetTask, ListTasks and CancelTask of TES 1.1."""

from __future__ import annotations

import itertools
import json
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from tesapi.api.deps import body_within, caller, refuse_foreign_pages
from tesapi.errors import FieldProblem, InvalidDocument
from tesapi.store.base import TaskQuery
from tesapi.tasks import Tasks
from tesapi.tes.models import CanceledTask, CreatedTask, Task, TaskList, View, parse_document
from tesapi.tes.states import State

_TASK_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Task"}}},
    }
}
_VIEW = Query(description="MINIMAL: id and state. BASIC: all but contents, streams and system logs. FULL: everything.")
_SIZE = Query(ge=1, le=2047, description="Tasks per page, less than 2048.")
_TOKEN = Query(description="`next_page_token` of the page before, with the same filters.")
_NAME_PREFIX = Query(description="Tasks whose name begins with this text; no character has a special meaning.")
_STATE = Query(description="Tasks in this state.")
_TAG_KEY = Query(description="Tasks with a tag of this key; given more than once, with all of them.")
_TAG_VALUE = Query(description="The value for the `tag_key` at the same place; empty or missing, any value.")


def routes(tasks: Tasks, *, max_body_bytes: int, check_origin: bool) -> APIRouter:
    """The routes, for one prefix. With `check_origin`, foreign web pages cannot change anything."""
    router = APIRouter(tags=["TaskService"])

    @router.get("/tasks/{task_id}", operation_id="GetTask", responses={200: {"model": Task}})
    async def get_task(task_id: str, request: Request, view: Annotated[View, _VIEW] = View.MINIMAL) -> Response:
        return _json(await tasks.view(task_id, view, caller(request).owner))

    @router.post("/tasks", operation_id="CreateTask", responses={200: {"model": CreatedTask}}, openapi_extra=_TASK_BODY)
    async def create_task(request: Request) -> Response:
        if check_origin:
            refuse_foreign_pages(request)
        document = parse_document(await body_within(request, max_body_bytes))
        task_id = await tasks.create(document, caller(request).owner)
        return _json(b'{"id":"%s"}' % task_id.encode())

    @router.get("/tasks", operation_id="ListTasks", responses={200: {"model": TaskList}})
    async def list_tasks(
        request: Request,
        view: Annotated[View, _VIEW] = View.MINIMAL,
        page_size: Annotated[int, _SIZE] = 256,
        page_token: Annotated[str | None, _TOKEN] = None,
        name_prefix: Annotated[str, _NAME_PREFIX] = "",
        state: Annotated[State | None, _STATE] = None,
        tag_key: Annotated[list[str] | None, _TAG_KEY] = None,
        tag_value: Annotated[list[str] | None, _TAG_VALUE] = None,
    ) -> Response:
        query = TaskQuery(
            view=view,
            size=page_size,
            token=page_token or None,
            owner=caller(request).owner,
            name_prefix=name_prefix,
            state=state,
            tags=_zipped(tag_key or [], tag_value or []),
        )
        page = await tasks.find(query)
        token = b"" if page.next_token is None else b',"next_page_token":' + json.dumps(page.next_token).encode()
        return _json(b'{"tasks":[%s]%s}' % (b",".join(page.views), token))

    @router.post("/tasks/{task_id}:cancel", operation_id="CancelTask", responses={200: {"model": CanceledTask}})
    async def cancel_task(task_id: str, request: Request) -> Response:
        if check_origin:
            refuse_foreign_pages(request)
        await tasks.cancel(task_id, caller(request).owner)
        return _json(b"{}")

    return router


def _zipped(keys: list[str], values: list[str]) -> tuple[tuple[str, str], ...]:
    """The tags asked for; a key without a value fits any value."""
    if len(values) > len(keys):
        problem = FieldProblem("tag_value", f"is given {len(values)} times", f"as often as tag_key ({len(keys)} times)")
        raise InvalidDocument([problem])
    return tuple(itertools.zip_longest(keys, values, fillvalue=""))


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
