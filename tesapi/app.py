"""Puts the rooms together: the only place that knows every one of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

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
from tesapi.backends.health import Health
from tesapi.backends.local import LocalBackend
from tesapi.backends.pulsar_jobs import PulsarOptions
from tesapi.backends.pulsar_rest import PulsarRestBackend, Updates
from tesapi.backends.pulsar_wire import PulsarAddress, PulsarServer
from tesapi.backends.runtimes import BASE_IMAGES, RuntimeOptions, RuntimeProbe
from tesapi.dispatch.dispatcher import Dispatcher
from tesapi.dispatch.drive import Driver
from tesapi.dispatch.retention import Retention, purge_again_and_again
from tesapi.dispatch.routing import LOCAL_AT, Destination, Site, supported_parameters
from tesapi.errors import ConfigurationProblem
from tesapi.runner.runtimes.bubblewrap import HOST
from tesapi.settings import Destination as PulsarSettings
from tesapi.settings import Runtime, Settings, kind_of, remote_job_storage
from tesapi.store.base import TaskStore
from tesapi.store.sqlite import SqliteStore
from tesapi.tasks import Tasks

if TYPE_CHECKING:
    from tesapi.backends.pulsar_queues import BrokerAddress

_log = logging.getLogger(__name__)


class Role(Enum):
    """What a process does, of the two things that there are to do."""

    ALL = "serve"
    API = "api"
    DISPATCHER = "dispatcher"


@contextlib.asynccontextmanager
async def running(settings: Settings, role: Role = Role.ALL) -> AsyncIterator[ASGIApp]:
    """The application, with everything behind it at work; at the end all of it is stopped, and no task is changed.

    The dispatcher is a child of whoever enters: if it dies of a bug, they are canceled, for a service that looks
    alive and drives nothing is the worst kind of dead. Raises ConfigurationProblem.
    """
    if role is not Role.ALL and settings.db.mongodb_uri is None:
        raise ConfigurationProblem(
            f"tesapi {role.value} shares its store with other processes, and SQLite serves one: set db.mongodb_uri, or"
            " use tesapi serve, which does everything in one process."
        )
    async with store_of(settings) as store, at_work(settings, store, role) as app:
        yield app


@contextlib.asynccontextmanager
async def at_work(settings: Settings, store: TaskStore, role: Role) -> AsyncIterator[ASGIApp]:
    """As `running`, on a store that is open. A process that drives nothing asks nothing of any destination."""
    destinations = _destinations(settings, store.id)
    parameters = supported_parameters([destination.site for destination in destinations.values()])
    if role is Role.API:
        tasks = Tasks(store, {}, parameters, max_queued=settings.server.max_queued_tasks)
        yield _http(settings, tasks, None, {}, parameters)
        return
    async with contextlib.AsyncExitStack() as stack:
        _make_default_root(settings)
        backends = {name: await stack.enter_async_context(d.backend) for name, d in destinations.items()}
        if not backends:
            _log.warning("No destination is configured (local.enable is off): tasks are taken, and wait.")
        tasks = Tasks(store, backends, parameters, max_queued=settings.server.max_queued_tasks)
        driver = Driver(tasks, store, destinations)
        dispatcher = Dispatcher(
            store,
            tasks,
            driver,
            lease_s=settings.dispatcher.lease_s,
            poll_interval_s=settings.dispatcher.poll_interval_s,
            give_up_after_s=settings.dispatcher.give_up_after_days * 86400,
        )
        children = await stack.enter_async_context(asyncio.TaskGroup())
        at_work = [children.create_task(dispatcher.run(), name="dispatcher")]
        if not (retention := retention_of(settings)).keeps_all:
            at_work.append(children.create_task(purge_again_and_again(store, retention), name="retention"))
        for child in at_work:
            stack.callback(child.cancel)
        if role is Role.ALL:
            yield _http(settings, tasks, dispatcher, destinations, parameters)
        else:
            yield _health_alone(tasks, dispatcher, destinations)


def store_of(settings: Settings) -> TaskStore:
    """The store that the settings name, not entered yet."""
    if settings.db.mongodb_uri is None:
        return SqliteStore(settings.sqlite_path)
    from tesapi.store.mongo import MongoStore  # only where it is used: its driver takes time and memory

    return MongoStore(settings.db.mongodb_uri.get_secret_value())


def retention_of(settings: Settings) -> Retention:
    """Which tasks stay."""
    days = settings.retention.max_age_days
    return Retention(None if days is None else timedelta(days=days), settings.retention.max_tasks)


def _health_alone(tasks: Tasks, dispatcher: Dispatcher, destinations: Mapping[str, Destination]) -> ASGIApp:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.include_router(health.routes(tasks, dispatcher, lambda: _conditions(destinations)))
    problems.install(app)
    return app


def _http(
    settings: Settings,
    tasks: Tasks,
    dispatcher: Dispatcher | None,
    destinations: Mapping[str, Destination],
    parameters: frozenset[str],
) -> ASGIApp:
    info = service_info(settings, parameters)

    def info_now() -> Mapping[str, object]:
        if dispatcher is None:  # those who drive the tasks know how the destinations are
            return info
        return {**info, "destinations": [one.model_dump(mode="json") for one in _conditions(destinations)]}

    others = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    health_routes = health.routes(tasks, dispatcher, lambda: _conditions(destinations))
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
    door = Door(settings, TesOperations(settings, tasks, info_now, requests.anonymous), others)
    if not settings.server.cors_origins:
        return door
    return CORSMiddleware(
        door,
        allow_origins=settings.server.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", "Idempotency-Key"],
    )


def _conditions(destinations: Mapping[str, Destination]) -> list[health.DestinationCondition]:
    """How the destinations are, for whoever asks."""
    return [_condition(name, destination) for name, destination in destinations.items()]


def _condition(name: str, destination: Destination) -> health.DestinationCondition:
    site, now = destination.site, destination.backend.condition()
    state, sentence = now.state, now.sentence
    if site.drain:
        state, sentence = "drained", f"It is drained: tasks that are there run on, and no new ones go there. {sentence}"
    return health.DestinationCondition(
        name=name,
        kind=site.kind,
        ok=now.ok and not site.drain,
        state=state,
        sentence=sentence,
        since=now.since,
        running=now.running,
        waiting=now.waiting,
    )


def _destinations(settings: Settings, store_id: str) -> dict[str, Destination]:
    """The configured destinations. Local job directories lie beside the database and carry the store's id."""
    destinations: dict[str, Destination] = {}
    if settings.local_enabled:
        directory = settings.server.data_dir / "jobs" / store_id
        local = LocalBackend(directory, _local_capacity(settings), _probe(settings, directory))
        # On a store that other hosts share: nobody but this one can follow its jobs.
        name = "local" if settings.db.mongodb_uri is None else f"{LOCAL_AT}{socket.gethostname()}"
        site = Site(name, roots=tuple(map(str, settings.file_roots)))
        destinations[site.name] = Destination(site, local, settings.job_storage)
    for name, pulsar in settings.pulsars.items():
        site = Site(
            name,
            kind=kind_of(pulsar),
            group=str(pulsar.url or pulsar.amqp_url),
            manager=pulsar.manager,
            labels=pulsar.labels,
            zones=pulsar.zones,
            preemptible=pulsar.preemptible,
            roots=tuple(map(str, pulsar.storage.file.roots)),
            drain=pulsar.drain,
        )
        destinations[name] = Destination(
            site, _pulsar(name, pulsar, settings.server.data_dir / "pulsar" / name), remote_job_storage(pulsar)
        )
    return destinations


def _pulsar(name: str, pulsar: PulsarSettings, notes: Path) -> Backend:
    capacity = Capacity(pulsar.max_jobs, pulsar.cpu_cores, pulsar.ram_gb, pulsar.disk_gb)
    options = PulsarOptions(
        python=pulsar.python,
        poll_interval_s=pulsar.poll_interval,
        max_polls=pulsar.max_polls,
        notes=notes,
        runtime=_runtime_options(pulsar.runtime, scratch="/tmp/tesapi-images", images={}).document(),  # noqa: S108
    )
    health = Health()
    if kind_of(pulsar) == "pulsar_amqp":
        return _behind_a_broker(name, pulsar, health, capacity, options)
    address = PulsarAddress(
        name,
        pulsar.url.get_secret_value() if pulsar.url else "",
        manager=pulsar.manager,
        token=pulsar.private_token.get_secret_value() if pulsar.private_token else "",
        ca=pulsar.ca,
        certificate=pulsar.client_certificate,
        timeout_s=pulsar.client_timeout,
    )
    updates = _updates_of(name, pulsar) if kind_of(pulsar) == "pulsar" else None
    return PulsarRestBackend(PulsarServer(address, health), health, capacity, options, updates)


# A client of brokers takes long to import, and most servers have none.


def _updates_of(name: str, pulsar: PulsarSettings) -> Updates:
    from tesapi.backends.pulsar_updates import PulsarUpdates

    return PulsarUpdates(_broker_of(name, pulsar))


def _behind_a_broker(
    name: str, pulsar: PulsarSettings, health: Health, capacity: Capacity, options: PulsarOptions
) -> Backend:
    from tesapi.backends.pulsar_amqp import PulsarAmqpBackend

    return PulsarAmqpBackend(_broker_of(name, pulsar), health, capacity, options)


def _broker_of(name: str, pulsar: PulsarSettings) -> BrokerAddress:
    from tesapi.backends.pulsar_queues import BrokerAddress

    return BrokerAddress(
        name,
        pulsar.amqp_url.get_secret_value() if pulsar.amqp_url else "",
        manager=pulsar.manager,
        key_prefix=pulsar.amqp_key_prefix,
        ca=pulsar.ca,
        certificate=pulsar.client_certificate,
        timeout_s=pulsar.client_timeout,
    )


def _make_default_root(settings: Settings) -> None:
    """The folder for files below our own data; roots that the operator names are theirs to make."""
    if settings.storage.file.roots is None:
        for root in settings.file_roots:
            try:
                root.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigurationProblem(f"server.data_dir: {root} cannot be made: {error.strerror}.") from error


def _probe(settings: Settings, directory: Path) -> RuntimeProbe:
    # Nobody but users of this machine can reach a server on loopback, and its /usr they see anyway.
    images = dict.fromkeys(BASE_IMAGES, HOST) if settings.server.is_loopback else {}
    options = _runtime_options(settings.runtime, scratch=str(settings.server.data_dir), images=images)
    return RuntimeProbe(
        directory, replace(options, docker_host=options.docker_host or os.environ.get("DOCKER_HOST", ""))
    )


def _runtime_options(runtime: Runtime, *, scratch: str, images: Mapping[str, str]) -> RuntimeOptions:
    """What is set of containers somewhere; `images` are those for bubblewrap where none are set."""
    own = runtime.bubblewrap.images
    return RuntimeOptions(
        kind=runtime.kind,
        network=runtime.network,
        user=runtime.user or "",
        capabilities=runtime.capabilities,
        pids_limit=runtime.pids_limit,
        pull=runtime.pull,
        docker_host=runtime.docker.host or "",
        images=list((images if own is None else own).items()),
        scratch=scratch,
    )


def _local_capacity(settings: Settings) -> Capacity:
    """What the operator gives, and else what the machine has."""
    cores = settings.local.cpu_cores or len(os.sched_getaffinity(0))
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return Capacity(
        max_jobs=settings.local.max_jobs or cores, cpu_cores=cores, ram_gb=settings.local.ram_gb or memory_gb
    )
