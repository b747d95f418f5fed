"""Which destination a task goes to. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tesapi.backends.base import Backend, Capacity


@dataclass(frozen=True, slots=True)
class Destination:
    """One configured backend under its name."""

    name: str
    backend: Backend


@dataclass(frozen=True, slots=True)
class NowhereToGo:
    """Why no destination can ever run a task, as a sentence."""

    sentence: str


def choose(cpu_cores: int, ram_gb: float, destinations: Sequence[tuple[str, Capacity]]) -> str | NowhereToGo:
    """The name of the destination for a task that needs so much, or a sentence on why there is none."""
    reasons: list[str] = []
    for name, capacity in destinations:
        reason = _unfit(cpu_cores, ram_gb, capacity)
        if reason is None:
            return name
        reasons.append(f"{name} {reason}")
    needed = f"{cpu_cores} CPU core{'s' if cpu_cores > 1 else ''}" + (f" and {ram_gb:g} GB of memory" if ram_gb else "")
    has = "; ".join(reasons) or "no destination is configured"
    return NowhereToGo(f"The task needs {needed}, and fits nowhere: {has}.")


def _unfit(cpu_cores: int, ram_gb: float, capacity: Capacity) -> str | None:
    if cpu_cores > capacity.cpu_cores:
        return f"gives {capacity.cpu_cores} CPU cores"
    if ram_gb > capacity.ram_gb:
        return f"gives {capacity.ram_gb:.1f} GB of memory"
    return None
