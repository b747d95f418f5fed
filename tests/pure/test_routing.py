"""Which destination a task goes to, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from tesapi.backends.base import Capacity, Need
from tesapi.dispatch.routing import NotNow, NowhereToGo, Offer, Site, Wish, choose, supported_parameters

SMALL = Offer(Site("small", kind="pulsar_rest"), Capacity(10, cpu_cores=4, ram_gb=32, disk_gb=100))
LARGE = Offer(Site("large", kind="pulsar_rest"), Capacity(10, cpu_cores=64, ram_gb=512))


def at(offer: Offer, placed: int = 0, unavailable: str | None = None, **site: Any) -> Offer:
    """The same destination with more known of it."""
    return replace(offer, placed=placed, unavailable=unavailable, site=replace(offer.site, **site))


def wish(cpu_cores: int = 1, ram_gb: float = 0.0, disk_gb: float = 0.0, **more: Any) -> Wish:
    return Wish(Need(cpu_cores, ram_gb, disk_gb), **more)


@pytest.mark.parametrize(
    ("needs", "name"),
    [
        (wish(4, 32), "small"),
        (wish(5), "large"),
        (wish(1, 33), "large"),
        (wish(1, 0, 101), "large"),
        (wish(64, 512, 1e6), "large"),
    ],
)
def test_a_task_goes_where_it_fits(needs: Wish, name: str) -> None:
    assert choose(needs, [SMALL, LARGE]) == name


@pytest.mark.parametrize(
    ("needs", "sentence"),
    [
        (
            wish(1, 600),
            (
                "The task needs 1 CPU core and 600 GB of memory, and fits nowhere: small gives 32.0 GB of memory; "
                "large gives 512.0 GB of memory."
            ),
        ),
        (
            wish(65),
            "The task needs 65 CPU cores, and fits nowhere: small gives 4 CPU cores; large gives 64 CPU cores.",
        ),
        (
            wish(8, 0, 200, parameters={"destination": "small"}),
            (
                "The task needs 8 CPU cores, 200 GB of disk and destination=small, and fits nowhere: small gives 4 CPU "
                "cores; large has destination=large."
            ),
        ),
        (
            wish(parameters={"gpu": "a100"}),
            "The task needs 1 CPU core and gpu=a100, and fits nowhere: small has no gpu; large has no gpu.",
        ),
    ],
)
def test_a_task_that_fits_nowhere_is_told_why_of_each(needs: Wish, sentence: str) -> None:
    assert choose(needs, [SMALL, LARGE]) == NowhereToGo(sentence)


def test_without_any_destination_a_task_fits_nowhere() -> None:
    sentence = "The task needs 1 CPU core, and fits nowhere: no destination is configured."
    assert choose(wish(), []) == NowhereToGo(sentence)


def test_the_least_taken_up_is_chosen_and_of_equals_the_first() -> None:
    assert choose(wish(), [SMALL, LARGE]) == "small"
    assert choose(wish(), [at(SMALL, 3), at(LARGE, 2)]) == "large"
    assert choose(wish(), [at(SMALL, 3), replace(at(LARGE, 4), capacity=Capacity(100))]) == "large"


def test_a_full_one_is_left_alone_and_when_all_are_full_the_task_waits_for_room() -> None:
    assert choose(wish(), [at(SMALL, 10), at(LARGE, 9)]) == "large"
    told = choose(wish(), [at(SMALL, 10), at(LARGE, 11)])
    sentence = "no destination takes it now: small has 10 jobs already; large has 11 jobs already."
    assert told == NotNow(sentence, full=True)


def test_one_that_is_down_or_drained_takes_nothing_new() -> None:
    assert choose(wish(), [at(SMALL, unavailable="It does not answer."), LARGE]) == "large"
    assert choose(wish(), [at(SMALL, drain=True), LARGE]) == "large"
    told = choose(wish(8, 64), [SMALL, at(LARGE, drain=True)])
    sentence = "no destination takes it now: small gives 4 CPU cores; large is drained."
    assert told == NotNow(sentence, full=False)
    told = choose(wish(), [at(SMALL, unavailable="It does not answer."), at(LARGE, 10)])
    sentence = "no destination takes it now: small is not available (It does not answer); large has 10 jobs already."
    assert told == NotNow(sentence, full=True)


def test_the_only_one_that_is_down_speaks_for_itself() -> None:
    assert choose(wish(), [at(SMALL, unavailable="It does not answer.")]) == NotNow("It does not answer.", full=False)


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"destination": "large"}, "large"),
        ({"pulsar_manager": "slurm"}, "small"),
        ({"gpu": "a100"}, "large"),
        ({"gpu": "a100", "destination": "large"}, "large"),
        ({}, "small"),
    ],
)
def test_parameters_choose_by_name_manager_and_labels(parameters: Mapping[str, str], name: str) -> None:
    offers = [at(SMALL, manager="slurm"), at(LARGE, labels={"gpu": "a100"})]
    assert choose(wish(parameters=parameters), offers) == name


def test_what_a_server_supports_is_what_its_destinations_have() -> None:
    assert supported_parameters([Site("local")]) == frozenset()
    sites = [Site("local"), Site("a", kind="pulsar_rest", labels={"gpu": "x"}), Site("b", kind="pulsar_amqp")]
    assert supported_parameters(sites) == {"destination", "pulsar_manager", "gpu"}


def test_zones_choose_where_destinations_have_them() -> None:
    offers = [at(SMALL, zones=("eu-1", "eu-2")), at(LARGE, zones=("us-1",))]
    assert choose(wish(zones=("us-1", "us-2")), offers) == "large"
    assert choose(wish(), offers) == "small"
    assert isinstance(choose(wish(zones=("asia",)), offers), NowhereToGo)
    assert choose(wish(zones=("asia",)), [SMALL, LARGE]) == "small"  # nobody has zones: they mean nothing here


def test_preemptible_places_are_for_tasks_that_allow_it_and_preferred_by_them() -> None:
    offers = [at(SMALL, preemptible=True), LARGE]
    assert choose(wish(), offers) == "large"
    assert choose(wish(preemptible=True), [LARGE, at(SMALL, 9, preemptible=True)]) == "small"
    assert choose(wish(preemptible=True), [LARGE, at(SMALL, 10, preemptible=True)]) == "large"
    assert isinstance(choose(wish(), offers[:1]), NowhereToGo)


def test_a_task_goes_where_its_files_are_to_be_had() -> None:
    offers = [at(SMALL, roots=("/data",)), at(LARGE, roots=("/scratch", "/data/shared"))]
    assert choose(wish(urls=("file:///data/a",)), offers) == "small"
    assert choose(wish(urls=("file:///data/shared/x", "/scratch/with space")), offers) == "large"
    assert choose(wish(urls=("file:///scratch/with%20space", "https://h/a")), offers) == "large"
    full = [at(SMALL, 10, roots=("/data",)), at(LARGE, roots=("/scratch",))]
    told = choose(wish(urls=("file:///data/a",)), full)
    assert isinstance(told, NotNow)
    assert "large has no access to /data/a (storage.file.roots)" in told.sentence


def test_whether_files_and_images_are_there_is_left_to_the_runner_where_nobody_seems_to_have_them() -> None:
    assert choose(wish(urls=("file:///elsewhere/a",)), [SMALL, LARGE]) == "small"
    assert choose(wish(images=("quay.io/x/y:1",)), [replace(SMALL, images=["alpine:*"])]) == "small"


def test_a_task_goes_where_its_image_is_to_be_had() -> None:
    offers = [replace(SMALL, images=["alpine", "alpine:*"]), LARGE]
    assert choose(wish(images=("alpine:3.20",)), offers) == "small"
    assert choose(wish(images=("alpine:3.20", "quay.io/x/y:1")), offers) == "large"


def test_of_size_classes_the_smallest_that_fits_and_has_room_is_chosen() -> None:
    offers = [at(LARGE, group="hpc"), at(SMALL, group="hpc")]
    assert choose(wish(), offers) == "small"
    assert choose(wish(), [offers[0], at(offers[1], 9)]) == "small"
    assert choose(wish(), [offers[0], at(offers[1], 10)]) == "large"
    assert choose(wish(8), offers) == "large"
