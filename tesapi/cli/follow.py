"""Following tasks: asking now and then, printing what is new, and getting over a server that is away for a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from tesapi.cli.client import Client
from tesapi.cli.exits import ServerFailed, Unreachable
from tesapi.cli.show import Screen
from tesapi.cli.signals import Signals
from tesapi.cli.tails import Tail
from tesapi.cli.tasks import SETTLED, Task, has_begun, runs, state_of

T = TypeVar("T")

OUTAGE_PATIENCE_S = 300.0

_FIRST_POLL_S = 0.1
_SLOWEST_POLL_S = 1.0
_SLOWEST_WAIT_S = 2.0
_GROWTH = 1.3


class Follower:
    """Follows tasks of one server for one screen. `states` are the last ones that were seen, by the tasks' ids.

    Its methods raise Interrupted, and what the client raises when the server stays away.
    """

    def __init__(self, client: Client, screen: Screen, signals: Signals) -> None:
        self._signals = signals
        self._client = client
        self._screen = screen
        self._tails: dict[tuple[int, int, str], Tail] = {}
        self.states: dict[str, str] = {}

    def follow(self, task_id: str, *, patience_s: float | None = None) -> Task:
        """Print what the task prints until it has settled; the FULL view of its end, or of where it is after that long.

        Asked again, it goes on where it was left. Raises BrokenPipeError when the reader of it has left.
        """
        deadline = None if patience_s is None else time.monotonic() + patience_s
        interval_s = _FIRST_POLL_S
        state = ""
        while True:
            before = state
            self._screen.check_reader()
            # The documents of tasks may be large, and their ends may be far: FULL only when there is something to see.
            if not before or not has_begun(before):
                state = self._see(task_id, self._get(task_id, "MINIMAL"))
            if has_begun(state):
                task = self._get(task_id, "FULL")
                state = self._see(task_id, task)
                self.print_news(task)
                if state in SETTLED:
                    self._screen.show({})
                    return task
            if state != before:
                interval_s = _FIRST_POLL_S
            self._screen.show({task_id: state})
            if deadline is not None and time.monotonic() >= deadline:
                return self._get(task_id, "FULL")
            self._sleep(interval_s)
            interval_s = min(interval_s * _GROWTH, _SLOWEST_POLL_S)

    def wait(self, task_ids: Sequence[str], told: Callable[[Task], None]) -> list[Task]:
        """Wait until all have settled; `told` gets each as it does. Their FULL views, in the order of `task_ids`."""
        settled: dict[str, Task] = {}
        waiting = list(dict.fromkeys(task_ids))
        interval_s = _FIRST_POLL_S
        while waiting:
            for task_id in list(waiting):
                if self._see(task_id, self._get(task_id, "MINIMAL")) in SETTLED:
                    waiting.remove(task_id)
                    del self.states[task_id]
                    self._screen.show(self.states)
                    settled[task_id] = self._get(task_id, "FULL")
                    told(settled[task_id])
                    interval_s = _FIRST_POLL_S
            self._screen.show(self.states)
            if waiting:
                self._sleep(interval_s)
                interval_s = min(interval_s * _GROWTH, _SLOWEST_WAIT_S)
        return [settled[task_id] for task_id in dict.fromkeys(task_ids)]

    def print_news(self, task: Task) -> None:
        """Print what the executors have printed since the last time. Raises BrokenPipeError."""
        for run in runs(task):
            for name, text in (("stdout", run.stdout), ("stderr", run.stderr)):
                tail = self._tails.setdefault((run.attempt, run.executor, name), Tail())
                news = tail.feed(text, final=run.ended)
                if news.skipped:
                    self._screen.say(
                        f"Some of {name} may be missing here: the server keeps the end of it only. "
                        "An output file (-o) keeps all."
                    )
                self._screen.stream(name, news.text)

    def _see(self, task_id: str, task: Task) -> str:
        self.states[task_id] = state_of(task)
        return self.states[task_id]

    def _get(self, task_id: str, view: str) -> Task:
        return self._patiently(lambda: self._client.get(task_id, view))

    def _patiently(self, ask: Callable[[], T]) -> T:
        """What `ask` gives; asked again while the server is away, and both told once."""
        away_since: float | None = None
        pause_s = _FIRST_POLL_S
        while True:
            try:
                with self._signals.let_in():
                    answer = ask()
            except (Unreachable, ServerFailed) as error:
                if away_since is None:
                    away_since = time.monotonic()
                    self._screen.say(f"{error} Trying again.")
                elif time.monotonic() - away_since > OUTAGE_PATIENCE_S:
                    raise
            else:
                if away_since is not None:
                    self._screen.say("The server answers again.")
                return answer
            self._sleep(pause_s)
            pause_s = min(pause_s * 2, _SLOWEST_WAIT_S)

    def _sleep(self, seconds: float) -> None:
        with self._signals.let_in():
            time.sleep(seconds)
