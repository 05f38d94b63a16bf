"""What cards send: totals of the ledger's formula, trees of NCCL, rails kept and left."""

from collections import Counter

import numpy as np
import pytest

from evermesh.parallelism import Layout
from evermesh.parallelism.cost import ModelShape
from evermesh.parallelism.fabric.building import leaf_spine
from evermesh.parallelism.fabric.exchanges import SMALL, Collective, Messages, plan_exchanges
from evermesh.parallelism.fabric.flows import Flows, flows_of
from evermesh.parallelism.fabric.model import model_of
from evermesh.parallelism.fabric.paths import Connections
from evermesh.parallelism.fabric.rails import rail_report
from evermesh.parallelism.fabric.trees import parents
from evermesh.parallelism.fabric.wiring import Wiring
from evermesh.parallelism.traffic import plan_traffic
from tests.parallelism.fabric.jobs import DENSE, MIXTURE, exchanges_of, plan_of

LAYOUTS = [
    ({"hdp": 8, "tp": 2}, DENSE, None),
    ({"hdp": 2, "tp": 8}, DENSE, None),
    ({"hdp": 4, "tp": 2, "pp": 2, "schedule": "zero-bubble"}, DENSE, None),
    (
        {"hdp": 4, "tp": 2, "pp": 2, "schedule": "interleaved-1f1b", "virtual_stages": 2, "activations": "recompute"},
        DENSE,
        None,
    ),
    ({"hdp": 16, "sharding": {"parameters": 4, "gradients": 8, "keep_for": "micro_batch"}}, DENSE, None),
    ({"hdp": 8, "tp": 2, "capacity": 512}, DENSE, [3000, 700, 100, 900]),
    ({"hdp": 2, "tp": 2, "pp": 4}, DENSE.model_copy(update={"tied_embeddings": True}), None),
]


@pytest.mark.parametrize(("layout", "shape", "lengths"), LAYOUTS, ids=lambda value: str(value)[:50])
def test_flows_add_up_to_the_bytes_of_the_ledgers_formula_between_nodes(
    layout: dict[str, object], shape: ModelShape, lengths: list[int] | None
) -> None:
    chosen = Layout.model_validate({"capacity": 1 << 12} | layout)
    topology = leaf_spine(4, cards=4, nodes_per_block=2)
    nodes, model = [rank // 4 for rank in range(16)], model_of(shape, chosen, 2)
    plan = plan_of(chosen, lengths)
    counted: Counter[tuple[str, str, str]] = Counter()
    for part in plan_traffic(plan, model, nodes):
        if part.tier == "network" and part.call_site not in SMALL:
            counted[part.axis, part.call_site, part.operation] += part.wire_bytes
    flows = flows_of(plan_exchanges(plan, model, nodes), Wiring.of(topology))
    found = {tuple(label): flows.num_bytes[flows.label == at].sum() for at, label in enumerate(flows.labels)}
    assert found == pytest.approx(dict(+counted), rel=1e-12)
    assert counted
    assert Connections.of(flows).num_bytes.sum() == pytest.approx(flows.total_bytes)


def test_experts_that_are_chosen_equally_send_every_rank_as_much() -> None:
    """Per pair, layer and micro-batch: rows there and back, forward and backward, top_k / ep of the sender's tokens."""
    layout = Layout(hdp=8, ep=8, capacity=1 << 12)
    found = [one for one in exchanges_of(layout, leaf_spine(4, cards=2), MIXTURE) if one.axis == "ep"]
    rows = 4 * 256 * 2 / 8
    for one in found:
        assert isinstance(one, Messages)
        assert one.call_site in ("expert forward", "expert backward")
        assert len(one.senders) == 8 * 6  # the two of a node send nothing over the network
        assert one.num_bytes == pytest.approx(2 * 4 * rows * 256 * 2)
    assert len(found) == 2


@pytest.mark.parametrize("number", [*range(2, 20), 64, 127])
def test_two_trees_have_all_members_once_and_none_is_inside_of_both(number: int) -> None:
    inside = []
    for above in parents(number):
        assert above.count(None) == 1
        for member in range(number):
            at, hops = member, 0
            while (parent := above[at]) is not None:
                at, hops = parent, hops + 1
            assert hops <= number.bit_length()
        children = Counter(parent for parent in above if parent is not None)
        assert max(children.values()) <= 2
        root = above.index(None)
        inside.append({member for member in children if member != root})
    assert not inside[0] & inside[1]


def test_the_first_tree_is_that_of_nccls_source() -> None:
    """The picture in its comment: 0 above 8, 8 above 4 and 12, and so on, 14 members."""
    assert parents(14)[0] == (None, 2, 4, 2, 8, 6, 4, 6, 0, 10, 12, 10, 8, 12)


def _all_reduce(ranks: tuple[int, ...]) -> Collective:
    return Collective("gradients", "hdp", "all_reduce", ranks, ((1000.0, 1.0),))


def _by_pair(flows: Flows) -> dict[tuple[int, int], float]:
    ends = zip(flows.source.tolist(), flows.target.tolist(), strict=True)
    return dict(zip(ends, flows.num_bytes.tolist(), strict=True))


def test_a_ring_visits_nodes_in_turn_over_all_cards_of_its_ranks() -> None:
    wiring = Wiring.of(leaf_spine(3, cards=4))
    found = _by_pair(flows_of([_all_reduce(tuple(range(12)))], wiring))
    assert set(found) == {(4 * a + rail, 4 * b + rail) for a, b in ((0, 1), (1, 2), (2, 0)) for rail in range(4)}
    assert list(found.values()) == pytest.approx([2 * 11 / 12 * 1000 / 4] * 12, abs=1)
    of_two = _by_pair(flows_of([_all_reduce((1, 5, 9))], wiring))
    assert set(of_two) == {(1, 5), (5, 9), (9, 1)}


def test_a_tree_sends_as_many_bytes_as_a_ring_of_nodes() -> None:
    wiring = Wiring.of(leaf_spine(5, cards=2))
    tree, ring = (flows_of([_all_reduce((0, 2, 4, 6, 8))], wiring, algorithm=name) for name in ("tree", "ring"))
    assert tree.total_bytes == pytest.approx(ring.total_bytes) == 2 * 4 * 1000
    assert rail_report(tree, wiring)[0].rail_bytes == 0


def test_messages_keep_the_rail_of_their_receiver_unless_they_must_not() -> None:
    wiring = Wiring.of(leaf_spine(2, cards=4, nodes_per_block=1))
    one = Messages("expert forward", "ep", "all_to_all", np.array([0, 1]), np.array([5, 7]), np.array([8.0, 8.0]))
    assert set(_by_pair(flows_of([one], wiring))) == {(1, 5), (3, 7)}
    without = flows_of([one], wiring, pxn=False)
    assert set(_by_pair(without)) == {(0, 5), (1, 7)}
    assert rail_report(without, wiring)[0].rail_bytes == 16


def test_devices_share_cards_in_order_and_nodes_without_a_common_rail_take_turns() -> None:
    topology = leaf_spine(2, cards=2, devices=4)
    wiring = Wiring.of(topology)
    assert [wiring.card_of(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    other = topology.nodes[1].nics
    moved = tuple(nic.model_copy(update={"rail": nic.rail + 2}) for nic in other)
    nodes = topology.nodes[0], topology.nodes[1].model_copy(update={"nics": moved})
    apart = Wiring.of(topology.model_copy(update={"nodes": nodes}))
    flows = flows_of([_all_reduce(tuple(range(8)))], apart)
    assert set(_by_pair(flows)) == {(0, 2), (1, 3), (2, 0), (3, 1)}
    assert rail_report(flows, apart)[0].rail_bytes == pytest.approx(flows.total_bytes)


def test_the_report_says_what_leaves_rails_leaves_and_racks() -> None:
    topology = leaf_spine(4, cards=2, nodes_per_block=2)
    wiring = Wiring.of(topology)
    rows = {row.label: row for row in rail_report(flows_of([_all_reduce((0, 2, 4, 6))], wiring), wiring)}
    (row,) = rows.values()
    assert (row.node_bytes, row.rail_bytes) == (6000.0, 0.0)
    assert row.leaf_bytes == row.rack_bytes == 3000.0  # of four hops two leave a block
