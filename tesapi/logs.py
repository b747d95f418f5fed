"""One logging set-up for the whole service. Inside `about(task_id)`, every line carries the task's id."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from contextvars import ContextVar

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
    handler = logging.StreamHandler(sys.stderr)
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


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        task_id = getattr(record, "task_id", None)
        record.task = f"[{task_id}] " if task_id else ""
        return super().format(record)


def _with_task_id(record: logging.LogRecord) -> bool:
    record.task_id = _task_id.get()
    return True
