"""The OpenAPI document: valid, complete, and with examples that work as they stand."""

from __future__ import annotations

import asyncio
import json
import pathlib
from typing import Any

import httpx
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator, validate
from pydantic import TypeAdapter

from tesapi import __version__
from tesapi.api.service_info import service_info
from tesapi.settings import load
from tesapi.tes.models import CreatedTask, Task, TaskList, TaskListOfStates, TaskState, parse_document

OPERATIONS = {"GetServiceInfo", "GetTask", "CreateTask", "ListTasks", "CancelTask", "Livez", "Readyz"}
ANSWERS = {
    "CreateTask": TypeAdapter(CreatedTask),
    "GetTask": TypeAdapter(Task | TaskState),
    "ListTasks": TypeAdapter(TaskList | TaskListOfStates),
}
SETTLED = {"COMPLETE", "EXECUTOR_ERROR", "SYSTEM_ERROR", "CANCELED"}


@pytest.fixture
async def document(client: httpx.AsyncClient) -> dict[str, Any]:
    return dict((await client.get("http://localhost/openapi.json")).json())


def _operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["operationId"]: one for path in document["paths"].values() for one in path.values()}


async def test_the_document_is_valid_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    validate(document, cls=OpenAPIV31SpecValidator)


async def test_it_has_every_operation_with_every_answer(document: dict[str, Any]) -> None:
    operations = _operations(document)
    assert set(operations) == OPERATIONS
    for name in OPERATIONS - {"Livez", "Readyz"}:
        answers = operations[name]["responses"]
        assert {"200", "405", "421", "500"} <= set(answers)
        assert all("problem+json" in str(_problem(document, answers[code])) for code in answers if code != "200")
    assert {"400", "403", "409", "413", "429", "503"} <= set(operations["CreateTask"]["responses"])
    assert {"400", "404", "503"} <= set(operations["GetTask"]["responses"])
    (key,) = operations["CreateTask"]["parameters"]
    assert (key["name"], key["in"], key["required"]) == ("Idempotency-Key", "header", False)


def _problem(document: dict[str, Any], answer: dict[str, str]) -> object:
    return document["components"]["responses"][answer["$ref"].rpartition("/")[2]]


async def test_its_examples_of_answers_are_what_the_models_say(document: dict[str, Any]) -> None:
    for name, model in ANSWERS.items():
        content = _operations(document)[name]["responses"]["200"]["content"]["application/json"]
        model.validate_json(json.dumps(content["example"]))
    info = _operations(document)["GetServiceInfo"]["responses"]["200"]["content"]["application/json"]
    assert set(info["schema"]) == {"$ref"}
    assert info["example"]["type"]["artifact"] == "tes"


async def test_its_examples_of_tasks_run_as_they_stand(client: httpx.AsyncClient, document: dict[str, Any]) -> None:
    examples = _operations(document)["CreateTask"]["requestBody"]["content"]["application/json"]["examples"]
    assert set(examples) == {"hello", "count"}
    told = {}
    for name, example in examples.items():
        parse_document(json.dumps(example["value"]).encode())
        task_id = (await client.post("/tasks", json=example["value"])).json()["id"]
        while (task := (await client.get(f"/tasks/{task_id}?view=FULL")).json())["state"] not in SETTLED:
            await asyncio.sleep(0.02)
        assert task["state"] == "COMPLETE", task["logs"]
        told[name] = task
    assert told["hello"]["logs"][0]["logs"][0]["stdout"] == "Hello from a task.\n"
    stored = pathlib.Path(told["count"]["outputs"][0]["url"].removeprefix("file://"))
    assert stored.read_text("ascii").strip() == "3"


async def test_service_info_is_what_the_operator_says_and_what_the_server_can(tmp_path: pathlib.Path) -> None:
    environ = {
        "TESAPI_SERVICE_INFO__ID": "org.example.tes",
        "TESAPI_SERVICE_INFO__ORGANIZATION_URL": "https://example.org/us",
        "TESAPI_SERVICE_INFO__CONTACT_URL": "mailto:tes@example.org",
        "TESAPI_SERVICE_INFO__ENVIRONMENT": "test",
        "TESAPI_STORAGE__FILE__ROOTS": '["/data/in", "/data/out"]',
    }
    assert service_info(load(environ=environ, cwd=tmp_path).settings, []) == {
        "id": "org.example.tes",
        "name": "tesapi",
        "type": {"group": "org.ga4gh", "artifact": "tes", "version": "1.1.0"},
        "description": "GA4GH TES 1.1: batch tasks in containers.",
        "organization": {"name": "tesapi", "url": "https://example.org/us"},
        "contactUrl": "mailto:tes@example.org",
        "environment": "test",
        "version": __version__,
        "storage": ["file:///data/in", "file:///data/out", "http://", "https://"],
        "tesResources_backend_parameters": [],
    }
