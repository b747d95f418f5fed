"""Whatever an OpenAPI document allows and forbids is sent; no answer is outside of the document, and none is a 5xx.

Two documents: this server's own, and the published one of TES 1.1 (tests/spec).
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.services.server import Server

PUBLISHED = pathlib.Path(__file__).parents[1] / "spec" / "tes-1.1.0.yaml"
BOUNDED = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), database=None)
CONFORMANCE = [not_a_server_error, content_type_conformance, response_headers_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def ours(idle: Server) -> Any:
    return schemathesis.openapi.from_url(f"{idle.url}/openapi.json")


@pytest.fixture(scope="module")
def published(idle: Server) -> Any:
    document = json.loads(json.dumps(yaml.safe_load(PUBLISHED.read_text("utf-8")), default=str))  # no dates, no numbers
    schemas = document["components"]["schemas"]
    # GA4GH's service-info stands at a URL, and tests reach no network.
    for name in ("tesServiceType", "tesServiceInfo"):
        schemas[name] = schemas[name]["allOf"][1]
    # The first of its two known errors: MINIMAL, the default view, has no executors, which it calls required.
    answer = {key: value for key, value in schemas["tesTask"].items() if key != "required"}
    schemas["tesTaskAnswer"] = answer
    schemas["tesListTasksResponse"]["properties"]["tasks"]["items"] = {"$ref": "#/components/schemas/tesTaskAnswer"}
    task = document["paths"]["/tasks/{id}"]["get"]["responses"]["200"]["content"]["application/json"]
    task["schema"] = {"$ref": "#/components/schemas/tesTaskAnswer"}
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=f"{idle.url}/ga4gh/tes/v1")
    return schema


EXPECTED = {"CreateTask": {200, 400}, "ListTasks": {200, 400}, "GetTask": {404, 400}, "CancelTask": {404}}
TES = ["GetServiceInfo", "ListTasks", "CreateTask", "GetTask", "CancelTask"]


@pytest.mark.parametrize("name", [*TES, "Livez", "Readyz"])
def test_every_answer_is_in_our_document(ours: Any, name: str) -> None:
    told = set()

    @BOUNDED
    @given(_cases(ours, name))
    def answers(case: Case) -> None:
        answer = case.call()
        case.validate_response(answer, checks=[*CONFORMANCE, status_code_conformance, allow_header_conformance])
        told.add(answer.status_code)

    answers()
    assert told >= EXPECTED.get(name, {200}), "too little was tried"


@pytest.mark.parametrize("name", TES)
def test_every_answer_is_in_the_published_document(published: Any, name: str) -> None:
    @BOUNDED
    @given(_cases(published, name))
    def answers(case: Case) -> None:
        answer = case.call()
        # The second of its errors: it documents no refusal at all.
        if 400 <= answer.status_code < 500:
            assert answer.headers["content-type"] == ["application/problem+json"]
            return
        case.validate_response(answer, checks=[*CONFORMANCE, status_code_conformance])

    answers()


def _cases(schema: Any, name: str) -> st.SearchStrategy[Case]:
    """Requests that the operation of this name allows, and such that it does not."""
    operation = schema.find_operation_by_id(name)
    allowed = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    if name in {"GetServiceInfo", "Livez", "Readyz"}:
        return allowed  # there is nothing to get wrong
    return st.one_of(allowed, operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
