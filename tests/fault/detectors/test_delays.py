"""The delay matrix: what is slow is found, and nothing where all is well."""

import numpy as np
import pytest

from evermesh.fault.detectors.delays import Delays, blame, second_permutation
from tests.fault.detectors.matrices import drawn, rings


@pytest.mark.parametrize("what", ["source", "destination"])
def test_a_slow_end_is_found(what: str) -> None:
    random = np.random.default_rng(0)
    found = [_is_found(drawn(random, rings(random, 64, 4), what, 1.5)) for _ in range(40)]
    assert sum(found) >= 38


def test_a_slow_link_is_found_next_to_its_history() -> None:
    random = np.random.default_rng(0)
    found = [_is_found(drawn(random, rings(random, 64, 4), "link", 2.0, with_history=True)) for _ in range(40)]
    assert sum(found) >= 38


def test_a_node_that_is_slow_both_ways_is_one_finding() -> None:
    random = np.random.default_rng(0)
    delays, (node, _), _ = drawn(random, rings(random, 64, 4), "node", 2.0)
    blamed = blame(delays)
    assert blamed is not None
    assert (blamed.what, blamed.source) == ("node", node)


def test_nothing_is_blamed_where_all_is_well() -> None:
    random = np.random.default_rng(0)
    assert not any(blame(drawn(random, rings(random, 64, 4), "nothing", 1.0)[0]) for _ in range(150))


def test_one_ring_is_ambiguous_and_a_second_permutation_is_not() -> None:
    random = np.random.default_rng(0)
    ring = list(range(32))
    edges = np.array([(place, (place + 1) % 32) for place in ring])
    blamed = blame(drawn(random, edges, "source", 3.0)[0])
    assert blamed is not None
    assert blamed.is_ambiguous
    both = np.concatenate([edges, np.array(second_permutation(ring))])
    delays, (node, _), _ = drawn(random, both, "source", 3.0)
    blamed = blame(delays)
    assert blamed is not None
    assert (blamed.what, blamed.source, blamed.is_ambiguous) == ("source", node, False)


@pytest.mark.parametrize("size", [3, 4, 5, 8, 12, 63, 64])
def test_the_second_permutation_is_another_one(size: int) -> None:
    ring = list(range(10, 10 + size))
    edges = second_permutation(ring)
    first = {(ring[place], ring[(place + 1) % size]) for place in range(size)}
    assert sorted(source for source, _ in edges) == sorted(target for _, target in edges) == ring
    assert not first & set(edges)
    assert all(source != target for source, target in edges)


def test_too_few_edges_say_nothing() -> None:
    edge = np.array([0, 1])
    assert blame(Delays(edge, edge[::-1], np.array([[1.0, 9.0]] * 20))) is None


def _is_found(case: tuple[Delays, tuple[int, int], str]) -> bool:
    delays, (source, target), what = case
    blamed = blame(delays)
    if blamed is None or blamed.what != what:
        return False
    return blamed.source == source and (what != "link" or blamed.target == target)
