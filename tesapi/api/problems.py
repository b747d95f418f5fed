"""Errors as HTTP answers: one table, and one shape of body (RFC 9457)."""

from __future__ import annotations

import http
import json
import logging
from collections.abc import Iterable, Mapping, Sequence

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from tesapi.api.requests import BodyTooLong
from tesapi.errors import (
    CallerProblem,
    FieldProblem,
    InvalidDocument,
    KeyReused,
    QueueFull,
    StoreUnavailable,
    TaskNotFound,
    TesapiError,
)

_log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
_RETRY_AFTER_S = "5"


class NothingThere(CallerProblem):
    """The path leads nowhere."""


class ForeignPage(CallerProblem):
    """A web page of elsewhere wants to make a change here."""


class ForeignHost(CallerProblem):
    """The request was meant for a host of another name."""


_STATUS: dict[type[TesapiError], int] = {
    InvalidDocument: 400,
    ForeignPage: 403,
    TaskNotFound: 404,
    NothingThere: 404,
    KeyReused: 409,
    BodyTooLong: 413,
    ForeignHost: 421,
    QueueFull: 429,
    StoreUnavailable: 503,
}


def install(app: FastAPI) -> None:
    """Have every error of `app` answered as a problem."""
    app.add_exception_handler(HTTPException, _of_routing)
    app.add_exception_handler(Exception, _of_request)


def problem(
    status: int, detail: str, errors: Sequence[FieldProblem] = (), headers: Mapping[str, str] | None = None
) -> Response:
    """A problem answer; `errors` are listed field by field."""
    body: dict[str, object] = {"status": status, "title": http.HTTPStatus(status).phrase, "detail": detail}
    if errors:
        body["errors"] = [{"field": e.field, "problem": e.problem, "allowed": e.allowed} for e in errors]
    # Escaped, because what a client sent may stand in it, and be no Unicode text.
    return Response(json.dumps(body), status, dict(headers or {}), MEDIA_TYPE)


def of_error(scope: Scope, error: Exception) -> Response:
    """The answer to a request that raised `error`; whatever is this server's fault is logged."""
    method, path = scope["method"], scope["path"]
    if not isinstance(error, TesapiError):
        _log.error("%s %r failed", method, path, exc_info=error)
        return problem(500, "The server failed on this request; its log says why.")
    if isinstance(error, NothingThere):
        return problem(404, _nothing_at(path))
    status = next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), 500)
    if status >= 500:
        _log.error("%s %r: %s", method, path, error)
    headers = {"Retry-After": _RETRY_AFTER_S} if status in {429, 503} else {}
    errors = error.problems if isinstance(error, InvalidDocument) else ()
    return problem(status, str(error), errors, headers)


def other_method(method: str, allowed: Iterable[str]) -> Response:
    """The answer to a method that the path has not; OPTIONS asks which it has."""
    allow = {"Allow": ", ".join([*allowed, "OPTIONS"])}
    if method == "OPTIONS":
        return Response(status_code=204, headers=allow)
    return problem(405, f"{method} is not possible here; these are: {allow['Allow']}.", headers=allow)


def _nothing_at(path: str) -> str:
    return f"There is nothing at {path}; the TES API is at /ga4gh/tes/v1."


async def _of_routing(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        return of_error(request.scope, error)
    headers = dict(error.headers or {})
    match error.status_code:
        case 404:
            return problem(404, _nothing_at(request.url.path))
        case 405:
            return other_method(request.method, headers.get("Allow", "").split(", "))
        case _:
            return problem(error.status_code, str(error.detail), headers=headers)


async def _of_request(request: Request, error: Exception) -> Response:
    return of_error(request.scope, error)
