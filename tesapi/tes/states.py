"""The life of a task as one table; every change of a state anywhere is looked up here."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """The states of TES 1.1. This server never gives UNKNOWN, PAUSED or PREEMPTED; filters may ask for them."""

    UNKNOWN = "UNKNOWN"
    QUEUED = "QUEUED"
    INITIALIZING = "INITIALIZING"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    COMPLETE = "COMPLETE"
    EXECUTOR_ERROR = "EXECUTOR_ERROR"
    SYSTEM_ERROR = "SYSTEM_ERROR"
    CANCELED = "CANCELED"
    PREEMPTED = "PREEMPTED"
    CANCELING = "CANCELING"


_SETTLED = frozenset({State.COMPLETE, State.EXECUTOR_ERROR, State.SYSTEM_ERROR, State.CANCELED})

# CANCELING leads to CANCELED even where the job had just come to its own end: the user was told that it is being
# canceled, and the downstream resources are gone, which is all that CANCELED says.
TRANSITIONS: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.INITIALIZING, State.CANCELING}) | _SETTLED,
    State.INITIALIZING: frozenset({State.RUNNING, State.CANCELING}) | _SETTLED,
    State.RUNNING: frozenset({State.CANCELING}) | _SETTLED,
    State.CANCELING: frozenset({State.CANCELED, State.SYSTEM_ERROR}),
    State.COMPLETE: frozenset(),
    State.EXECUTOR_ERROR: frozenset(),
    State.SYSTEM_ERROR: frozenset(),
    State.CANCELED: frozenset(),
}


def is_settled(state: State) -> bool:
    """Whether `state` is final."""
    return state in _SETTLED


def advance(state: State, to: State) -> State:
    """`to` where the table allows the step from `state`, else `state`."""
    return to if to in TRANSITIONS[state] else state
