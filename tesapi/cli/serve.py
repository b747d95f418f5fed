"""`tesapi serve`: one process with the HTTP API and the dispatcher. `tesapi api`, `tesapi dispatcher`: one of them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Iterator, Sequence

import uvicorn
import uvloop
from starlette.types import ASGIApp

from tesapi import logs
from tesapi.app import Role, running
from tesapi.errors import ConfigurationProblem, TesapiError
from tesapi.settings import Loaded, Settings

_log = logging.getLogger("tesapi")

_BACKLOG = 2048
_SHUTDOWN_S = 10


def run(loaded: Loaded, role: Role) -> int:
    """Serve as `role` until SIGTERM or SIGINT; the process's exit code. A bug ends the process with its traceback."""
    settings = loaded.settings
    logs.set_up(settings.logging.level, output_json=settings.logging.output_json)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    # It complains at every try to reach a broker that is down; the destination says so once.
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)
    for warning in loaded.warnings:
        _log.warning("%s", warning)
    try:
        uvloop.run(_serve(settings, role))
    except ConfigurationProblem as error:
        _log.error("%s", error)
        return 2
    except TesapiError as error:
        _log.error("%s", error)
        return 1
    return 0


async def _serve(settings: Settings, role: Role) -> None:
    with contextlib.ExitStack() as stack:
        listener = _listener(settings, role)
        if listener is not None:
            stack.enter_context(contextlib.closing(listener))
        async with running(settings, role) as app:
            server = _Server(configured(app, trusted_proxies=settings.server.trusted_proxies))
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, server.stop, number)
            _log.info("%s", _told(settings, role, listener))
            # What is there by now stays: looking through it again and again would make the slowest answers slower.
            gc.collect()
            gc.freeze()
            if listener is None:
                await server.stopped.wait()
            else:
                await server.serve([listener])
        _log.info("Stopped; jobs that run go on, and are found again at the next start.")


def _listener(settings: Settings, role: Role) -> socket.socket | None:
    if role is not Role.DISPATCHER:
        return _listen("server", settings.server.host, settings.server.port)
    if settings.dispatcher.port is None:
        return None
    return _listen("dispatcher", settings.dispatcher.host, settings.dispatcher.port)


def _told(settings: Settings, role: Role, listener: socket.socket | None) -> str:
    """The first thing that the operator hears."""
    if listener is None:
        return "Tasks are driven."
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    if role is Role.DISPATCHER:
        return f"Tasks are driven; {address}/readyz tells how that goes."
    where = f"; data are in {settings.server.data_dir}" if role is Role.ALL else "; other processes drive the tasks"
    return f"TES is served at {address}/ga4gh/tes/v1{where}."


def configured(app: ASGIApp, *, trusted_proxies: Sequence[str] = ()) -> uvicorn.Config:
    """How uvicorn serves `app`. Only from `trusted_proxies` it believes who they speak for, and by which scheme."""
    return uvicorn.Config(
        app,
        http="httptools",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(trusted_proxies),
        forwarded_allow_ips=list(trusted_proxies),
        timeout_graceful_shutdown=_SHUTDOWN_S,
    )


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.stopped = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own would raise the signal again before the leases are given back.
        yield

    def stop(self, number: int) -> None:
        """End gracefully; asked a second time, at once."""
        if self.should_exit:
            self.force_exit = True
        _log.info("Stopping because of %s.", signal.Signals(number).name)
        self.should_exit = True
        self.stopped.set()


def _listen(section: str, host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server((str(address[0]), int(address[1])), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigurationProblem(f"{section}.host {host} and {section}.port {port}: {error.strerror}.") from error
