"""Pulsar's message queue interface, as its server 0.16 really uses it.

A direct exchange `pulsar`; per manager a queue each for `setup`, `kill` and `status`, which Pulsar reads, and one for
`status_update`, which only we declare: without it Pulsar's updates vanish. A message that is not JSON ends the thread
that reads the queue, and again after each restart of Pulsar, until somebody purges it. So nothing else is ever sent.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import ssl
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import aio_pika
from aio_pika import exceptions as amqp
from aio_pika.abc import AbstractChannel, AbstractExchange, AbstractIncomingMessage
from aio_pika.connection import make_url
from aiormq.exceptions import ChannelAccessRefused, ConnectionNotAllowed

from tesapi.backends.health import Health, Standing
from tesapi.errors import BackendUnavailable

_log = logging.getLogger(__name__)
for _library in ("aio_pika", "aiormq"):  # what a connection's end means is told here, once and not at each attempt
    logging.getLogger(_library).setLevel(logging.CRITICAL)

LARGEST_MESSAGE_BYTES = 15 << 20
"""Some brokers take no message of more than 16 MiB, and close the connection of whoever sends one."""

_EXCHANGE = "pulsar"
_REQUESTS = ("setup", "kill", "status")
_UPDATES = "status_update"
_ACKNOWLEDGEMENTS = "status_update_ack"
_LARGEST_UPDATE_BYTES = 64 << 20
_AT_ONCE = 200  # updates that are taken from the broker and not acknowledged yet
_HEARTBEAT_S = 20
_LOOK_S = 15.0
_LOOK_WHILE_DOWN_S = 1.0
_SLOWEST_RECONNECT_S = 10.0
_KEPT_COMPLAINTS = 1000
_AWAY = (amqp.AMQPError, amqp.ChannelInvalidStateError, OSError, TimeoutError)


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where a Pulsar's broker is, and which of its queues are that Pulsar's.

    The user and the password in `url` are secret; `ca` and `certificate` are PEM files. `key_prefix` is what
    `amqp_key_prefix` in Pulsar's app.yml says; without it the queues are named after the manager.
    """

    name: str
    url: str
    manager: str = ""
    key_prefix: str | None = None
    ca: Path | None = None
    certificate: Path | None = None
    timeout_s: float = 30.0

    def queue(self, what: str) -> str:
        """The name of a queue, and the key under which messages reach it."""
        if self.key_prefix is not None:
            return f"{self.key_prefix}_{what}"
        named = self.manager and self.manager != "_default_"
        return f"pulsar_{self.manager}__{what}" if named else f"pulsar__{what}"

    @property
    def shown(self) -> str:
        """The URL without user, password and options."""
        parts = urlsplit(self.url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


class Update:
    """One message from Pulsar. Until it is settled the broker keeps it, and tells it again if we die.

    A `copy` is one that another process may get as well, or has got.
    """

    def __init__(
        self, answer: Mapping[str, Any], message: AbstractIncomingMessage, queues: PulsarQueues, *, copy: bool
    ) -> None:
        self.answer = answer
        self.copy = copy
        self._message = message
        self._queues = queues

    async def settle(self) -> None:
        """It is recorded, or of no use to anybody: it need not be told again."""
        if not self.copy:
            await self._queues.acknowledge(self.answer)
        if not self._message.processed:
            try:
                await self._message.ack()
            except _AWAY:
                return  # the connection is gone, and the broker tells it again


class Waiting(NamedTuple):
    """What the broker knows of a queue."""

    messages: int
    readers: int


class PulsarQueues:
    """A connection to the broker of one manager of one Pulsar, which is made again whenever it breaks.

    `take` is called with each update, and says whether it is settled thereby; `came_back` whenever the Pulsar can be
    reached after it could not; `not_alone` when others read the updates as well, who may have taken some until now.
    Health is up while the broker answers and somebody reads Pulsar's queues.
    """

    def __init__(
        self,
        address: BrokerAddress,
        health: Health,
        take: Callable[[Update], bool],
        came_back: Callable[[], None],
        not_alone: Callable[[], None],
    ) -> None:
        self.address = address
        self._health = health
        self._take = take
        self._came_back = came_back
        self._not_alone = not_alone
        self._exchange: AbstractExchange | None = None
        self._tried = asyncio.Event()
        self._complaints: set[str] = set()
        self._half_read = 0
        self.alone = True
        self.bad_messages = 0
        self.published = 0

    async def run(self) -> None:
        """Keep the connection until canceled."""
        failures = 0
        while True:
            try:
                await self._session()
                failures = 0
                self._stand(Standing.DOWN, f"The connection to the broker {self.address.shown} was closed.")
            except (*_AWAY, BackendUnavailable) as error:
                failures = 0 if self._exchange is not None else failures + 1
                self._stand(*self._explained(error))
            except asyncio.CancelledError:
                if _is_canceled():
                    raise
                self._stand(Standing.DOWN, f"The connection to the broker {self.address.shown} broke.")
            finally:
                self._exchange = None
                self._tried.set()
            delay_s = min(0.1 * 2.0 ** min(failures, 10), _SLOWEST_RECONNECT_S)
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))  # noqa: S311

    async def publish(self, what: str, content: Mapping[str, Any]) -> None:
        """Send a message; when this returns the broker has it on disk. Raises BackendUnavailable: send it again."""
        await self._tried.wait()  # at a start, what is to be sent first may wait for the connection
        exchange = self._exchange
        if exchange is None:
            raise BackendUnavailable(self._health.reason)
        message = aio_pika.Message(
            json.dumps(content).encode("ascii"),
            content_type="application/json",
            content_encoding="utf-8",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )
        try:
            async with asyncio.timeout(self.address.timeout_s):
                await exchange.publish(message, routing_key=self.address.queue(what), mandatory=True)
        except _AWAY as error:
            self._health.failed(str(error) or "it takes no messages")
            raise BackendUnavailable(
                f"{self.address.name}: the broker {self.address.shown} did not confirm a message ({_said(error)})."
            ) from error
        except asyncio.CancelledError as error:
            if _is_canceled():
                raise
            raise BackendUnavailable(f"{self.address.name}: the connection to {self.address.shown} broke.") from error
        self.published += 1

    async def acknowledge(self, answer: Mapping[str, Any]) -> None:
        """Answer an update that wants an answer (`amqp_acknowledge` in Pulsar's app.yml)."""
        wanted = answer.get("acknowledge_uuid")
        if isinstance(wanted, str) and answer.get("acknowledge_queue") == _ACKNOWLEDGEMENTS:
            try:
                await self.publish(_ACKNOWLEDGEMENTS, {"acknowledge_uuid_response": wanted})
            except BackendUnavailable as error:
                _log.info("An update could not be answered; Pulsar sends it again, or does not mind: %s", error)

    def complain(self, kind: str, text: str, *arguments: object) -> None:
        """Log what is wrong with a message, once for each `kind`, and count it."""
        self.bad_messages += 1
        if kind not in self._complaints and len(self._complaints) < _KEPT_COMPLAINTS:
            self._complaints.add(kind)
            _log.warning(f"%s: {text}", self.address.queue(_UPDATES), *arguments)

    # The connection.

    async def _session(self) -> None:
        """Connect, and see to it that everything is there, until the connection is gone."""
        connection = aio_pika.Connection(make_url(_with_heartbeat(self.address.url)), ssl_context=_trust(self.address))
        async with connection:  # which closes also one that never was open
            async with asyncio.timeout(self.address.timeout_s):
                await connection.connect(timeout=self.address.timeout_s)
                requests = await connection.channel(publisher_confirms=True, on_return_raises=True)
                exchange = await requests.declare_exchange(_EXCHANGE, aio_pika.ExchangeType.DIRECT, durable=True)
                for what in (*_REQUESTS, _UPDATES):
                    queue = await requests.declare_queue(self.address.queue(what), durable=True)
                    await queue.bind(exchange, routing_key=self.address.queue(what))
                updates = await connection.channel()
                await updates.set_qos(prefetch_count=_AT_ONCE)
                queue = await updates.get_queue(self.address.queue(_UPDATES))
                self._exchange = exchange
                self._tried.set()
                await queue.consume(self._on_update)
            gone = [asyncio.ensure_future(part.closed()) for part in (connection, requests, updates)]
            try:
                while not any(future.done() for future in gone):
                    async with asyncio.timeout(self.address.timeout_s):
                        others = await self._look_at_readers(requests)
                        if others and self.alone:
                            await self._listen_too(updates, exchange)
                    look_s = _LOOK_S if self._health.up else _LOOK_WHILE_DOWN_S
                    await asyncio.wait(gone, timeout=look_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self.alone = True
                for future in gone:
                    future.cancel()

    async def _listen_too(self, channel: AbstractChannel, exchange: AbstractExchange) -> None:
        """Another process reads updates as well, and each reaches only one of us: have copies of them all."""
        name = f"{self.address.queue(_UPDATES)}_{uuid.uuid4().hex}"
        queue = await channel.declare_queue(name, exclusive=True, auto_delete=True)
        await queue.bind(exchange, routing_key=self.address.queue(_UPDATES))
        await queue.consume(self._on_copy)
        self.alone = False
        self._not_alone()

    async def _look_at_readers(self, channel: AbstractChannel) -> bool:
        """See who reads the queues; whether updates are read by others besides us."""
        waiting = {what: await self._waiting(channel, what) for what in (*_REQUESTS, _UPDATES)}
        if not waiting[_UPDATES].readers:
            raise BackendUnavailable(f"The broker {self.address.shown} has stopped sending updates.")
        deaf = [what for what in _REQUESTS if not waiting[what].readers]
        name, queue = self.address.name, self.address.queue
        self._half_read = self._half_read + 1 if 0 < len(deaf) < len(_REQUESTS) else 0
        if not deaf:
            self._stand(Standing.UP, f"{name} reads its queues at {self.address.shown}.")
        elif len(deaf) == len(_REQUESTS):
            self._stand(
                Standing.DOWN,
                f"Nobody reads the queue {queue('setup')} of the broker {self.address.shown}: the Pulsar {name} is "
                "down, or its manager or its amqp_key_prefix is another one.",
            )
        elif self._half_read > 2:  # at a start of Pulsar its readers come one after the other
            names = " and ".join(queue(what) for what in deaf)
            self._stand(
                Standing.MISCONFIGURED,
                f"The Pulsar {name} has stopped reading {names}. A message that is not JSON does that, at each start "
                f"anew: purge the queue (rabbitmqctl purge_queue {queue(deaf[0])}) and restart Pulsar.",
            )
        return waiting[_UPDATES].readers > 1

    async def _waiting(self, channel: AbstractChannel, what: str) -> Waiting:
        result = (await channel.declare_queue(self.address.queue(what), passive=True)).declaration_result
        return Waiting(result.message_count or 0, result.consumer_count or 0)

    def _stand(self, standing: Standing, reason: str) -> None:
        before = self._health.up
        self._health.stand(standing, reason)
        if self._health.up is not before:
            _log.log(logging.INFO if self._health.up else logging.WARNING, "%s: %s", self.address.name, reason)
        if self._health.up and not before:
            self._came_back()

    async def _on_update(self, message: AbstractIncomingMessage) -> None:
        await self._on_message(message, copy=False)

    async def _on_copy(self, message: AbstractIncomingMessage) -> None:
        await self._on_message(message, copy=True)

    async def _on_message(self, message: AbstractIncomingMessage, *, copy: bool) -> None:
        # Without an await before `take`, updates are taken in the order in which they came.
        update = Update(self._content(message), message, self, copy=copy)
        if not update.answer or self._take(update):
            await update.settle()

    def _content(self, message: AbstractIncomingMessage) -> Mapping[str, Any]:
        """What a message says; nothing where that cannot be read."""
        if len(message.body) > _LARGEST_UPDATE_BYTES:
            self.complain("size", "a message of %d bytes was thrown away", len(message.body))
            return {}
        try:
            content = json.loads(message.body)
        except (ValueError, RecursionError) as error:
            self.complain("json", "a message that is not JSON was thrown away (%s)", type(error).__name__)
            return {}
        if not isinstance(content, dict):
            self.complain("object", "a message that is no JSON object was thrown away")
            return {}
        return content

    def _explained(self, error: Exception) -> tuple[Standing, str]:
        """What an error on the way to the broker means to whoever can mend it."""
        name, where = self.address.name, self.address.shown
        cause = error.__cause__ or error.__context__ or error
        match error:
            case BackendUnavailable():
                return Standing.DOWN, str(error)
            case amqp.AuthenticationError() | amqp.ProbableAuthenticationError():
                return Standing.MISCONFIGURED, f"{name}: the broker {where} does not accept user and password."
            case amqp.ChannelPreconditionFailed():
                return Standing.MISCONFIGURED, (
                    f"{name}: the broker {where} has the exchange or a queue of this Pulsar with other properties than "
                    f"durable ones, as with amqp_durable: false in Pulsar's app.yml ({_said(error)})."
                )
            case amqp.InvalidFrameError() if "OpenOk" in str(error):
                return Standing.MISCONFIGURED, (
                    f"{name}: the broker {where} refuses: there is no such virtual host, or the user may not use it."
                )
            case ConnectionNotAllowed() | ChannelAccessRefused():
                return Standing.MISCONFIGURED, f"{name}: the broker {where} refuses: {_said(error)}."
        for problem in (error, cause):
            if isinstance(problem, ssl.SSLCertVerificationError):
                return Standing.MISCONFIGURED, (
                    f"{name}: the certificate of the broker {where} is not trusted ({problem.verify_message}); `ca` "
                    "names the certificates that are."
                )
        return Standing.DOWN, f"{name}: the broker {where} cannot be reached: {_said(error)}."


def _with_heartbeat(url: str) -> str:
    parts = urlsplit(url)
    if "heartbeat=" in parts.query:
        return url
    query = f"{parts.query}&heartbeat={_HEARTBEAT_S}" if parts.query else f"heartbeat={_HEARTBEAT_S}"
    return urlunsplit(parts._replace(query=query))


def _trust(address: BrokerAddress) -> ssl.SSLContext | None:
    if not address.url.startswith("amqps"):
        return None
    context = ssl.create_default_context(cafile=None if address.ca is None else str(address.ca))
    if address.certificate is not None:
        context.load_cert_chain(str(address.certificate))
    return context


def _is_canceled() -> bool:
    """Whether a CancelledError is for us; the library also ends what it waits for with one when a connection breaks."""
    child = asyncio.current_task()
    return child is not None and child.cancelling() > 0


def _said(error: BaseException) -> str:
    said = str(error).strip().rstrip(".")
    return said[:300] or type(error).__name__
