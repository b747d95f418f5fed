"""Who is asking. Without a configured identity provider, everybody is the same anonymous owner."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller; `owner` is the key under which their tasks are kept."""

    owner: str


ANONYMOUS = Identity(owner="anonymous")
