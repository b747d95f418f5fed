"""Tasks and servers as lines of text for people."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from tesapi.cli.show import colored, plain
from tesapi.cli.tasks import Task, state_of

_STATE_WIDTH = len("EXECUTOR_ERROR")
_TIME_WIDTH = len("2025-01-01T00:00:00Z")


def row(task: Task) -> str:
    """A task as one line of a list."""
    task_id, name = plain(str(task.get("id", ""))), plain(str(task.get("name") or ""))
    created = _seconds(task.get("creation_time"))
    return f"{task_id}  {colored(state_of(task), _STATE_WIDTH)}  {created:<{_TIME_WIDTH}}  {name}".rstrip()


def task_lines(task: Task) -> Iterator[str]:
    """A task and what became of it, but for what it printed."""
    yield _line("id", task.get("id", ""))
    yield f"{'state':<12}{colored(state_of(task))}"
    for key in ("name", "description", "creation_time"):
        if task.get(key):
            yield _line(key.removesuffix("_time"), task[key])
    for key, value in _items(task.get("tags")):
        yield _line("tag", f"{key}={value}")
    for key, value in _items(task.get("resources")):
        yield _line("resources", f"{key} {value}")
    for kind in ("inputs", "outputs"):
        for item in _dicts(task.get(kind)):
            source = item.get("url") or "(content)"
            there = ("<-", "->")[kind == "outputs"]
            yield _line(kind[:-1], f"{item.get('path', '')} {there} {source}")
    for executor in _dicts(task.get("executors")):
        command = executor.get("command")
        words = shlex.join(str(word) for word in command) if isinstance(command, list) else ""
        yield _line("executor", f"{executor.get('image', '')}: {words}")
    attempts = _dicts(task.get("logs"))
    for number, attempt in enumerate(attempts, 1):
        if len(attempts) > 1:
            yield _line("attempt", number)
        yield from _attempt_lines(attempt)


def _attempt_lines(attempt: Mapping[str, Any]) -> Iterator[str]:
    for key, value in _items(attempt.get("metadata")):
        yield _line("metadata", f"{key} {value}")
    for index, log in enumerate(_dicts(attempt.get("logs"))):
        code = log.get("exit_code")
        end = f"until {_seconds(log['end_time'])}, exit code {code}" if log.get("end_time") else "and goes on"
        yield _line("run", f"executor {index} from {_seconds(log.get('start_time')) or '?'} {end}")
    for stored in _dicts(attempt.get("outputs")):
        yield _line("stored", f"{stored.get('url', '')} ({stored.get('size_bytes', '?')} bytes)")
    notes = attempt.get("system_logs")
    for note in notes if isinstance(notes, list) else []:
        yield _line("system log", note)


def service_lines(info: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """What a server tells of itself, field by field."""
    for key, value in info.items():
        match value:
            case dict():
                yield from service_lines(value, f"{prefix}{key}.")
            case list():
                for item in value:
                    yield f"{plain(prefix + key)}: {plain(str(item))}"
            case _:
                yield f"{plain(prefix + key)}: {plain(str(value))}"


def destination_lines(destinations: list[Any]) -> Iterator[str]:
    """The places where tasks run as a table, each with a sentence."""
    rows: list[tuple[str, ...]] = [("NAME", "KIND", "STATE", "SINCE", "RUNNING", "WAITING", "")]
    for one in _dicts(destinations):
        since = _seconds(one.get("since"))
        cells = (one.get("name"), one.get("kind"), one.get("state"), since, one.get("running"), one.get("waiting"))
        rows.append((*(plain(str(cell)) for cell in cells), plain(str(one.get("sentence", "")))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        yield "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()


def _line(key: str, value: object) -> str:
    return f"{key:<12}{plain(str(value))}"


def _seconds(time: object) -> str:
    """A time without fractions of a second."""
    text = plain(str(time or ""))
    return text[:19] + "Z" if text.endswith("Z") and len(text) > _TIME_WIDTH else text


def _items(value: object) -> list[tuple[str, Any]]:
    return [(key, item) for key, item in value.items() if item is not None] if isinstance(value, dict) else []


def _dicts(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
