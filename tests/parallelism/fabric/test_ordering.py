"""The order of nodes against all orders of small clusters, and against the given one of larger ones."""

import itertools

import numpy as np
import pytest

from evermesh.parallelism import Layout
from evermesh.parallelism.fabric.building import leaf_spine
from evermesh.parallelism.fabric.exchanges import Exchange, Messages
from evermesh.parallelism.fabric.ordering import bytes_between, crossing_bytes, order_nodes
from evermesh.parallelism.mesh import Mesh
from evermesh.parallelism.topology import Topology
from tests.parallelism.fabric.jobs import exchanges_of


def _messages(between: np.ndarray) -> list[Exchange]:
    senders, receivers = np.nonzero(between)
    return [Messages("x", "hdp", "send", senders, receivers, between[senders, receivers])]


def _shuffled(topology: Topology, seed: int) -> Topology:
    order = np.random.default_rng(seed).permutation(len(topology.nodes))
    return topology.model_copy(update={"nodes": tuple(topology.nodes[at] for at in order)})


@pytest.mark.parametrize("seed", range(12))
def test_seven_nodes_are_close_to_the_best_of_all_orders_and_never_worse_than_given(seed: int) -> None:
    draw = np.random.default_rng(seed)
    topology = _shuffled(leaf_spine(7, cards=1, nodes_per_block=3), seed)
    between = draw.integers(0, 20, (7, 7)) * (draw.random((7, 7)) < 0.5).astype(float)
    np.fill_diagonal(between, 0.0)
    found = order_nodes(topology, _messages(between))
    blocks = [node.rack for node in topology.nodes]
    numbers = [sorted(set(blocks), key=str).index(block) for block in blocks]
    best = min(crossing_bytes(between, [numbers[node] for node in order]) for order in itertools.permutations(range(7)))
    assert found.crossing_bytes == crossing_bytes(between, [numbers[node] for node in found.nodes])
    assert best <= found.crossing_bytes <= min(1.1 * best, found.given_bytes)
    assert sorted(found.nodes) == list(range(7))


@pytest.mark.parametrize("seed", range(3))
def test_shuffled_nodes_are_put_where_rings_cross_as_little_as_they_can(seed: int) -> None:
    """Two stages of 8 nodes in blocks of 4: every stage in two blocks, and each of its rings crosses twice."""
    topology = _shuffled(leaf_spine(16, cards=4, nodes_per_block=4), seed)
    layout = Layout(hdp=8, tp=4, pp=2, capacity=1 << 20)
    exchanges = exchanges_of(layout, topology)
    sorted_nodes = leaf_spine(16, cards=4, nodes_per_block=4)
    in_order = order_nodes(sorted_nodes, exchanges, improves=False)
    assert in_order.nodes == tuple(range(16))
    found = order_nodes(topology, exchanges)
    assert found.crossing_bytes <= in_order.crossing_bytes * (1 + 1e-9) < found.given_bytes


def test_bytes_between_places_are_those_of_rings_in_rank_order() -> None:
    layout = Layout(hdp=4, tp=2, capacity=1 << 20)
    topology = leaf_spine(4, cards=2, nodes_per_block=2)
    between = bytes_between(exchanges_of(layout, topology), 4, 2)
    assert Mesh.of(layout).groups("hdp") == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert set(zip(*np.nonzero(between), strict=True)) == {(0, 1), (1, 2), (2, 3), (3, 0)}
    assert np.ptp(between[between > 0]) <= 64


def test_one_block_has_no_order_to_look_for() -> None:
    topology = leaf_spine(4, cards=2, nodes_per_block=4)
    found = order_nodes(topology, exchanges_of(Layout(hdp=4, tp=2, capacity=1 << 20), topology), (3, 1, 0, 2))
    assert found == ((3, 1, 0, 2), 0.0, 0.0)
