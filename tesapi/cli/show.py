"""What people see: sentences and live lines on standard error, the streams of a task as they are."""

from __future__ import annotations

import errno
import os
import select
import stat
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

import click

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

    from tesapi.cli.signals import Signals

_COLORS = {
    "COMPLETE": "green",
    "EXECUTOR_ERROR": "red",
    "SYSTEM_ERROR": "red",
    "CANCELED": "yellow",
    "CANCELING": "yellow",
    "PREEMPTED": "red",
    "RUNNING": "cyan",
    "INITIALIZING": "cyan",
}
_REFRESHES_PER_S = 4
_LOOK_S = 0.2


def plain(text: str) -> str:
    """`text` on one line, without what a terminal would obey, or would show in another order than it is."""
    return "".join(character if character.isprintable() else _stand_in(character) for character in text)


def _stand_in(character: str) -> str:
    return " " if character.isspace() else "\ufffd"


def colored(state: str, width: int = 0) -> str:
    """A state for standard output, in color on a terminal unless NO_COLOR is set."""
    text = f"{plain(state):<{width}}"
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return click.style(text, fg=_COLORS.get(state))


class Screen:
    """Standard output and standard error of a command that follows tasks.

    On a terminal a live line per task says its state and for how long it has been followed; it makes room for whatever
    is printed, and leaves nothing behind. Elsewhere there is no such line.
    """

    def __init__(self, signals: Signals) -> None:
        self.has_terminal = sys.stderr.isatty()
        self._signals = signals
        self._live: Live | None = None
        self._states: dict[str, str] = {}
        self._began = time.monotonic()
        self._at_line_start = True

    def show(self, states: Mapping[str, str]) -> None:
        """Have these states, by the ids of their tasks, in the live lines."""
        self._states = dict(states)
        if not self.has_terminal or not self._at_line_start:
            return
        if self._live is None and self._states:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(
                console=Console(stderr=True),
                get_renderable=self._lines,
                refresh_per_second=_REFRESHES_PER_S,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start(refresh=True)

    def clear(self) -> None:
        """Take the live lines away."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def say(self, sentence: str) -> None:
        """A sentence of ours on standard error, on a line of its own."""
        self.clear()
        lead = "" if self._at_line_start else "\n"
        click.echo(f"{lead}tesapi: {plain(sentence)}", err=True)
        self._at_line_start = True

    def result(self, line: str) -> None:
        """A line of the command's result on standard output."""
        self.clear()
        click.echo(line)

    def stream(self, name: str, text: str) -> None:
        """What a task printed, as it is. `name` is stdout or stderr. Raises BrokenPipeError and Interrupted."""
        if not text:
            return
        stream: TextIO = getattr(sys, name)
        if stream.isatty():
            self.clear()
            self._at_line_start = text.endswith("\n")
        with self._signals.let_in():
            stream.buffer.write(text.encode("utf-8", "replace"))
            stream.buffer.flush()

    def check_reader(self) -> None:
        """Raise BrokenPipeError where nobody reads standard output any more: a task may print nothing for long."""
        descriptor = sys.stdout.fileno()
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            poll = select.poll()
            poll.register(descriptor, 0)
            if poll.poll(0):
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def ask(self, question: str) -> str | None:
        """The answer of whoever sits at the terminal; None where the terminal is gone. Raises Interrupted."""
        self.clear()
        lead = "" if self._at_line_start else "\n"
        # The terminal has shown ^C where the cursor was.
        click.echo(f"{lead}\r{question} ", nl=False, err=True)
        with self._signals.let_in():
            # A signal that comes just before a read begins does not end the read: so it begins when there is a line.
            while not select.select([sys.stdin], [], [], _LOOK_S)[0]:
                pass
            answer = sys.stdin.readline()
        return answer.strip() if answer else None

    def _lines(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        seconds = int(time.monotonic() - self._began)
        elapsed = f"{seconds // 60}:{seconds % 60:02}"
        lines = Table.grid(padding=(0, 2))
        for task_id, state in self._states.items():
            style = _COLORS.get(state, "")
            lines.add_row(Text(plain(state), style), Text(plain(task_id)), Text(elapsed))
        return lines
