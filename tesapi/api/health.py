"""/livez: the process answers. /readyz: it can take tasks and drive them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Protocol

from fastapi import APIRouter, Response
from pydantic import BaseModel

from tesapi.errors import StoreUnavailable
from tesapi.store.base import TaskQuery
from tesapi.tasks import Tasks


class Alive(Protocol):
    """Whatever drives the tasks."""

    @property
    def alive(self) -> bool:
        """Whether it does."""
        ...


class Liveness(BaseModel):
    """The process answers."""

    status: str


class DestinationCondition(BaseModel):
    """A place where tasks run: whether it takes new ones (`ok`), a `sentence` on why or why not, and since when.

    `state` is one of starting, up, down, misconfigured, drained.
    """

    name: str
    kind: str
    ok: bool
    state: str
    sentence: str
    since: datetime
    running: int
    waiting: int


class Readiness(BaseModel):
    """Whether tasks can be taken and driven; `store` and `dispatcher` are sentences."""

    status: str
    store: str
    dispatcher: str
    destinations: list[DestinationCondition]


Conditions = Callable[[], Sequence[DestinationCondition]]


def routes(tasks: Tasks, dispatcher: Alive | None, conditions: Conditions) -> APIRouter:
    """The two routes. A destination that is down does not make the service unready: tasks wait for it.

    Without a dispatcher this process takes tasks, and others drive them.
    """
    router = APIRouter(tags=["Health"])

    @router.get("/livez", operation_id="Livez", summary="The process answers", response_model=Liveness)
    async def livez() -> Response:
        return _json(200, {"status": "ok"})

    @router.get(
        "/readyz",
        operation_id="Readyz",
        summary="It can take tasks and drive them",
        response_model=Readiness,
        responses={503: {"model": Readiness, "description": "It cannot; the sentences say why."}},
    )
    async def readyz() -> Response:
        store = await _store_sentence(tasks)
        driving = dispatcher is None or dispatcher.alive
        ready = store is None and driving
        others = "Other processes drive the tasks." if dispatcher is None else "Tasks are being driven."
        return _json(
            200 if ready else 503,
            {
                "status": "ok" if ready else "unavailable",
                "store": store or "The store answers.",
                "dispatcher": others if driving else "The dispatcher does not come round any more.",
                "destinations": [condition.model_dump(mode="json") for condition in conditions()],
            },
        )

    return router


async def _store_sentence(tasks: Tasks) -> str | None:
    try:
        await tasks.find(TaskQuery(size=1))
    except StoreUnavailable as error:
        return str(error)
    return None


def _json(status: int, body: object) -> Response:
    return Response(json.dumps(body), status, media_type="application/json")
