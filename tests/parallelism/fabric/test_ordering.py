"""The order of nodes against all orders of small clusters, and against the given one of larger ones."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from evermesh.parallelism import Layout
from evermesh.parallelism.fabric import ordering
from evermesh.parallelism.fabric.building import leaf_spine
from evermesh.parallelism.fabric.even import even_plan
from evermesh.parallelism.fabric.exchanges import Collective, Exchange, Messages, plan_exchanges
from evermesh.parallelism.fabric.model import model_of
from evermesh.parallelism.fabric.ordering import bytes_between, crossing_bytes, order_nodes, take_places
from evermesh.parallelism.mesh import Mesh
from evermesh.parallelism.topology import Leaf, Nic, Node, Topology
from tests.parallelism.fabric.jobs import DENSE, exchanges_of


def _messages(between: np.ndarray) -> list[Exchange]:
    senders, receivers = np.nonzero(between)
    return [Messages("x", "hdp", "send", senders, receivers, between[senders, receivers])]


def _shuffled(topology: Topology, seed: int) -> Topology:
    order = np.random.default_rng(seed).permutation(len(topology.nodes))
    return topology.model_copy(update={"nodes": tuple(topology.nodes[at] for at in order)})


@pytest.mark.parametrize("tried", [0, 5040])
@pytest.mark.parametrize("seed", range(12))
def test_seven_nodes_are_close_to_the_best_of_all_orders_and_never_worse_than_given(
    seed: int, tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As good as the best where all ways are tried."""
    monkeypatch.setattr(ordering, "_MOST_TRIED", tried)
    draw = np.random.default_rng(seed)
    topology = _shuffled(leaf_spine(7, cards=1, nodes_per_block=3), seed)
    between = draw.integers(0, 20, (7, 7)) * (draw.random((7, 7)) < 0.5).astype(float)
    np.fill_diagonal(between, 0.0)
    found = order_nodes(topology, _messages(between))
    blocks = [node.rack for node in topology.nodes]
    numbers = [sorted(set(blocks), key=str).index(block) for block in blocks]
    best = min(crossing_bytes(between, [numbers[node] for node in order]) for order in itertools.permutations(range(7)))
    assert found.crossing_bytes == crossing_bytes(between, [numbers[node] for node in found.nodes])
    assert best <= found.crossing_bytes <= min((1.0 if tried else 1.1) * best, found.given_bytes)
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


FAST = {"infiniband": 400e9, "roce": 200e9}
ETHERNET = Nic(name="eth0", nic_class="ethernet", bytes_per_s=3e9)


def _mixed(classes: str, racks: str) -> Topology:
    """Nodes of two devices with a fast card of a class (i, r) or none (e), and Ethernet, in racks of one letter."""
    kinds = {"i": "infiniband", "r": "roce"}
    nodes = []
    for number, (kind, rack) in enumerate(zip(classes, racks, strict=True)):
        fast = [Nic(name="mlx5_0", nic_class=kinds[kind], bytes_per_s=FAST[kinds[kind]])] if kind in kinds else []
        nics = tuple(nic.model_copy(update={"leaves": (rack,)}) for nic in (*fast, ETHERNET))
        nodes.append(Node(name=f"node{number}", devices=2, nics=nics, rack=rack))
    return Topology(nodes=tuple(nodes), leaves=tuple(Leaf(name=rack, bytes_per_s=1e9) for rack in sorted(set(racks))))


def _slow_bytes(topology: Topology, order: Sequence[int], between: np.ndarray) -> float:
    """What crosses racks once, and what crosses classes as often as the slower fast class is faster than Ethernet."""
    found = 0.0
    for one, other in itertools.permutations(range(len(order)), 2):
        a, b = topology.nodes[order[one]], topology.nodes[order[other]]
        classes = a.nics[0].nic_class, b.nics[0].nic_class
        if classes[0] != classes[1]:
            found += between[one, other] * min(a.nics[0].bytes_per_s, b.nics[0].bytes_per_s) / ETHERNET.bytes_per_s
        elif a.rack != b.rack:
            found += between[one, other]
    return found


@pytest.mark.parametrize(
    ("classes", "racks"),
    [("iiiiii", "ababab"), ("iririr", "aaaaaa"), ("rriirr", "abcabc"), ("ieieie", "abbaab"), ("iirrii", "abcdee")],
)
@pytest.mark.parametrize("degrees", [(1, 12, 1), (2, 6, 1), (3, 2, 2), (2, 3, 2)])
def test_no_order_of_small_clusters_sends_less_over_slow_ways(
    classes: str, racks: str, degrees: tuple[int, int, int]
) -> None:
    pp, hdp, tp = degrees
    layout, topology = Layout(pp=pp, hdp=hdp, tp=tp, capacity=256), _mixed(classes, racks)
    shape = DENSE.model_copy(update={"layers": 6})
    plan = even_plan(layout, context=256, batch_tokens=256 * 4 * hdp)
    exchanges = plan_exchanges(plan, model_of(shape, layout, 2), [rank // 2 for rank in range(12)])
    between = bytes_between(exchanges, 6, 2)
    found = order_nodes(topology, exchanges)
    best = min(_slow_bytes(topology, order, between) for order in itertools.permutations(range(6)))
    assert _slow_bytes(topology, found.nodes, between) == pytest.approx(found.crossing_bytes)
    assert found.crossing_bytes == pytest.approx(best)


def test_stages_take_a_class_of_cards_each_so_that_only_activations_go_between_classes() -> None:
    """Holmes (arXiv 2312.03549): data-parallel groups stay inside one class."""
    layout, topology = Layout(pp=2, hdp=6, capacity=256), _mixed("irirei", "aaaaaa")
    plan = even_plan(layout, context=256, batch_tokens=256 * 24)
    exchanges = plan_exchanges(plan, model_of(DENSE, layout, 2), [rank // 2 for rank in range(12)])
    order = order_nodes(topology, exchanges).nodes
    stages = [{topology.nodes[node].nics[0].nic_class for node in order[first : first + 3]} for first in (0, 3)]
    assert {"infiniband"} in stages


def _sent(exchanges: Sequence[Exchange]) -> dict[str, float]:
    """Bytes by call site; not of rings, of which the planner may want more than a batch needs."""
    found: dict[str, float] = {}
    for one in exchanges:
        if one.call_site.startswith("ring"):
            continue
        ranks = range(len(one.ranks)) if isinstance(one, Collective) else ()
        sizes = one.num_bytes.sum() if isinstance(one, Messages) else sum(one.wire_bytes(at) for at in ranks)
        found[one.call_site] = found.get(one.call_site, 0.0) + float(sizes)
    return found


@pytest.mark.parametrize("degrees", [(1, 8, 1), (2, 4, 1), (2, 2, 2)])
@pytest.mark.parametrize("context", [128, 512])
def test_an_even_batch_sends_what_the_planned_batch_of_equal_sequences_sends(
    degrees: tuple[int, int, int], context: int
) -> None:
    pp, hdp, tp = degrees
    layout, topology = Layout(pp=pp, hdp=hdp, tp=tp, capacity=256), leaf_spine(4, cards=1, devices=2)
    planned = exchanges_of(layout, topology, lengths=[context] * (2048 // context))
    even = even_plan(layout, context, 2048)
    assert {piece.sequence: context for of_rank in even.ranks for one in of_rank for piece in one.pieces} == dict(
        enumerate(even.lengths)
    )
    assert all(one.num_tokens <= layout.capacity for of_rank in even.ranks for one in of_rank)
    nodes = [rank // 2 for rank in range(8)]
    assert _sent(plan_exchanges(even, model_of(DENSE, layout, 2), nodes)) == pytest.approx(_sent(planned))


@pytest.mark.parametrize("seed", range(6))
def test_spares_take_the_places_where_they_fit_and_all_others_stay(seed: int) -> None:
    draw = np.random.default_rng(seed)
    topology = _mixed("".join(draw.choice(list("ire"), 7)), "".join(draw.choice(list("ab"), 7)))
    between = draw.integers(1, 20, (5, 5)).astype(float)
    np.fill_diagonal(between, 0.0)
    given = [0, 1, None, 3, 4]
    found = take_places(topology, _messages(np.kron(between, np.eye(2))), given, [2, 5, 6])
    assert [node for place, node in enumerate(found) if place != 2] == [0, 1, 3, 4]
    costs = {spare: _slow_bytes(topology, [0, 1, spare, 3, 4], 2 * between) for spare in (2, 5, 6)}
    assert costs[found[2]] == pytest.approx(min(costs.values()))


def test_too_few_spares_are_refused() -> None:
    with pytest.raises(ValueError, match="1 spares for 2 free places"):
        take_places(_mixed("iii", "abc"), [], [None, 0, None], [1])
