"""What people look at: / says where things are, /docs tries them out. Nothing comes from another site."""

from __future__ import annotations

import html
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, HTMLResponse, Response

_ASSETS = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}
# Swagger UI sets styles on elements and draws its icons from data; it runs no script but its own two files.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
_START_SWAGGER = """\
SwaggerUIBundle({
  url: document.currentScript.dataset.openapi,
  dom_id: "#swagger-ui",
  deepLinking: true,
  layout: "BaseLayout",
  presets: [SwaggerUIBundle.presets.apis],
  defaultModelsExpandDepth: 0,
  validatorUrl: null,
});
"""
_DOCS = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{root}/docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="{root}/docs/swagger-ui-bundle.js"></script>
<script src="{root}/docs/start.js" data-openapi="{root}/openapi.json"></script>
</body>
</html>
"""
_HOME = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<link rel="icon" href="data:,">
<style>body {{ font: 1rem/1.6 sans-serif; margin: 3rem auto; max-width: 40rem; padding: 0 1rem }}</style>
</head>
<body>
<h1>{name}</h1>
<p>{description}</p>
<ul>
{links}
</ul>
</body>
</html>
"""


def routes(service_info: Mapping[str, Any], openapi: Mapping[str, Any], root_path: str, prefix: str) -> APIRouter:
    """The routes. Links begin with `root_path`, where a proxy shows this server."""
    router = APIRouter(include_in_schema=False)
    document = json.dumps(openapi).encode()
    places = {
        "tasks": ("The tasks", f"{root_path}{prefix}/tasks"),
        "service_info": ("What this server is", f"{root_path}{prefix}/service-info"),
        "docs": ("Try it out", f"{root_path}/docs"),
        "openapi": ("The API for machines", f"{root_path}/openapi.json"),
        "ready": ("Whether it is ready", f"{root_path}/readyz"),
    }
    names = {"name": html.escape(service_info["name"]), "description": html.escape(service_info["description"])}
    links = "\n".join(f'<li><a href="{url}">{text}</a> <code>{url}</code></li>' for text, url in places.values())
    home_page = _HOME.format(**names, links=links)
    home_data = json.dumps({"name": service_info["name"]} | {name: url for name, (_, url) in places.items()})
    docs_page = _DOCS.format(**names, root=root_path)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def home(request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(home_page, headers={**_HEADERS, "Vary": "Accept"})
        return Response(home_data, media_type="application/json", headers={"Vary": "Accept"})

    @router.api_route("/openapi.json", methods=["GET", "HEAD"])
    async def openapi_json() -> Response:
        return Response(document, media_type="application/json")

    @router.api_route("/docs", methods=["GET", "HEAD"])
    async def docs() -> Response:
        return HTMLResponse(docs_page, headers=_HEADERS)

    @router.api_route("/docs/start.js", methods=["GET", "HEAD"])
    async def start() -> Response:
        return Response(_START_SWAGGER, media_type="text/javascript", headers=_HEADERS)

    folder = _swagger_folder()

    @router.api_route("/docs/{name}", methods=["GET", "HEAD"])
    async def asset(name: str) -> Response:
        if name not in _ASSETS:
            raise HTTPException(404)
        return FileResponse(folder / name, media_type=_ASSETS[name], headers=_HEADERS)

    return router


def _swagger_folder() -> Path:
    """Where the package that brings Swagger UI has its files; only those are used, and nothing of it is imported."""
    found = importlib.util.find_spec("fastapi_offline")
    if found is None or not found.submodule_search_locations:
        raise RuntimeError("The package fastapi-offline, which brings Swagger UI, is not installed.")
    return Path(next(iter(found.submodule_search_locations)), "static")
