"""Which destination a task goes to. Pure."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from tesapi.backends.base import Backend, Capacity, Need
from tesapi.jobs.plan import needs
from tesapi.tes.record import TaskRecord

LOCAL_AT = "local@"
"""How the name of a host's own destination begins, on a store that several hosts share."""

_OWN_PARAMETERS = ("destination", "pulsar_manager")


@dataclass(frozen=True, slots=True)
class Site:
    """What the operator says of a destination, as far as tasks choose by it.

    `roots` are the folders that `file://` URLs may name there. `preemptible` places are only for tasks that allow it.
    Destinations of one `group` are size classes of one place, such as the managers of one Pulsar.
    """

    name: str
    kind: str = "local"
    group: str = ""
    manager: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    zones: Sequence[str] = ()
    preemptible: bool = False
    roots: Sequence[str] = ()
    drain: bool = False


@dataclass(frozen=True, slots=True)
class Destination:
    """One configured backend, and what job documents say of storage there."""

    site: Site
    backend: Backend
    storage: Mapping[str, Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class Offer:
    """A destination as it is now: how many jobs are placed there, and a sentence where it takes none.

    `images` are the patterns of the images that it has; None where it can get any.
    """

    site: Site
    capacity: Capacity
    placed: int = 0
    unavailable: str | None = None
    images: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class Wish:
    """What a task asks of the place where it runs."""

    need: Need
    parameters: Mapping[str, str] = field(default_factory=dict)
    zones: Sequence[str] = ()
    preemptible: bool = False
    urls: Sequence[str] = ()
    images: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class NowhereToGo:
    """Why no destination can ever run a task, as a sentence."""

    sentence: str


@dataclass(frozen=True, slots=True)
class NotNow:
    """Why a task has to wait, as a sentence; `full` says that it is only for room."""

    sentence: str
    full: bool


def supported_parameters(sites: Sequence[Site]) -> frozenset[str]:
    """The `backend_parameters` by which a task may choose: what destinations are called, and their labels."""
    if all(site.kind == "local" for site in sites):
        return frozenset()
    return frozenset((*_OWN_PARAMETERS, *(label for site in sites for label in site.labels)))


def wish_of(record: TaskRecord) -> Wish:
    """What the task asks for."""
    task, resources = record.document, record.document.resources
    files = [item.url for item in task.inputs or () if item.url and not item.content]
    return Wish(
        need=Need(*needs(record)),
        parameters=dict(resources.backend_parameters or {}) if resources else {},
        zones=tuple(resources.zones or ()) if resources else (),
        preemptible=bool(resources and resources.preemptible),
        urls=(*files, *(output.url for output in task.outputs or ())),
        images=tuple(dict.fromkeys(executor.image for executor in task.executors)),
    )


def choose(wish: Wish, offers: Sequence[Offer]) -> str | NotNow | NowhereToGo:
    """The name of the destination where the task is best off, or a sentence on why it has to wait, or cannot run.

    Of those that fit and have room, a preemptible one for a task that allows it, then the one least taken up; of size
    classes the smallest.
    """
    zoned = any(offer.site.zones for offer in offers)  # where nobody has zones, they mean nothing here
    refusals = {offer.site.name: _unfit(wish, offer, zoned) for offer in offers}
    fitting = [offer for offer in offers if refusals[offer.site.name] is None]
    if not fitting:
        has = "; ".join(f"{name} {why}" for name, why in refusals.items()) or "no destination is configured"
        return NowhereToGo(f"The task needs {_needed(wish)}, and fits nowhere: {has}.")
    # Whether a path and an image are really to be had there, only the runner knows, and says more exactly.
    reaching = {offer.site.name: _unreachable(wish, offer.site) or _without_image(wish, offer) for offer in fitting}
    if not all(reaching.values()):
        refusals |= reaching
        fitting = [offer for offer in fitting if reaching[offer.site.name] is None]
    free = [offer for offer in fitting if offer.unavailable is None and not offer.site.drain]
    open_ones = [offer for offer in free if offer.placed < offer.capacity.max_jobs]
    if open_ones:
        return min(_smallest_of_each_group(open_ones), key=lambda offer: _taken_up(wish, offer)).site.name
    if len(offers) == 1 and offers[0].unavailable is not None:
        return NotNow(offers[0].unavailable, full=False)
    reasons = "; ".join(
        f"{offer.site.name} {refusals[offer.site.name] or _not_now(offer)}".rstrip(".") for offer in offers
    )
    return NotNow(f"no destination takes it now: {reasons}.", full=bool(free))


def _smallest_of_each_group(offers: Sequence[Offer]) -> list[Offer]:
    smallest: dict[str, Offer] = {}
    for offer in offers:
        group = offer.site.group or offer.site.name
        if group not in smallest or _size(offer.capacity) < _size(smallest[group].capacity):
            smallest[group] = offer
    return list(smallest.values())


def _size(capacity: Capacity) -> tuple[float, float, float]:
    return capacity.cpu_cores or math.inf, capacity.ram_gb or math.inf, capacity.disk_gb or math.inf


def _taken_up(wish: Wish, offer: Offer) -> tuple[bool, float]:
    return wish.preemptible and not offer.site.preemptible, offer.placed / offer.capacity.max_jobs


def _not_now(offer: Offer) -> str:
    if offer.site.drain:
        return "is drained"
    if offer.unavailable is not None:
        return f"is not available ({offer.unavailable.rstrip('.')})"
    return f"has {offer.placed} jobs already"


def _needed(wish: Wish) -> str:
    need = wish.need
    parts = [f"{need.cpu_cores} CPU core{'s' if need.cpu_cores > 1 else ''}"]
    parts += [f"{need.ram_gb:g} GB of memory"] if need.ram_gb else []
    parts += [f"{need.disk_gb:g} GB of disk"] if need.disk_gb else []
    parts += [f"{name}={value}" for name, value in sorted(wish.parameters.items())]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _unfit(wish: Wish, offer: Offer, zoned: bool) -> str | None:
    """Why the task can never run there, or None."""
    need, capacity, site = wish.need, offer.capacity, offer.site
    if capacity.cpu_cores is not None and need.cpu_cores > capacity.cpu_cores:
        return f"gives {capacity.cpu_cores} CPU cores"
    if capacity.ram_gb is not None and need.ram_gb > capacity.ram_gb:
        return f"gives {capacity.ram_gb:.1f} GB of memory"
    if capacity.disk_gb is not None and need.disk_gb > capacity.disk_gb:
        return f"gives {capacity.disk_gb:.1f} GB of disk"
    if site.preemptible and not wish.preemptible:
        return "may stop its jobs (resources.preemptible is not set)"
    if zoned and wish.zones and not set(wish.zones) & set(site.zones):
        return f"is not in {' or '.join(wish.zones)}"
    return _other_parameter(wish, site)


def _other_parameter(wish: Wish, site: Site) -> str | None:
    own = {"destination": site.name, "pulsar_manager": site.manager, **site.labels}
    for name, value in sorted(wish.parameters.items()):
        if own.get(name) != value:
            return f"has {name}={own[name]}" if own.get(name) else f"has no {name}"
    return None


def _unreachable(wish: Wish, site: Site) -> str | None:
    for url in wish.urls:
        path = _file_of(url)
        if path is not None and not any(path.is_relative_to(root) for root in site.roots):
            return f"has no access to {path} (storage.file.roots)"
    return None


def _file_of(url: str) -> PurePosixPath | None:
    """The path that a URL names on the worker, if it does; the runner looks more closely."""
    if url.startswith("/"):
        return PurePosixPath(url)
    parts = urlsplit(url)
    return PurePosixPath(unquote(parts.path)) if parts.scheme == "file" else None


def _without_image(wish: Wish, offer: Offer) -> str | None:
    for image in wish.images:
        if offer.images is not None and not any(fnmatch.fnmatchcase(image, pattern) for pattern in offer.images):
            return f"has nothing for the image {image} (runtime.bubblewrap.images)"
    return None
