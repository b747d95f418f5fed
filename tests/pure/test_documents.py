"""What clients post, what is wrong with it, and what of it each view shows."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from tesapi.errors import FieldProblem, InvalidDocument
from tesapi.tes import views
from tesapi.tes.events import (
    ExecutorEnded,
    ExecutorStarted,
    JobEnded,
    JobNoted,
    JobStarted,
    Noted,
    Outcome,
    OutputStored,
    Placed,
    Prepared,
    Reported,
)
from tesapi.tes.models import (
    Executor,
    FileType,
    Input,
    Output,
    Resources,
    Task,
    TaskDocument,
    View,
    parse_document,
)
from tesapi.tes.record import TaskRecord, apply
from tesapi.tes.states import State

CLIENTS = sorted((Path(__file__).parents[1] / "clients").glob("*.json"))
NOON = datetime(2026, 7, 1, 12, 0, 0, 0, UTC)
EXECUTOR = {"image": "alpine", "command": ["true"]}


def record_of(document: TaskDocument) -> TaskRecord:
    return TaskRecord(id="task-1", owner="ada", document=document, created=NOON)


def finished(document: TaskDocument) -> TaskRecord:
    record = record_of(document)
    for event in (
        Noted("Waiting.", NOON),
        Placed("job-1", "local", NOON),
        Prepared("job-1", {}),
        Reported("job-1", JobStarted(seq=1, at=NOON, event="started", host="node1")),
        Reported("job-1", ExecutorStarted(seq=2, at=NOON, event="executor_started", index=0, image_used="host")),
        Reported(
            "job-1",
            ExecutorEnded(seq=3, at=NOON, event="executor_ended", index=0, exit_code=0, stdout="héllo\n", stderr="\0"),
        ),
        Reported("job-1", OutputStored(seq=4, at=NOON, event="output", url="s3://b/o", path="/o", size_bytes=2**40)),
        Reported("job-1", JobNoted(seq=5, at=NOON, event="note", text="A note.")),
        Reported("job-1", JobEnded(seq=6, at=NOON, event="ended", outcome=Outcome.COMPLETE)),
    ):
        record = apply(record, event)
    return record


def shown(record: TaskRecord, view: View) -> dict[str, Any]:
    """The view as JSON; it has to be a task of the specification, without nulls."""
    text = views.render(record, view)
    if view is View.FULL:  # in BASIC, an input whose content is left out would seem to have no source
        Task.model_validate_json(text)
    answer: dict[str, Any] = json.loads(text)
    assert without_nulls(answer) == answer
    return answer


# What clients really post.


@pytest.mark.parametrize("client", CLIENTS, ids=lambda path: path.stem)
def test_what_a_client_posts_is_taken_and_shown_in_each_view(client: Path) -> None:
    posted = json.loads(client.read_text())
    document = parse_document(client.read_bytes())
    assert parse_document(document.model_dump_json(exclude_none=True).encode()) == document
    for record in (record_of(document), finished(document)):
        minimal, basic, full = (shown(record, view) for view in View)
        assert minimal == {"id": "task-1", "state": record.state.value}
        assert basic == without_what_only_full_has(full)
        ours = {name: full[name] for name in ("id", "state", "logs", "creation_time")}
        assert full == {**kept(posted), **ours}


def kept(posted: dict[str, Any]) -> dict[str, Any]:
    """What of a posted document is kept: all but nulls, at every level; `type` and whole cores are filled in."""
    document: dict[str, Any] = without_nulls(posted)
    for file in (*document.get("inputs", ()), *document.get("outputs", ())):
        file.setdefault("type", "FILE")
    return document


def without_nulls(value: Any) -> Any:
    match value:
        case dict():
            return {name: without_nulls(item) for name, item in value.items() if item is not None}
        case list():
            return [without_nulls(item) for item in value]
        case _:
            return value


def without_what_only_full_has(full: dict[str, Any]) -> dict[str, Any]:
    """BASIC has all but `ExecutorLog.stdout` and `.stderr`, `tesInput.content` and `tesTaskLog.system_logs`."""
    basic = dict(full)
    if "inputs" in full:
        basic["inputs"] = [{k: v for k, v in each.items() if k != "content"} for each in full["inputs"]]
    basic["logs"] = [
        {k: v for k, v in log.items() if k != "system_logs"}
        | {"logs": [{k: v for k, v in run.items() if k not in {"stdout", "stderr"}} for run in log["logs"]]}
        for log in full["logs"]
    ]
    return basic


def test_full_has_the_logs_of_each_executor_and_output() -> None:
    record = finished(parse_document(json.dumps({"executors": [EXECUTOR]}).encode()))
    assert shown(record, View.FULL) == {
        "id": "task-1",
        "state": "COMPLETE",
        "executors": [EXECUTOR],
        "logs": [
            {
                "logs": [
                    {
                        "start_time": "2026-07-01T12:00:00Z",
                        "end_time": "2026-07-01T12:00:00Z",
                        "stdout": "héllo\n",
                        "stderr": "\0",
                        "exit_code": 0,
                    }
                ],
                "metadata": {"destination": "local", "job_id": "job-1", "host": "node1", "image_used": "host"},
                "start_time": "2026-07-01T12:00:00Z",
                "end_time": "2026-07-01T12:00:00Z",
                "outputs": [{"url": "s3://b/o", "path": "/o", "size_bytes": "1099511627776"}],
                "system_logs": ["2026-07-01T12:00:00Z Waiting.", "2026-07-01T12:00:00Z A note."],
            }
        ],
        "creation_time": "2026-07-01T12:00:00Z",
    }


def test_an_executor_that_runs_has_the_exit_code_minus_one() -> None:
    record = record_of(parse_document(json.dumps({"executors": [EXECUTOR]}).encode()))
    for event in (
        Placed("job-1", "local", NOON),
        Prepared("job-1", {}),
        Reported("job-1", ExecutorStarted(seq=1, at=NOON, event="executor_started", index=0)),
    ):
        record = apply(record, event)
    (run,) = shown(record, View.BASIC)["logs"][0]["logs"]
    assert run == {"start_time": "2026-07-01T12:00:00Z", "exit_code": -1}


@pytest.mark.parametrize("view", [View.BASIC, View.FULL])
def test_logs_are_a_list_of_lists_also_for_a_task_that_was_never_started(view: View) -> None:
    record = record_of(parse_document(json.dumps({"executors": [EXECUTOR]}).encode()))
    assert shown(record, view)["logs"] == []
    (log,) = shown(apply(record, Noted("Waiting.", NOON)), view)["logs"]
    assert (log["logs"], log["outputs"]) == ([], [])


def test_system_logs_are_in_universal_time() -> None:
    record = record_of(parse_document(json.dumps({"executors": [EXECUTOR]}).encode()))
    noted = apply(record, Noted("Waiting.", NOON.astimezone(timezone(timedelta(hours=2)))))
    assert shown(noted, View.FULL)["logs"][0]["system_logs"] == ["2026-07-01T12:00:00Z Waiting."]


@pytest.mark.parametrize("task_id", ["nul\0inside", '"\\', "ü 😀", "\u2028"])
@pytest.mark.parametrize("view", View)
def test_any_id_is_valid_json(task_id: str, view: View) -> None:
    document = parse_document(json.dumps({"executors": [EXECUTOR]}).encode())
    record = TaskRecord(id=task_id, owner="ada", document=document, created=NOON)
    assert shown(record, view)["id"] == task_id


# What is looser than the specification, because clients are.


@pytest.mark.parametrize(
    ("given_cores", "kept_cores"), [(1, 1), (1.0, 1), (1.5, 2), ("2", 2), (0, 0), (0.1, 1), (2**31 - 1, 2**31 - 1)]
)
def test_fractions_of_a_core_are_rounded_up(given_cores: object, kept_cores: int) -> None:
    document = parse_document(json.dumps({"executors": [EXECUTOR], "resources": {"cpu_cores": given_cores}}).encode())
    assert document.resources is not None
    assert document.resources.cpu_cores == kept_cores


def test_nulls_and_unknown_fields_are_left_out() -> None:
    body = {
        "id": "mine",
        "state": "COMPLETE",
        "logs": [{"logs": None}],
        "creation_time": "yesterday",
        "vendor": {"x": [1]},
        "executors": [{**EXECUTOR, "env": {"A": None, "B": ""}, "workdir": "", "stdin": "", "vendor": 1}],
        "inputs": [{"path": "/a", "content": "", "url": None, "type": None, "name": None}],
        "tags": {"known": "yes", "unknown": None},
    }
    assert json.loads(parse_document(json.dumps(body).encode()).model_dump_json(exclude_none=True)) == {
        "executors": [{**EXECUTOR, "env": {"B": ""}, "workdir": "", "stdin": ""}],
        "inputs": [{"path": "/a", "content": "", "type": "FILE"}],
        "tags": {"known": "yes"},
    }


# What is wrong.

NO_URL = "a URL with a scheme, such as s3://bucket/key or file:///path, or an absolute path"
NO_PATH = "an absolute path, such as /data/file1"
NO_IMAGE = "the name of a container image, such as alpine or ubuntu:24.04"
NO_VARIABLE = "a name that is not empty and has no '='"
NO_NUL = "text without NUL characters"


def executor(**fields: object) -> dict[str, object]:
    return {"executors": [{**EXECUTOR, **fields}]}


def task(**fields: object) -> dict[str, object]:
    return {"executors": [EXECUTOR], **fields}


def file(**fields: object) -> list[dict[str, object]]:
    return [{"url": "s3://bucket/key", "path": "/data/file1", **fields}]


@pytest.mark.parametrize(
    ("body", "field", "problem", "allowed"),
    [
        ([], "the body", "is a list", "a JSON object"),
        (None, "the body", "is null", "a JSON object"),
        ("text", "the body", "is the string 'text'", "a JSON object"),
        ({}, "executors", "is missing", "a list of at least one executor"),
        ({"executors": []}, "executors", "is empty", "at least one element"),
        ({"executors": None}, "executors", "is null", "a list"),
        ({"executors": {}}, "executors", "is an object", "a list"),
        ({"executors": [EXECUTOR, None]}, "executors[1]", "is null", "a JSON object"),
        ({"executors": [{"command": ["a"]}]}, "executors[0].image", "is missing", "the name of a container image"),
        (
            {"executors": [{"image": "alpine"}]},
            "executors[0].command",
            "is missing",
            "a list of strings: the program and its arguments",
        ),
        (executor(command=[]), "executors[0].command", "is empty", "at least one element"),
        (executor(command="ls -l"), "executors[0].command", "is the string 'ls -l'", "a list"),
        (executor(command=["a", 1]), "executors[0].command[1]", "is 1", "a string"),
        (executor(command=["a", "\0"]), "executors[0].command[1]", "contains a NUL character", NO_NUL),
        (executor(image=""), "executors[0].image", "'' is not the name of an image", NO_IMAGE),
        (executor(image="-v"), "executors[0].image", "'-v' is not the name of an image", NO_IMAGE),
        (executor(image="a\nb"), "executors[0].image", "'a\\nb' is not the name of an image", NO_IMAGE),
        (executor(workdir="x"), "executors[0].workdir", "'x' is not absolute", NO_PATH),
        (executor(stdin="/a/../b"), "executors[0].stdin", "'/a/../b' contains '..'", "an absolute path without '..'"),
        (executor(stdout="/\0"), "executors[0].stdout", "contains a NUL character", NO_NUL),
        (executor(env=[]), "executors[0].env", "is a list", "a JSON object"),
        (executor(env={"A": 1}), "executors[0].env.A", "is 1", "a string"),
        (executor(env={"A": "\0"}), "executors[0].env.A", "contains a NUL character", NO_NUL),
        (executor(env={"A=B": "c"}), "executors[0].env.A=B", "'A=B' cannot name a variable", NO_VARIABLE),
        (executor(env={"": "c"}), "executors[0].env.", "'' cannot name a variable", NO_VARIABLE),
        (executor(ignore_error="maybe"), "executors[0].ignore_error", "is the string 'maybe'", "true or false"),
        (task(inputs={}), "inputs", "is an object", "a list"),
        (task(inputs=[{"path": "/a"}]), "inputs[0]", "has neither url nor content", "a url, or the content itself"),
        (task(inputs=[{"url": "/a"}]), "inputs[0].path", "is missing", "an absolute path in the container"),
        (task(inputs=file(url="x")), "inputs[0].url", "'x' is neither a URL nor an absolute path", NO_URL),
        (task(inputs=file(url="")), "inputs[0].url", "'' is neither a URL nor an absolute path", NO_URL),
        (task(inputs=file(url="s3:")), "inputs[0].url", "'s3:' is neither a URL nor an absolute path", NO_URL),
        (task(inputs=file(url="s3://a\nb")), "inputs[0].url", "contains a control character", NO_URL),
        (task(inputs=file(url="/a/..")), "inputs[0].url", "'/a/..' contains '..'", "an absolute path without '..'"),
        (task(inputs=file(path="a")), "inputs[0].path", "'a' is not absolute", NO_PATH),
        (task(inputs=file(path="//./")), "inputs[0].path", "'//./' is the root directory", "an absolute path below /"),
        (task(inputs=file(type="DIR")), "inputs[0].type", "is the string 'DIR'", "FILE or DIRECTORY"),
        (task(inputs=file(streamable=3)), "inputs[0].streamable", "is 3", "true or false"),
        (
            task(inputs=file(content="x", type="DIRECTORY")),
            "inputs[0]",
            "has content and the type DIRECTORY",
            "the type FILE where content is given",
        ),
        (task(outputs=[{"path": "/a"}]), "outputs[0].url", "is missing", "a URL or an absolute path"),
        (task(outputs=file(path_prefix="b")), "outputs[0].path_prefix", "'b' is not absolute", NO_PATH),
        (task(resources=[]), "resources", "is a list", "a JSON object"),
        (task(resources={"cpu_cores": -1}), "resources.cpu_cores", "is -1", "at least 0"),
        (task(resources={"cpu_cores": 2**31}), "resources.cpu_cores", "is 2147483648", "at most 2147483647"),
        (
            task(resources={"cpu_cores": 10**40}),
            "resources.cpu_cores",
            "is a number of more than 30 digits",
            "at most 2147483647",
        ),
        (task(resources={"cpu_cores": "many"}), "resources.cpu_cores", "is the string 'many'", "an integer"),
        (task(resources={"ram_gb": "lots"}), "resources.ram_gb", "is the string 'lots'", "a number"),
        (task(resources={"ram_gb": float("nan")}), "resources.ram_gb", "is nan", "a finite number"),
        (task(resources={"disk_gb": float("inf")}), "resources.disk_gb", "is inf", "a finite number"),
        (task(resources={"cpu_cores": float("inf")}), "resources.cpu_cores", "is inf", "a finite number"),
        (task(resources={"zones": "here"}), "resources.zones", "is the string 'here'", "a list"),
        (task(resources={"backend_parameters": {"a": 1}}), "resources.backend_parameters.a", "is 1", "a string"),
        (task(volumes=["/ok", "data"]), "volumes[1]", "'data' is not absolute", NO_PATH),
        (task(volumes=["/"]), "volumes[0]", "'/' is the root directory", "an absolute path below /"),
        (task(tags={"a": {"b": 1}}), "tags.a", "is an object", "a string"),
        (task(name=["x" * 100]), "name", "is a list", "a string"),
        (task(tags="x" * 100), "tags", f"is the string '{'x' * 60}…'", "a JSON object"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_allowed(body: object, field: str, problem: str, allowed: str) -> None:
    with pytest.raises(InvalidDocument) as caught:
        parse_document(json.dumps(body).encode())
    assert caught.value.problems == (FieldProblem(field, problem, allowed),)


def test_every_wrong_field_is_named() -> None:
    body = {"executors": [{"image": "", "command": []}], "volumes": ["data"], "tags": {"a": 1}}
    with pytest.raises(InvalidDocument) as caught:
        parse_document(json.dumps(body).encode())
    assert [problem.field for problem in caught.value.problems] == [
        "executors[0].image",
        "executors[0].command",
        "volumes[0]",
        "tags.a",
    ]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b'{"name": "\xff"}',
        b'{"name": "\\ud800", "executors": [{"image": "alpine", "command": ["true"]}]}',
        b"[" * 100_000,
        b'{"executors": []}{}',
    ],
)
def test_what_is_no_json_is_refused_with_the_place(body: bytes) -> None:
    with pytest.raises(InvalidDocument) as caught:
        parse_document(body)
    (problem,) = caught.value.problems
    assert (problem.field, problem.allowed) == ("the body", "one JSON object: a TES task")
    assert problem.problem.startswith("is not valid JSON: ")
    assert " at line 1 column " in problem.problem


# Anything at all.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


def some_of(model: type[BaseModel]) -> st.SearchStrategy[dict[str, object]]:
    return st.dictionaries(st.sampled_from(sorted(model.model_fields)), JSON, max_size=4)


@given(JSON, some_of(TaskDocument), some_of(Executor), some_of(Input), some_of(Output), some_of(Resources))
def test_any_json_is_a_document_or_refused_by_its_fields(
    anything: object, top: dict[str, object], step: object, source: object, target: object, resources: object
) -> None:
    bodies = [
        anything,
        task(**top),
        executor(**cast("dict[str, object]", step)),
        task(inputs=file(**cast("dict[str, object]", source)), outputs=file(**cast("dict[str, object]", target))),
        task(resources=resources),
    ]
    for body in bodies:
        answer = parsed(json.dumps(body).encode())
        if isinstance(answer, InvalidDocument):
            assert answer.problems
            assert all(problem.field and problem.problem and problem.allowed for problem in answer.problems)
            assert str(answer).encode()
        else:
            for view in View:
                shown(finished(answer), view)


def parsed(body: bytes) -> TaskDocument | InvalidDocument:
    try:
        return parse_document(body)
    except InvalidDocument as error:
        return error


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
ARGUMENT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
SEGMENT = st.text(st.characters(codec="utf-8", exclude_characters="\0/."), min_size=1, max_size=8)
PATH = st.lists(SEGMENT, min_size=1, max_size=4).map(lambda segments: "/" + "/".join(segments))
URL = PATH | PATH.map(lambda path: f"s3://bucket{path}").filter(lambda url: url.isprintable())
TYPE = st.sampled_from(FileType)
CORES = st.integers(0, 2**31 - 1)
GIGABYTES = st.floats(0, allow_infinity=False) | st.integers(0, 10**6)


def some(**fields: st.SearchStrategy[Any]) -> dict[str, st.SearchStrategy[Any]]:
    return fields


EXECUTORS = st.fixed_dictionaries(
    some(image=SEGMENT.filter(lambda image: image.isprintable() and not image.startswith("-")))
    | some(command=st.lists(ARGUMENT, min_size=1, max_size=4)),
    optional=some(workdir=PATH, stdin=PATH, stdout=PATH, stderr=st.just("") | PATH, ignore_error=st.booleans())
    | some(env=st.dictionaries(ARGUMENT.filter(lambda name: name and "=" not in name), ARGUMENT, max_size=3)),
)
NAMED = some(name=TEXT, description=TEXT)
INPUTS = st.fixed_dictionaries(
    some(url=URL, path=PATH, type=TYPE), optional=NAMED | some(streamable=st.booleans())
) | st.fixed_dictionaries(some(content=TEXT, path=PATH, type=st.just("FILE")), optional=NAMED | some(url=URL))
OUTPUTS = st.fixed_dictionaries(some(url=URL, path=PATH, type=TYPE), optional=NAMED | some(path_prefix=PATH))
RESOURCES = st.fixed_dictionaries(
    {},
    optional=some(cpu_cores=CORES, ram_gb=GIGABYTES, disk_gb=GIGABYTES, preemptible=st.booleans())
    | some(zones=st.lists(TEXT, max_size=3), backend_parameters=st.dictionaries(TEXT, TEXT, max_size=3))
    | some(backend_parameters_strict=st.booleans()),
)
DOCUMENTS = st.fixed_dictionaries(
    some(executors=st.lists(EXECUTORS, min_size=1, max_size=3)),
    optional=NAMED
    | some(inputs=st.lists(INPUTS, max_size=3), outputs=st.lists(OUTPUTS, max_size=3), resources=RESOURCES)
    | some(volumes=st.lists(PATH, max_size=3), tags=st.dictionaries(TEXT, TEXT, max_size=3)),
)


@given(DOCUMENTS)
def test_full_shows_what_was_posted_and_basic_all_but_contents(posted: dict[str, Any]) -> None:
    document = parse_document(json.dumps(posted).encode())
    assert parse_document(document.model_dump_json(exclude_none=True).encode()) == document
    full = shown(record_of(document), View.FULL)
    ours = {"id": "task-1", "state": State.QUEUED.value, "logs": [], "creation_time": "2026-07-01T12:00:00Z"}
    assert full == {**posted, **ours}
    assert shown(record_of(document), View.BASIC) == without_what_only_full_has(full)
    assert shown(record_of(document), View.MINIMAL) == {"id": "task-1", "state": "QUEUED"}


_RUN = {"image": "a", "command": ["b"]}


@pytest.mark.parametrize(
    "document",
    [
        {"executors": [0] * 1000},
        {"executors": [{"image": "a", "command": [0] * 1000}]},
        {"executors": [_RUN], "inputs": [{}] * 1000},
        {"executors": [_RUN], "volumes": ["x"] * 1000},
        {"executors": [_RUN], "tags": {str(number): 0 for number in range(1000)}},
        {"executors": [_RUN], "resources": {"zones": [0] * 1000}},
        {"executors": [{**_RUN, "env": {f"={number}": "" for number in range(1000)}}]},
        {"executors": [{**_RUN, "env": {str(number): "\0" for number in range(1000)}}]},
    ],
)
def test_however_much_is_wrong_the_answer_is_short(document: dict[str, object]) -> None:
    with pytest.raises(InvalidDocument) as caught:
        parse_document(json.dumps(document).encode())
    assert 1 <= len(caught.value.problems) <= 40
