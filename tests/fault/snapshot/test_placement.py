"""Stripes over failure domains: spread as far as can be, whole after a replacement, refused where they would promise
too much."""

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evermesh.fault.snapshot.coding import Code
from evermesh.fault.snapshot.stripes import StripesImpossible
from evermesh.fault.snapshot.stripes.placement import (
    Candidate,
    StripePlan,
    candidates,
    plan_stripes,
    replace_nodes,
)
from evermesh.fault.snapshot.stripes.redundancy import what_to_code
from evermesh.parallelism.topology import Nic, Node, Topology


def _racks(*sizes: int) -> list[Candidate]:
    names = (f"rack{rack}" for rack, size in enumerate(sizes) for _ in range(size))
    return [Candidate(f"node{at:03}", {"rack": rack}) for at, rack in enumerate(names)]


def _survives(plan: StripePlan, lost: set[str]) -> bool:
    return all(sum(node in lost for node in stripe.nodes) <= stripe.code.parity for stripe in plan.stripes)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 7), st.integers(1, 3))
def test_every_node_is_in_one_stripe_and_no_rack_could_be_spread_further(
    sizes: list[int], data: int, parity: int
) -> None:
    nodes = _racks(*sizes)
    code = Code(data, parity)
    if len(nodes) <= parity:
        with pytest.raises(StripesImpossible, match=f"at least {parity + 1}"):
            plan_stripes(nodes, code)
        return
    plan = plan_stripes(nodes, code)
    assert Counter(node for stripe in plan.stripes for node in stripe.nodes) == Counter(node.node for node in nodes)
    assert all(stripe.code == Code(len(stripe.nodes) - parity, parity) for stripe in plan.stripes)
    lengths = [len(stripe.nodes) for stripe in plan.stripes]
    assert max(lengths) - min(lengths) <= 1
    for rack, size in enumerate(sizes):
        held = [
            sum(node.domains["rack"] == f"rack{rack}" for node in nodes if node.node in s.nodes) for s in plan.stripes
        ]
        assert max(held) == -(-size // len(plan.stripes))  # less is impossible: so many nodes, so many stripes


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=6), st.integers(2, 6), st.integers(1, 2))
def test_what_is_said_of_the_loss_of_a_rack_is_what_losing_each_does(sizes: list[int], data: int, parity: int) -> None:
    nodes = _racks(*sizes)
    if len(nodes) <= parity:
        return
    plan = plan_stripes(nodes, Code(data, parity))
    racks = [{node.node for node in nodes if node.domains["rack"] == f"rack{rack}"} for rack in range(len(sizes))]
    [guarantee] = plan.guarantees
    assert guarantee.survives == all(_survives(plan, rack) for rack in racks)
    assert bool(plan.warnings) != guarantee.survives


def test_rails_that_cross_racks_are_spread_too() -> None:
    nodes = [
        Candidate(f"{rack}-{rail}", {"rack": f"r{rack}", "rail": f"l{rail}"}) for rack in range(8) for rail in range(8)
    ]
    plan = plan_stripes(nodes, Code(6, 2))
    assert [(found.kind, found.worst, found.survives) for found in plan.guarantees] == [
        ("rack", 1, True),
        ("rail", 1, True),
    ]


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=60), st.integers(2, 7))
def test_neither_racks_nor_rails_could_be_spread_further(labels: list[tuple[int, int]], parts: int) -> None:
    nodes = [Candidate(f"{at}", {"rack": f"{rack}", "rail": f"{rail}"}) for at, (rack, rail) in enumerate(labels)]
    plan = plan_stripes(nodes, Code(parts - 1, 1))
    lengths = [len(stripe.nodes) for stripe in plan.stripes]
    assert max(lengths) - min(lengths) <= 1
    for kind in ("rack", "rail"):
        for domain, size in Counter(node.domain(kind) for node in nodes).items():
            held = [sum(nodes[int(node or 0)].domain(kind) == domain for node in s.nodes) for s in plan.stripes]
            assert max(held) == -(-size // len(plan.stripes))


def test_switches_within_racks_are_spread_with_them() -> None:
    nodes = [
        Candidate(f"{rack}.{switch}.{at}", {"rack": f"r{rack}", "switch": f"{rack}.{switch}"})
        for rack in range(4)
        for switch in range(2)
        for at in range(4)
    ]
    plan = plan_stripes(nodes, Code(6, 2))
    assert [(found.kind, found.worst) for found in plan.guarantees] == [("rack", 2), ("switch", 1)]
    assert not plan.warnings


def test_too_few_racks_are_refused_by_number_where_one_must_be_survived() -> None:
    nodes = _racks(8, 8)
    plan = plan_stripes(nodes, Code(6, 2))
    assert [guarantee.worst for guarantee in plan.guarantees] == [4]
    assert "costs a stripe up to 4 members, but it tolerates 2: 2 racks are too few" in plan.warnings[0]
    with pytest.raises(StripesImpossible, match="at most 4 parts with 2 of parity"):
        plan_stripes(nodes, Code(6, 2), must_survive=["rack"])
    assert plan_stripes(nodes, Code(2, 2), must_survive=["rack"]).guarantees[0].survives


@pytest.mark.parametrize(
    ("racks", "code"),
    [
        ((2,), Code(1, 1)),
        ((1, 1, 1), Code(2, 1)),
        ((1, 1, 1, 1), Code(3, 1)),
        ((2, 2, 2), Code(4, 2)),
        ((4, 4, 4, 4), Code(6, 2)),
        ((16, 16, 16), Code(4, 2)),
        ((16, 16), Code(6, 2)),
        (tuple([1] * 64), Code(6, 2)),
    ],
)
def test_auto_takes_a_code_that_survives_a_rack_where_half_the_memory_is_enough(
    racks: tuple[int, ...], code: Code
) -> None:
    nodes = _racks(*racks)
    plan = plan_stripes(nodes)
    assert {stripe.code for stripe in plan.stripes} == {code}
    assert plan.guarantees[0].survives == (len(racks) > 2 or (len(nodes) > 16 and len(racks) > 2))


def test_one_node_cannot_be_protected() -> None:
    with pytest.raises(StripesImpossible, match="1 nodes cannot keep 1 parity parts"):
        plan_stripes(_racks(1))


def test_a_spare_takes_the_place_of_a_lost_node_and_nobody_else_moves() -> None:
    nodes = _racks(4, 4, 4, 4)
    plan = plan_stripes(nodes, Code(6, 2))
    spares = [Candidate("spare-a", {"rack": "rack0"}), Candidate("spare-b", {"rack": "rack9"})]
    lost = plan.stripes[1].nodes[3]
    assert lost is not None
    after = replace_nodes(plan, nodes, [lost], spares)
    assert after.stripes[0] == plan.stripes[0]
    assert after.stripes[1].nodes[3] == "spare-b"  # its rack is new to the stripe
    assert (
        after.stripes[1].nodes[:3] + after.stripes[1].nodes[4:] == plan.stripes[1].nodes[:3] + plan.stripes[1].nodes[4:]
    )
    assert after.stripe_of("spare-b") == (1, 3)


def test_a_place_that_nobody_takes_stays_empty_and_weakens_what_is_promised() -> None:
    nodes = _racks(2, 2, 2, 2)
    plan = plan_stripes(nodes, Code(6, 2))
    assert plan.guarantees[0].survives
    [stripe] = plan.stripes
    after = replace_nodes(plan, nodes, [stripe.nodes[0] or ""], [])
    assert after.stripes[0].nodes == (None, *stripe.nodes[1:])
    assert (after.guarantees[0].worst, after.guarantees[0].tolerated) == (2, 1)


def test_nodes_of_a_cluster_bring_what_is_known_of_them() -> None:
    fast = {"nic_class": "infiniband", "bytes_per_s": 5e10}
    nodes = (
        Node(name="a", devices=8, rack="r1", switch="s1", nics=(Nic(name="ib0", rail=1, **fast),)),
        Node(name="b", devices=8, nics=tuple(Nic(name=f"ib{rail}", rail=rail, **fast) for rail in (0, 1))),
    )
    found = candidates(Topology(nodes=nodes))
    assert [dict(node.domains) for node in found] == [{"rack": "r1", "switch": "s1", "rail": "1"}, {}]
    assert candidates(Topology.model_validate_json(Topology(nodes=nodes).model_dump_json())) == found


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 7), st.integers(1, 2), st.integers(0, 10**6))
def test_coded_and_copied_regions_together_survive_every_loss_and_nothing_is_coded_in_vain(
    num_nodes: int, tolerance: int, seed: int
) -> None:
    drawn = random.Random(seed)
    holders = {region: frozenset(drawn.sample(range(num_nodes), drawn.randint(1, num_nodes))) for region in range(12)}
    sizes = {region: drawn.randint(1, 100) for region in holders}
    need = what_to_code(holders, sizes, tolerance)
    owner = {region: node for node, regions in need.coded.items() for region in regions}
    assert sorted([*owner, *need.copied]) == sorted(holders)
    assert all(node in holders[region] for region, node in owner.items())
    for lost in map(set, itertools.combinations(range(num_nodes), min(tolerance, num_nodes))):
        assert all(holders[region] - lost for region in need.copied)
    for region in owner:  # coded only where some loss within the tolerance takes all copies
        assert any(holders[region] <= set(lost) for lost in itertools.combinations(range(num_nodes), tolerance))
    for node, num_bytes in need.coded_bytes.items():
        assert num_bytes == sum(sizes[region] for region in need.coded.get(node, ()))


def test_copies_in_one_rack_do_not_count_as_copies_of_several() -> None:
    holders = {"weights": {0, 1}, "moments": {0, 2}}
    need = what_to_code(holders, {"weights": 5, "moments": 7}, 1, domain=lambda node: node // 2)
    assert (need.coded, need.copied) == ({0: ("weights",)}, ("moments",))


def test_owners_share_what_any_of_them_could_bring() -> None:
    need = what_to_code({region: {0, 1, 2} for region in range(9)}, dict.fromkeys(range(9), 10), 3)
    assert need.coded_bytes == {0: 30, 1: 30, 2: 30}
