"""A task as a server answers it, read with care: any field may be missing, on any TES server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tesapi.cli.exits import Exit

Task = Mapping[str, Any]

SETTLED = frozenset({"COMPLETE", "EXECUTOR_ERROR", "SYSTEM_ERROR", "CANCELED", "PREEMPTED"})
_WAITING = frozenset({"QUEUED", "INITIALIZING"})


class Run(NamedTuple):
    """The log of one executor: which attempt at the task, which executor, and what is known of it."""

    attempt: int
    executor: int
    stdout: str
    stderr: str
    ended: bool


def state_of(task: Task) -> str:
    """Its state; UNKNOWN where none is told."""
    return str(task.get("state") or "UNKNOWN")


def has_begun(state: str) -> bool:
    """Whether there may be something to print."""
    return state not in _WAITING


def runs(task: Task) -> list[Run]:
    """The executors that have started in the last attempt, in their order."""
    attempts = _list(task.get("logs"))
    if not attempts:
        return []
    logs = [log for log in _list(_dict(attempts[-1]).get("logs")) if isinstance(log, dict)]
    settled = state_of(task) in SETTLED
    return [
        Run(
            attempt=len(attempts) - 1,
            executor=index,
            stdout=_text(log.get("stdout")),
            stderr=_text(log.get("stderr")),
            ended=settled or index < len(logs) - 1 or bool(log.get("end_time")),
        )
        for index, log in enumerate(logs)
    ]


def exit_code(task: Task) -> int | None:
    """The exit code that the task came to: of its last executor, or of the last one that failed before it."""
    attempts = _list(task.get("logs"))
    logs = _list(_dict(attempts[-1]).get("logs")) if attempts else []
    codes = [code for log in logs if isinstance(code := _dict(log).get("exit_code"), int)]
    if state_of(task) == "EXECUTOR_ERROR":
        codes = [code for code in codes if code not in (0, -1)]
    return codes[-1] if codes else None


def last_words(task: Task) -> str:
    """The last of its system logs; empty where there is none."""
    attempts = _list(task.get("logs"))
    notes = [note for attempt in attempts for note in _list(_dict(attempt).get("system_logs"))]
    return str(notes[-1]) if notes else ""


def exit_for(task: Task) -> int:
    """The exit code of a command that waited for this one task."""
    match state_of(task):
        case "COMPLETE":
            return Exit.DONE
        case "EXECUTOR_ERROR":
            code = exit_code(task)
            return code if code is not None and 0 < code < 256 else Exit.FAILED
        case "CANCELED":
            return Exit.CANCELED
        case _:
            return Exit.SYSTEM_ERROR


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
