"""GetServiceInfo: what this server is, told from its settings (GA4GH service-info 1.0 with the fields of TES)."""

from __future__ import annotations

import json

from fastapi import APIRouter, Response

from tesapi import __version__
from tesapi.settings import Settings

_TES_VERSION = "1.1.0"


def routes(settings: Settings) -> APIRouter:
    """The route, for one prefix."""
    router = APIRouter(tags=["TaskService"])
    body = json.dumps(_service_info(settings)).encode()

    # An early client asks below /tasks, where it would be taken for a task's id.
    @router.get("/tasks/service-info", include_in_schema=False)
    @router.get("/service-info", operation_id="GetServiceInfo")
    async def get_service_info() -> Response:
        return Response(body, media_type="application/json")

    return router


def _service_info(settings: Settings) -> dict[str, object]:
    info = settings.service_info
    body: dict[str, object] = {
        "id": info.id,
        "name": info.name,
        "type": {"group": "org.ga4gh", "artifact": "tes", "version": _TES_VERSION},
        "description": info.description,
        "organization": {"name": info.organization_name, "url": info.organization_url},
        "version": __version__,
        "storage": [*(f"file://{root}" for root in settings.file_roots), "http://", "https://"],
        "tesResources_backend_parameters": [],
    }
    if info.contact_url:
        body["contactUrl"] = info.contact_url
    if info.environment:
        body["environment"] = info.environment
    return body
