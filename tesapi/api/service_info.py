"""GetServiceInfo: what this server is, told from its settings (GA4GH service-info 1.0 with the fields of TES)."""

from __future__ import annotations

from collections.abc import Iterable

from tesapi import __version__
from tesapi.settings import Settings

_TES_VERSION = "1.1.0"


def service_info(settings: Settings, parameters: Iterable[str]) -> dict[str, object]:
    """The answer to GetServiceInfo; `parameters` are the `backend_parameters` that choose a destination."""
    info = settings.service_info
    body: dict[str, object] = {
        "id": info.id,
        "name": info.name,
        "type": {"group": "org.ga4gh", "artifact": "tes", "version": _TES_VERSION},
        "description": info.description,
        "organization": {"name": info.organization_name, "url": info.organization_url},
        "version": __version__,
        "storage": [*_storage(settings), "http://", "https://"],
        "tesResources_backend_parameters": sorted(parameters),
    }
    if info.contact_url:
        body["contactUrl"] = info.contact_url
    if info.environment:
        body["environment"] = info.environment
    return body


def _storage(settings: Settings) -> list[str]:
    roots = [*settings.file_roots] if settings.local_enabled else []
    roots += [root for pulsar in settings.pulsars.values() for root in pulsar.storage.file.roots]
    return [f"file://{root}" for root in dict.fromkeys(roots)]
