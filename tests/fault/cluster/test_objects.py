"""The cluster store in an object store."""

import time
from collections.abc import Iterator

import pytest

from evermesh.fault.cluster import shelf
from evermesh.fault.cluster.identity import NodeIdentity
from evermesh.fault.cluster.records import Evidence
from evermesh.fault.cluster.store import ClusterStore
from tests.checkpoint.object_store import TestStore, object_store


@pytest.fixture(scope="module")
def objects() -> Iterator[TestStore]:
    with object_store() as store:
        yield store


def test_two_writers_of_an_object_store_lose_nothing_and_days_are_merged(
    objects: TestStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "_LARGEST_OBJECT", 400)  # the third record begins another object
    place, now_s = objects.place(), time.time()
    one, other = ClusterStore(place), ClusterStore(place)
    records = [
        Evidence(time_s=now_s - 10 + number, node=NodeIdentity(name="a/b"), kind="k", text=f"{number}")
        for number in range(8)
    ]
    for number, record in enumerate(records):
        (one, other)[number % 2].add([record])
    assert ClusterStore(place).read().records == tuple(records)
    later_s = now_s + 4 * 86400.0
    assert len(one._files()) > 2
    one.tidy(later_s)
    assert len(one._files()) == 1
    assert ClusterStore(place).read().records == tuple(records)
