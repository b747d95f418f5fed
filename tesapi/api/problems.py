"""Errors as HTTP answers: one table, and one shape of body (RFC 9457)."""

from __future__ import annotations

import http
import json
import logging
from collections.abc import Mapping, Sequence

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from tesapi.errors import FieldProblem, InvalidDocument, StoreUnavailable, TaskNotFound, TesapiError

_log = logging.getLogger(__name__)

_STATUS: dict[type[TesapiError], int] = {
    InvalidDocument: 400,
    TaskNotFound: 404,
    StoreUnavailable: 503,
}
_RETRY_AFTER_S = "5"


class Forbidden(TesapiError):
    """The request comes from a web page that has no business here."""


_STATUS[Forbidden] = 403


def install(app: FastAPI) -> None:
    """Have every error of `app` answered as a problem."""
    app.add_exception_handler(TesapiError, _of_ours)
    app.add_exception_handler(RequestValidationError, _of_parameters)
    app.add_exception_handler(HTTPException, _of_routing)
    app.add_exception_handler(Exception, _of_nobody)


def problem(
    status: int, detail: str, errors: Sequence[FieldProblem] = (), headers: Mapping[str, str] | None = None
) -> Response:
    """A problem answer; `errors` are listed field by field."""
    body: dict[str, object] = {"status": status, "title": http.HTTPStatus(status).phrase, "detail": detail}
    if errors:
        body["errors"] = [{"field": e.field, "problem": e.problem, "allowed": e.allowed} for e in errors]
    # Escaped, because what a client sent may stand in it, and be no Unicode text.
    return Response(json.dumps(body), status, dict(headers or {}), "application/problem+json")


async def _of_ours(request: Request, error: Exception) -> Response:
    status = next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), 500)
    if status >= 500:
        _log.error("%s %s: %s", request.method, request.url.path, error)
    headers = {"Retry-After": _RETRY_AFTER_S} if status == 503 else {}
    errors = error.problems if isinstance(error, InvalidDocument) else ()
    return problem(status, str(error), errors, headers)


async def _of_parameters(request: Request, error: Exception) -> Response:
    found = error.errors() if isinstance(error, RequestValidationError) else []
    fields = [_parameter_problem(details) for details in found]
    return problem(400, str(InvalidDocument(fields)), fields)


def _parameter_problem(details: Mapping[str, object]) -> FieldProblem:
    location = details["loc"]
    field = str(location[-1]) if isinstance(location, tuple) else "the request"
    context = details.get("ctx")
    if details["type"] == "enum" and isinstance(context, Mapping):
        allowed = str(context["expected"]).replace("'", "")
    else:
        allowed = str(details["msg"]).removeprefix("Input should be ")
    return FieldProblem(field, f"is {details['input']!r}", allowed)


async def _of_routing(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        return await _of_nobody(request, error)
    details = {
        404: f"There is nothing at {request.url.path}; the TES API is at /ga4gh/tes/v1.",
        405: f"{request.method} is not possible at {request.url.path}.",
    }
    return problem(error.status_code, details.get(error.status_code, str(error.detail)), headers=error.headers)


async def _of_nobody(request: Request, error: Exception) -> Response:
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return problem(500, "The server failed on this request; its log says why.")
