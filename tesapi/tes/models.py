"""The TES 1.1 wire models: the document that a client sends, and the logs that it reads.

Source: the published OpenAPI document (task-execution-schemas 1.1.0). Where real clients are looser than it, so are
these: nulls stand for absent, unknown and read-only fields are ignored, a missing `type` is FILE, and a fractional
`cpu_cores` is rounded up.
"""

from __future__ import annotations

import itertools
import math
import re
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from tesapi.errors import FieldProblem, InvalidDocument
from tesapi.tes.states import State

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic_core import ErrorDetails

_INT32_MAX = 2**31 - 1
_MAX_WRONG = 20
# Of a list the first wrong element is told: a body may hold a million.
_FIRST_WRONG = Field(fail_fast=True)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:(?=.)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def _refuse(problem: str, allowed: str) -> PydanticCustomError:
    return PydanticCustomError("tes", "{problem}", {"problem": problem, "allowed": allowed})


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise _refuse("contains a NUL character", "text without NUL characters")
    return text


def _absolute(path: str) -> str:
    if not _no_nul(path).startswith("/"):
        raise _refuse(f"{path!r} is not absolute", "an absolute path, such as /data/file1")
    if ".." in path.split("/"):
        raise _refuse(f"{path!r} contains '..'", "an absolute path without '..'")
    return path


def _absolute_below_root(path: str) -> str:
    if not _absolute(path).strip("/."):
        raise _refuse(f"{path!r} is the root directory", "an absolute path below /")
    return path


def _absolute_or_empty(path: str) -> str:
    return _absolute(path) if path else path


def _url(url: str) -> str:
    if url.startswith("/"):
        return _absolute(url)
    allowed = "a URL with a scheme, such as s3://bucket/key or file:///path, or an absolute path"
    if not _SCHEME.match(url):
        raise _refuse(f"{url!r} is neither a URL nor an absolute path", allowed)
    if _CONTROL.search(url):
        raise _refuse("contains a control character", allowed)
    return url


def _image(image: str) -> str:
    if not image or image.startswith("-") or _CONTROL.search(image):
        raise _refuse(
            f"{image!r} is not the name of an image",
            "the name of a container image, such as alpine or ubuntu:24.04",
        )
    return image


def _variable(name: str) -> str:
    if not name or "=" in _no_nul(name):
        raise _refuse(f"{name!r} cannot name a variable", "a name that is not empty and has no '='")
    return name


def _without_nulls(value: object) -> object:
    # Cromwell sends null for values of tags and backend_parameters that it does not know.
    if not isinstance(value, dict):
        return value
    wrong = itertools.islice((k for k, v in value.items() if v is not None and not isinstance(v, str)), _MAX_WRONG)
    # Of what is refused anyway only so much is looked at: a body may hold a million wrong values.
    kept = list(wrong)
    names = kept if len(kept) == _MAX_WRONG else value
    return {name: value[name] for name in names if value[name] is not None}


def _few_wrong_variables(value: object) -> object:
    if not isinstance(value, dict):
        return value
    wrong = (k for k, v in value.items() if not k or "=" in k or "\0" in k or (isinstance(v, str) and "\0" in v))
    few = list(itertools.islice(wrong, _MAX_WRONG))
    return {name: value[name] for name in few} if len(few) == _MAX_WRONG else value


def _rounded_up(value: object) -> object:
    # TES 1.2 allows fractions of a core, and some clients send 1.0; 1.1 answers with integers.
    return math.ceil(value) if isinstance(value, float) and math.isfinite(value) else value


Text = Annotated[str, AfterValidator(_no_nul)]
Path = Annotated[str, AfterValidator(_absolute_below_root), Field(json_schema_extra={"pattern": "^/"})]
OptionalPath = Annotated[str, AfterValidator(_absolute_or_empty), Field(json_schema_extra={"pattern": "^(/|$)"})]
Url = Annotated[str, AfterValidator(_url), Field(json_schema_extra={"pattern": "^(/|[A-Za-z][A-Za-z0-9+.-]*:.)"})]


class FileType(StrEnum):
    """Whether an input or output is a file or a directory."""

    FILE = "FILE"
    DIRECTORY = "DIRECTORY"


FileTypeOrNull = Annotated[FileType, BeforeValidator(lambda value: FileType.FILE if value is None else value)]


class View(StrEnum):
    """How much of a task an answer holds."""

    MINIMAL = "MINIMAL"
    BASIC = "BASIC"
    FULL = "FULL"


class Wire(BaseModel):
    """Base of the wire models: frozen, tolerant of unknown fields, and without NaN or infinities."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Input(Wire):
    """A file that is there when the executors start: from a URL, or with literal `content`."""

    name: str | None = None
    description: str | None = None
    url: Url | None = None
    path: Path
    type: FileTypeOrNull = FileType.FILE
    content: str | None = None
    streamable: bool | None = None

    @model_validator(mode="after")
    def _has_a_source(self) -> Input:
        if self.url is None and self.content is None:
            raise _refuse("has neither url nor content", "a url, or the content itself")
        if self.content and self.type is FileType.DIRECTORY:
            raise _refuse("has content and the type DIRECTORY", "the type FILE where content is given")
        return self


class Output(Wire):
    """A file that is stored when the executors have ended."""

    name: str | None = None
    description: str | None = None
    url: Url
    path: Path
    path_prefix: OptionalPath | None = None
    type: FileTypeOrNull = FileType.FILE


class Resources(Wire):
    """What the task asks for; `ram_gb` and `disk_gb` in gigabytes of 10^9 bytes."""

    cpu_cores: Annotated[int, BeforeValidator(_rounded_up), Field(ge=0, le=_INT32_MAX)] | None = None
    preemptible: bool | None = None
    ram_gb: Annotated[float, Field(ge=0)] | None = None
    disk_gb: Annotated[float, Field(ge=0)] | None = None
    zones: Annotated[tuple[str, ...], _FIRST_WRONG] | None = None
    backend_parameters: Annotated[dict[str, str], BeforeValidator(_without_nulls)] | None = None
    backend_parameters_strict: bool | None = None


class Executor(Wire):
    """One command in one container. `command` is an argument list and never goes through a shell."""

    image: Annotated[str, AfterValidator(_image)]
    command: Annotated[tuple[Text, ...], _FIRST_WRONG, Field(min_length=1)]
    workdir: OptionalPath | None = None
    stdin: OptionalPath | None = None
    stdout: OptionalPath | None = None
    stderr: OptionalPath | None = None
    env: (
        Annotated[
            dict[Annotated[str, AfterValidator(_variable)], Text],
            BeforeValidator(_without_nulls),
            BeforeValidator(_few_wrong_variables),
        ]
        | None
    ) = None
    ignore_error: bool | None = None


class TaskDocument(Wire):
    """What a client hands over with CreateTask."""

    name: str | None = None
    description: str | None = None
    inputs: Annotated[tuple[Input, ...], _FIRST_WRONG] | None = None
    outputs: Annotated[tuple[Output, ...], _FIRST_WRONG] | None = None
    resources: Resources | None = None
    executors: Annotated[tuple[Executor, ...], _FIRST_WRONG, Field(min_length=1)]
    volumes: Annotated[tuple[Path, ...], _FIRST_WRONG] | None = None
    tags: Annotated[dict[str, str], BeforeValidator(_without_nulls)] | None = None


class ExecutorLog(Wire):
    """What became of one executor. `exit_code` is -1 until it has ended."""

    start_time: datetime | None = None
    end_time: datetime | None = None
    stdout: str | None = None
    stderr: str | None = None
    exit_code: int


class OutputFileLog(Wire):
    """One stored file; `size_bytes` is a string, as the specification has it."""

    url: str
    path: str
    size_bytes: str


class TaskLog(Wire):
    """The log of one attempt at a task."""

    logs: tuple[ExecutorLog, ...] = ()
    metadata: dict[str, str] | None = None
    start_time: datetime | None = None
    end_time: datetime | None = None
    outputs: tuple[OutputFileLog, ...] = ()
    system_logs: tuple[str, ...] | None = None


class Task(TaskDocument):
    """A task as it is answered; what MINIMAL and BASIC leave out is absent there."""

    id: str
    state: State
    logs: tuple[TaskLog, ...] | None = None
    creation_time: datetime | None = None


class TaskState(Wire):
    """A task in the MINIMAL view. The published document forgets that this view has no executors."""

    id: str
    state: State


class TaskListOfStates(Wire):
    """A page of tasks in the MINIMAL view; without a token it is the last one."""

    tasks: tuple[TaskState, ...]
    next_page_token: str | None = None


class TaskList(Wire):
    """A page of tasks; without a token it is the last one."""

    tasks: tuple[Task, ...]
    next_page_token: str | None = None


class CreatedTask(Wire):
    """The answer to CreateTask."""

    id: str


def parse_document(body: bytes) -> TaskDocument:
    """The document in the JSON text `body`. Raises InvalidDocument, which names each wrong field."""
    try:
        return TaskDocument.model_validate_json(body)
    except ValidationError as error:
        found = [details for details in error.errors(include_url=False) if not _is_echo(details)]
        raise InvalidDocument([_field_problem(details) for details in found]) from error


def _is_echo(details: ErrorDetails) -> bool:
    """Whether a list is only called too short because its elements are wrong, which is told of each of them."""
    return details["type"] == "too_short" and bool(details["input"])


def _field_problem(details: ErrorDetails) -> FieldProblem:
    kind, context, given = details["type"], details.get("ctx", {}), details["input"]
    field = _field_path(details["loc"]) or "the body"
    if kind == "json_invalid":
        return FieldProblem("the body", f"is not valid JSON: {context['error']}", "one JSON object: a TES task")
    if kind == "tes":
        return FieldProblem(field, str(context["problem"]), str(context["allowed"]))
    if kind == "missing":
        return FieldProblem(field, "is missing", _ALLOWED_WHERE_MISSING.get(str(details["loc"][-1]), "a value"))
    if kind == "too_short":
        return FieldProblem(field, "is empty", "at least one element")
    if kind in {"model_type", "model_attributes_type", "dict_type", "dataclass_type"}:
        return FieldProblem(field, f"is {_shown(given)}", "a JSON object")
    allowed = _ALLOWED_BY_TYPE.get(kind) or _allowed_by_bound(kind, context)
    return FieldProblem(field, f"is {_shown(given)}", allowed or details["msg"])


_ALLOWED_WHERE_MISSING = {
    "executors": "a list of at least one executor",
    "command": "a list of strings: the program and its arguments",
    "image": "the name of a container image",
    "path": "an absolute path in the container",
    "url": "a URL or an absolute path",
}
_ALLOWED_BY_TYPE = {
    "string_type": "a string",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "int_parsing_size": f"an integer of at most {_INT32_MAX}",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "tuple_type": "a list",
    "list_type": "a list",
    "string_unicode": "text in UTF-8",
}


def _allowed_by_bound(kind: str, context: Mapping[str, Any]) -> str | None:
    match kind:
        case "greater_than_equal":
            return f"at least {context['ge']}"
        case "less_than_equal":
            return f"at most {context['le']}"
        case "enum":
            return str(context["expected"]).replace("'", "")
        case _:
            return None


def _field_path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        if part == "[key]":
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _shown(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case dict():
            return "an object"
        case list() | tuple():
            return "a list"
        case str():
            return f"the string {value[:60] + '…' if len(value) > 60 else value!r}"
        case _:
            return (
                str(value) if not isinstance(value, int) or abs(value) < 10**30 else "a number of more than 30 digits"
            )
