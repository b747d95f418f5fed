"""One logging set-up for the whole service. Inside `about(task_id)`, every line carries the task's id."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TextIO

from pythonjsonlogger.json import JsonFormatter

_task_id: ContextVar[str | None] = ContextVar("task_id", default=None)


@contextlib.contextmanager
def about(task_id: str) -> Iterator[None]:
    """Mark every line logged inside as being about this task."""
    token = _task_id.set(task_id)
    try:
        yield
    finally:
        _task_id.reset(token)


def set_up(level: str, *, output_json: bool) -> None:
    """Log to standard error from `level` on (a name of Python's), as text or as one JSON object per line."""
    # Nothing that we print tells of threads and processes, so nobody has to ask for them with every line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = _RoundHandler(sys.stderr)
    handler.addFilter(_with_task_id)
    if output_json:
        fields = {"asctime": "time", "levelname": "level", "name": "logger"}
        handler.setFormatter(
            JsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s %(task_id)s", rename_fields=fields)
        )
    else:
        handler.setFormatter(_TextFormatter("%(asctime)s %(levelname)-7s %(task)s%(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("httpx", "httpcore", "uvicorn.access", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


class _RoundHandler(logging.StreamHandler[TextIO]):
    """Writes the lines of one round of the event loop at once: thousands of tasks a second are not a write each.

    A warning, and what is logged outside of a loop, is written immediately.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.append(self.format(record) + self.terminator)
            loop = None if record.levelno >= logging.WARNING else _running_loop()
            if loop is None:
                self.flush()
            elif len(self._lines) == 1:
                loop.call_soon(self.flush)
        except Exception:  # noqa: BLE001 - as every handler: what cannot be logged is told on standard error
            self.handleError(record)

    def flush(self) -> None:
        with self.lock or contextlib.nullcontext():
            lines, self._lines = self._lines, []
            if lines:
                self.stream.write("".join(lines))
            self.stream.flush()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        task_id = getattr(record, "task_id", None)
        record.task = f"[{task_id}] " if task_id else ""
        return super().format(record)


def _with_task_id(record: logging.LogRecord) -> bool:
    record.task_id = _task_id.get()
    return True
