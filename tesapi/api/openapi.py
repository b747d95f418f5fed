"""/openapi.json: the operations of TES as this server has them, with every answer, and examples that work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from tesapi.api.parameters import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE, MAX_TAGS
from tesapi.api.problems import MEDIA_TYPE
from tesapi.settings import Settings
from tesapi.tes.models import CreatedTask, Task, TaskDocument, TaskList, TaskListOfStates, TaskState, View
from tesapi.tes.states import State

Json = dict[str, Any]

_REF = "#/components/schemas/{model}"
_MODELS = (TaskDocument, CreatedTask, Task, TaskState, TaskList, TaskListOfStates)
_TAG = "TaskService"
_TASK_ID = "019c3a52-7d0c-7a41-8f5e-2b8c1d9e0f11"


def add_tes(document: Json, settings: Settings, service_info: Mapping[str, Any], prefix: str) -> None:
    """Add the operations below `prefix`, and what they speak of, to an OpenAPI document."""
    _, schemas = models_json_schema(
        [(model, "validation") for model in _MODELS], ref_template=_REF, title="Schemas of TES"
    )
    parts = document.setdefault("components", {})
    parts.setdefault("schemas", {}).update(schemas["$defs"] | {"Problem": _PROBLEM, "ServiceInfo": _SERVICE_INFO})
    parts["responses"] = _PROBLEMS
    if settings.server.root_path:
        document["servers"] = [{"url": settings.server.root_path}]
    ours: Json = {
        "/service-info": {"get": _get_service_info(service_info)},
        "/tasks": {"get": _LIST_TASKS, "post": _create_task(examples(settings))},
        "/tasks/{id}": {"get": _GET_TASK},
        "/tasks/{id}:cancel": {"post": _CANCEL_TASK},
    }
    document["paths"] = {f"{prefix}{path}": operations for path, operations in ours.items()} | document["paths"]


def examples(settings: Settings) -> Json:
    """Tasks that run on this server as they stand."""
    hello: Json = {
        "name": "hello",
        "executors": [{"image": "alpine", "command": ["cat", "/in/greeting.txt"]}],
        "inputs": [{"path": "/in/greeting.txt", "content": "Hello from a task.\n"}],
        "tags": {"project": "demo"},
    }
    found: Json = {"hello": {"summary": "Prints a text that came with it", "value": hello}}
    if settings.file_roots:
        stored: Json = {
            "name": "count",
            "executors": [
                {
                    "image": "alpine",
                    "command": ["sh", "-c", "wc -w < /in/words.txt > /out/count.txt"],
                    "workdir": "/tmp",  # noqa: S108 - of the container
                    "env": {"LC_ALL": "C"},
                }
            ],
            "inputs": [{"path": "/in/words.txt", "content": "one two three\n"}],
            "outputs": [{"path": "/out/count.txt", "url": f"file://{settings.file_roots[0]}/example/count.txt"}],
            "resources": {"cpu_cores": 1, "ram_gb": 0.1},
        }
        found["count"] = {"summary": "Stores an output file", "value": stored}
    return found


def _answers(schema: Json, description: str, example: Any, problems: Sequence[int]) -> Json:
    content = {"application/json": {"schema": schema, "example": example}}
    return {
        "200": {"description": description, "content": content},
        **{str(status): {"$ref": f"#/components/responses/{_PROBLEM_NAMES[status]}"} for status in problems},
    }


def _ref(name: str) -> Json:
    return {"$ref": _REF.format(model=name)}


_PROBLEM_NAMES = {
    400: "InvalidRequest",
    403: "ForeignPage",
    404: "NotFound",
    405: "OtherMethod",
    409: "KeyReused",
    413: "BodyTooLong",
    421: "ForeignHost",
    429: "QueueFull",
    500: "ServerFailed",
    503: "StoreUnavailable",
}
_PROBLEM: Json = {
    "title": "Problem",
    "description": "What is wrong, in a sentence, and field by field where fields are wrong (RFC 9457).",
    "type": "object",
    "required": ["status", "title", "detail"],
    "properties": {
        "status": {"type": "integer"},
        "title": {"type": "string"},
        "detail": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["field", "problem", "allowed"],
                "properties": {
                    "field": {"type": "string", "description": "As in `executors[0].command[2]`."},
                    "problem": {"type": "string"},
                    "allowed": {"type": "string"},
                },
            },
        },
    },
}


def _problem(status: int, description: str, title: str, detail: str, **more: Any) -> Json:
    example = {"status": status, "title": title, "detail": detail, **more}
    return {"description": description, "content": {MEDIA_TYPE: {"schema": _ref("Problem"), "example": example}}}


_RETRY_AFTER = {"Retry-After": {"description": "Seconds until it is worth asking again.", "schema": {"type": "string"}}}
_ALLOW = {"Allow": {"description": "The methods that the path has.", "schema": {"type": "string"}}}
_PROBLEMS: Json = {
    "InvalidRequest": _problem(
        400,
        "The body or a parameter is wrong; nothing was stored.",
        "Bad Request",
        "executors: is missing (allowed: a list of at least one executor)",
        errors=[{"field": "executors", "problem": "is missing", "allowed": "a list of at least one executor"}],
    ),
    "ForeignPage": _problem(
        403,
        "A web page of elsewhere that `server.cors_origins` does not list.",
        "Forbidden",
        "Pages of 'https://evil.example' may not make changes here.",
    ),
    "NotFound": _problem(
        404, "There is no such task, or it is somebody else's.", "Not Found", f"There is no task '{_TASK_ID}'."
    ),
    "OtherMethod": {
        **_problem(
            405,
            "The path has no such method.",
            "Method Not Allowed",
            "PUT is not possible here; these are: GET, HEAD, POST, OPTIONS.",
        ),
        "headers": _ALLOW,
    },
    "KeyReused": _problem(
        409,
        "The Idempotency-Key was sent before, with another task; nothing was stored.",
        "Conflict",
        f"The Idempotency-Key 'run-7' was sent before with another task, and stands for {_TASK_ID}: a new task needs a"
        " new key.",
    ),
    "BodyTooLong": _problem(
        413,
        "The body is longer than `server.max_body_mb`; nothing was stored.",
        "Request Entity Too Large",
        "The body is longer than 8388608 bytes, which is as much as server.max_body_mb allows.",
    ),
    "ForeignHost": _problem(
        421,
        "Asked for by a name that `server.allowed_hosts` does not list.",
        "Misdirected Request",
        "This server is not 'evil.example'; server.allowed_hosts lists the names that it goes by.",
    ),
    "QueueFull": {
        **_problem(
            429,
            "As many tasks are queued as `server.max_queued_tasks` allows; nothing was stored.",
            "Too Many Requests",
            "As many tasks are queued as server.max_queued_tasks allows, 10000: send it again later.",
        ),
        "headers": _RETRY_AFTER,
    },
    "ServerFailed": _problem(
        500,
        "A mistake of this server.",
        "Internal Server Error",
        "The server failed on this request; its log says why.",
    ),
    "StoreUnavailable": {
        **_problem(
            503,
            "The store does not answer; nothing was changed.",
            "Service Unavailable",
            "The database tesapi.db did not take it: database or disk is full.",
        ),
        "headers": _RETRY_AFTER,
    },
}


def _text(**more: Any) -> Json:
    return {"type": "string", **more}


_SERVICE_INFO: Json = {
    "title": "ServiceInfo",
    "description": "GA4GH service-info 1.0, with the fields of TES.",
    "type": "object",
    "required": ["id", "name", "type", "organization", "version", "storage"],
    "properties": {
        "id": _text(),
        "name": _text(),
        "type": {
            "type": "object",
            "required": ["group", "artifact", "version"],
            "properties": {"group": _text(), "artifact": _text(const="tes"), "version": _text()},
        },
        "description": _text(),
        "organization": {
            "type": "object",
            "required": ["name", "url"],
            "properties": {"name": _text(), "url": _text(format="uri")},
        },
        "contactUrl": _text(format="uri"),
        "documentationUrl": _text(format="uri"),
        "createdAt": _text(format="date-time"),
        "updatedAt": _text(format="date-time"),
        "environment": _text(),
        "version": _text(),
        "storage": {"type": "array", "items": _text(), "description": "Where URLs of tasks may lead."},
        "tesResources_backend_parameters": {"type": "array", "items": _text()},
        "destinations": {
            "type": "array",
            "description": "An addition of this server: the places where tasks run, and how they are.",
            "items": {"$ref": "#/components/schemas/DestinationCondition"},
        },
    },
}


def _parameter(name: str, description: str, schema: Json) -> Json:
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


_VIEW = _parameter(
    "view",
    "MINIMAL: id and state. BASIC: all but contents of inputs, streams and system logs. FULL: everything.",
    {"type": "string", "enum": [view.value for view in View], "default": View.MINIMAL.value},
)
_ID: Json = {
    "name": "id",
    "in": "path",
    "required": True,
    "description": "The task's id, as CreateTask gave it.",
    "schema": {"type": "string", "minLength": 1},
}
_IDEMPOTENCY_KEY: Json = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": (
        "A name for this one wish, so that it can be sent again when its answer was lost: the same key of the same user"
        " gives the id of the same task. It is kept as long as the task is."
    ),
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
}
_STATE = {"id": _TASK_ID, "state": "COMPLETE"}


def _get_service_info(service_info: Mapping[str, Any]) -> Json:
    return {
        "tags": [_TAG],
        "operationId": "GetServiceInfo",
        "summary": "What this server is",
        "description": "Its name, its version, where files may lie, and which backend_parameters it knows.",
        "parameters": [
            _parameter("destinations", "Also tell where tasks run, and how it is there.", {"type": "boolean"}),
        ],
        "responses": _answers(_ref("ServiceInfo"), "This server.", dict(service_info), [405, 421, 500]),
    }


def _create_task(task_examples: Json) -> Json:
    return {
        "tags": [_TAG],
        "operationId": "CreateTask",
        "summary": "Have a task run",
        "description": (
            "The answer comes when the task is stored durably, and before it starts. Fields that the specification"
            " does not have, and those that only a server sets, are ignored; null is as good as absent."
        ),
        "parameters": [_IDEMPOTENCY_KEY],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _ref("TaskDocument"), "examples": task_examples}},
        },
        "responses": _answers(
            _ref("CreatedTask"), "The new task's id.", {"id": _TASK_ID}, [400, 403, 405, 409, 413, 421, 429, 500, 503]
        ),
    }


_GET_TASK: Json = {
    "tags": [_TAG],
    "operationId": "GetTask",
    "summary": "One task",
    "parameters": [_ID, _VIEW],
    "responses": _answers(
        {"anyOf": [_ref("Task"), _ref("TaskState")]}, "The task.", _STATE, [400, 404, 405, 421, 500, 503]
    ),
}
_CANCEL_TASK: Json = {
    "tags": [_TAG],
    "operationId": "CancelTask",
    "summary": "Have a task end",
    "description": "A body is ignored. A task that has ended stays as it is; asking again changes nothing.",
    "parameters": [_ID],
    "responses": _answers(
        {"type": "object", "description": "Nothing."}, "It ends, or has ended.", {}, [403, 404, 405, 421, 500, 503]
    ),
}
_LIST_TASKS: Json = {
    "tags": [_TAG],
    "operationId": "ListTasks",
    "summary": "Tasks, newest first",
    "description": "All filters have to fit. Pages neither skip nor repeat a task while others are created.",
    "parameters": [
        _VIEW,
        _parameter(
            "page_size",
            "Tasks per page, less than 2048.",
            {"type": "integer", "minimum": 1, "maximum": MAX_PAGE_SIZE, "default": DEFAULT_PAGE_SIZE},
        ),
        _parameter("page_token", "`next_page_token` of the page before, with the same filters.", _text()),
        _parameter(
            "name_prefix", "Tasks whose name begins with this text; no character has a special meaning.", _text()
        ),
        _parameter("state", "Tasks in this state.", _text(enum=[state.value for state in State])),
        _parameter(
            "tag_key",
            "Tasks with a tag of this key; given more than once, with all of them.",
            {"type": "array", "items": _text(), "maxItems": MAX_TAGS},
        ),
        _parameter(
            "tag_value",
            "The value for the `tag_key` at the same place; empty or missing, any value.",
            {"type": "array", "items": _text(), "maxItems": MAX_TAGS},
        ),
    ],
    "responses": _answers(
        {"anyOf": [_ref("TaskList"), _ref("TaskListOfStates")]},
        "A page; without `next_page_token` it is the last one.",
        {"tasks": [_STATE]},
        [400, 405, 421, 500, 503],
    ),
}
