"""The errors of the service, named by who has to act.

TesapiError
├── ConfigurationProblem    the operator: a setting is wrong; the service does not start
│   └── StoreInUse          another process has the store, which serves one at a time
├── CallerProblem           the caller: the request cannot be served as it is
│   ├── InvalidDocument     a field of the request is wrong (each is named by its path)
│   ├── TaskNotFound        no such task, or not this caller's
│   └── KeyReused           an Idempotency-Key came again with another task
├── QueueFull               the caller, later: as many tasks as may be are waiting; nothing was stored
├── DestinationFull         nobody: as many tasks as may be are placed there; one more when one of them is done
├── StoreUnavailable        whoever runs the store: nothing is known to be written; ask again later
├── BackendUnavailable      whoever runs the destination: nothing is known to be wrong with the job; ask again later
└── JobLost                 nobody: the destination has no trace of a job that was placed there
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class TesapiError(Exception):
    """Base of all errors that this service raises on purpose; its text is one sentence for a person."""


class ConfigurationProblem(TesapiError):
    """A setting, or what it points to, keeps the service from starting."""


class StoreInUse(ConfigurationProblem):
    """Another process has the store, and it serves one at a time."""


class CallerProblem(TesapiError):
    """The request cannot be served as it is; repeating it will not help."""


@dataclass(frozen=True, slots=True)
class FieldProblem:
    """One wrong field of a request.

    `field` is its path as in `executors[0].command[2]`, `problem` says what was wrong with it, `allowed` what
    would be right.
    """

    field: str
    problem: str
    allowed: str


class InvalidDocument(CallerProblem):
    """One or more fields of a request are wrong; nothing was stored."""

    def __init__(self, problems: Sequence[FieldProblem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{p.field}: {p.problem} (allowed: {p.allowed})" for p in self.problems))


class TaskNotFound(CallerProblem):
    """There is no such task, or it is somebody else's."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"There is no task {task_id!r}.")


class KeyReused(CallerProblem):
    """The key stands for a task that was made from another document; nothing was stored."""

    def __init__(self, key: str, task_id: str) -> None:
        super().__init__(
            f"The Idempotency-Key {key!r} was sent before with another task, and stands for {task_id}: a new task needs"
            " a new key."
        )


class QueueFull(TesapiError):
    """As many tasks as may be are queued; nothing was stored, and the same request may be taken later."""

    def __init__(self, at_most: int) -> None:
        super().__init__(f"As many tasks are queued as server.max_queued_tasks allows, {at_most}: send it again later.")


class DestinationFull(TesapiError):
    """As many tasks as may be are placed at the destination; nothing was changed."""

    def __init__(self, destination: str, at_most: int) -> None:
        super().__init__(f"{destination} has all the tasks that it may have at once, which is {at_most}.")


class StoreUnavailable(TesapiError):
    """The store did not take or give the record in time; see `TaskStore` on what may have been written."""


class BackendUnavailable(TesapiError):
    """The destination cannot be asked right now; the same call may go through later."""


class JobLost(TesapiError):
    """The destination answers, and has no trace of a job that was placed there."""
