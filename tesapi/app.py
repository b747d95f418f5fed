"""Puts the rooms together: the only place that knows every one of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from tesapi import __version__
from tesapi.api import health, openapi, pages, problems, requests
from tesapi.api.door import PREFIXES, Door
from tesapi.api.service_info import service_info
from tesapi.api.tasks import TesOperations
from tesapi.backends.base import Backend, Capacity
from tesapi.backends.local import LocalBackend
from tesapi.backends.runtimes import BASE_IMAGES, RuntimeOptions, RuntimeProbe
from tesapi.dispatch.dispatcher import Dispatcher
from tesapi.dispatch.drive import Driver
from tesapi.dispatch.routing import Destination
from tesapi.errors import ConfigurationProblem
from tesapi.runner.runtimes.bubblewrap import HOST
from tesapi.settings import Settings
from tesapi.store.base import TaskStore
from tesapi.store.sqlite import SqliteStore
from tesapi.tasks import Tasks

_log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[ASGIApp]:
    """The application, with everything behind it at work; at the end all of it is stopped, and no task is changed.

    The dispatcher is a child of whoever enters: if it dies of a bug, they are canceled, for a service that looks
    alive and drives nothing is the worst kind of dead. Raises ConfigurationProblem.
    """
    async with contextlib.AsyncExitStack() as stack:
        _make_default_root(settings)
        store: TaskStore = await stack.enter_async_context(SqliteStore(settings.sqlite_path))
        backends = {name: await stack.enter_async_context(b) for name, b in _backends(settings, store.id).items()}
        if not backends:
            _log.warning("No destination is configured (local.enable is off): tasks are taken, and wait.")
        tasks = Tasks(store, backends)
        driver = Driver(
            tasks=tasks,
            destinations={name: Destination(name, backend) for name, backend in backends.items()},
            store_id=store.id,
            storage=settings.job_storage,
        )
        dispatcher = Dispatcher(
            store,
            tasks,
            driver,
            lease_s=settings.dispatcher.lease_s,
            poll_interval_s=settings.dispatcher.poll_interval_s,
        )
        children = await stack.enter_async_context(asyncio.TaskGroup())
        child = children.create_task(dispatcher.run(), name="dispatcher")
        stack.callback(child.cancel)
        yield _http(settings, tasks, dispatcher, backends)


def _http(settings: Settings, tasks: Tasks, dispatcher: Dispatcher, backends: dict[str, Backend]) -> ASGIApp:
    info = service_info(settings)
    others = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    health_routes = health.routes(tasks, dispatcher, backends)
    document = get_openapi(
        title=settings.service_info.name,
        version=__version__,
        summary="GA4GH Task Execution Service 1.1",
        description=settings.service_info.description,
        routes=health_routes.routes,
    )
    openapi.add_tes(document, settings, info, PREFIXES[0])
    others.include_router(health_routes)
    others.include_router(pages.routes(info, document, settings.server.root_path, PREFIXES[0]))
    problems.install(others)
    door = Door(settings, TesOperations(settings, tasks, info, requests.anonymous), others)
    if not settings.server.cors_origins:
        return door
    return CORSMiddleware(
        door,
        allow_origins=settings.server.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type"],
    )


def _backends(settings: Settings, store_id: str) -> dict[str, Backend]:
    """The configured destinations. Job directories lie beside the database and carry the store's id."""
    if not settings.local.enable:
        return {}
    directory = settings.server.data_dir / "jobs" / store_id
    return {"local": LocalBackend(directory, _local_capacity(settings), _probe(settings, directory))}


def _make_default_root(settings: Settings) -> None:
    """The folder for files below our own data; roots that the operator names are theirs to make."""
    if settings.storage.file.roots is None:
        for root in settings.file_roots:
            try:
                root.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigurationProblem(f"server.data_dir: {root} cannot be made: {error.strerror}.") from error


def _probe(settings: Settings, directory: Path) -> RuntimeProbe:
    runtime = settings.runtime
    images = runtime.bubblewrap.images
    if images is None:
        # Nobody but users of this machine can reach a server on loopback, and its /usr they see anyway.
        images = dict.fromkeys(BASE_IMAGES, HOST) if settings.server.is_loopback else {}
    options = RuntimeOptions(
        kind=runtime.kind,
        network=runtime.network,
        user=runtime.user or "",
        capabilities=runtime.capabilities,
        pids_limit=runtime.pids_limit,
        pull=runtime.pull,
        docker_host=runtime.docker.host or os.environ.get("DOCKER_HOST", ""),
        images=list(images.items()),
        scratch=str(settings.server.data_dir),
    )
    return RuntimeProbe(directory, options)


def _local_capacity(settings: Settings) -> Capacity:
    """What the operator gives, and else what the machine has."""
    cores = settings.local.cpu_cores or len(os.sched_getaffinity(0))
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return Capacity(
        max_jobs=settings.local.max_jobs or cores, cpu_cores=cores, ram_gb=settings.local.ram_gb or memory_gb
    )
