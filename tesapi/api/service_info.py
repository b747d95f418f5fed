"""GetServiceInfo: what this server is, told from its settings (GA4GH service-info 1.0 with the fields of TES)."""

from __future__ import annotations

from tesapi import __version__
from tesapi.settings import Settings

_TES_VERSION = "1.1.0"


def service_info(settings: Settings) -> dict[str, object]:
    """The answer to GetServiceInfo."""
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
