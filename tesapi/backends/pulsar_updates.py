"""News of a Pulsar's jobs from its message queue, for a destination whose files are reached over REST."""

from __future__ import annotations

from collections.abc import Callable

from tesapi.backends.health import Health
from tesapi.backends.pulsar_jobs import read_update
from tesapi.backends.pulsar_queues import BrokerAddress, PulsarQueues, Update
from tesapi.backends.pulsar_wire import JobStatus

Hear = Callable[[str, JobStatus], None]


class PulsarUpdates:
    """Hears what Pulsar says by itself. It keeps nothing back: what is missed here can be asked for over REST."""

    def __init__(self, address: BrokerAddress) -> None:
        self._health = Health()
        self._queues = PulsarQueues(address, self._health, self._take, self._missed, self._missed)
        self._hear: Hear | None = None
        self._catch_up: Callable[[], None] | None = None

    @property
    def hearing(self) -> bool:
        """Whether news would reach us."""
        return self._health.up

    @property
    def sentence(self) -> str:
        """How it is with the broker, for an operator."""
        return self._health.reason if self.hearing else f"Jobs are polled: {self._health.reason}"

    async def run(self, hear: Hear, catch_up: Callable[[], None]) -> None:
        """Call `hear` with each update until canceled, and `catch_up` when some may have been missed."""
        self._hear, self._catch_up = hear, catch_up
        await self._queues.run()

    def _take(self, update: Update) -> bool:
        try:
            job_id, status = read_update(update.answer)
        except ValueError as error:
            self._queues.complain(f"update {error}", "an update was thrown away: %s", error)
        else:
            if self._hear is not None:
                self._hear(job_id, status)
        return True

    def _missed(self) -> None:
        if self._catch_up is not None:
            self._catch_up()
