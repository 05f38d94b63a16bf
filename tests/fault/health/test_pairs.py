"""Pairs of nodes: who meets whom, and whom the results name. The oracle is every possible fault of small jobs."""

import math
from itertools import combinations

import pytest

from evermesh.fault.health.probes.link import LinkResult
from evermesh.fault.health.probes.pairs import Faults, Pair, find_faults, is_good, judge_pairs, rounds

SIZES = (*range(2, 24), 31, 32, 33, 64, 100, 257)
FAST = 10e9


@pytest.mark.parametrize("nodes", SIZES)
def test_rounds_are_matchings_without_a_pair_twice_and_few(nodes: int) -> None:
    plan = rounds(nodes)
    for pairs in plan:
        busy = [node for pair in pairs for node in pair]
        assert len(busy) == len(set(busy))
    met = [pair for pairs in plan for pair in pairs]
    assert len(met) == len(set(met))
    assert all(0 <= a < b < nodes for a, b in met)
    if nodes <= 16:
        assert len(met) == nodes * (nodes - 1) // 2
        assert len(plan) == nodes - 1 + nodes % 2
    else:
        assert len(plan) <= 3 * math.ceil(math.log2(nodes))
        assert {(node, node + 1) for node in range(nodes - 1)} | {(0, nodes - 1)} <= set(
            met
        )  # the ring of a collective
        least = min(sum(node in pair for pair in met) for node in range(nodes))
        assert least >= 2 * math.floor(math.log2(nodes)) - 1
    assert rounds(1) == []


def outcome(met: list[Pair], nodes: frozenset[int], links: frozenset[Pair]) -> dict[Pair, bool]:
    """What pairs show where these are bad."""
    return {pair: pair not in links and not nodes & set(pair) for pair in met}


@pytest.mark.parametrize("nodes", [nodes for nodes in SIZES if nodes <= 64])
def test_every_single_bad_node_and_every_single_bad_link_is_named_and_nothing_else(nodes: int) -> None:
    met = [pair for pairs in rounds(nodes) for pair in pairs]
    assert find_faults(outcome(met, frozenset(), frozenset())) == Faults(frozenset(), frozenset(), frozenset())
    for node in range(nodes):
        found = find_faults(outcome(met, frozenset({node}), frozenset()))
        if nodes == 2:  # nobody can tell which of the two it is
            assert found == Faults(frozenset(), frozenset(), frozenset({(0, 1)}))
        else:
            assert found == Faults(frozenset({node}), frozenset(), frozenset())
    for link in met if nodes > 2 else []:
        assert find_faults(outcome(met, frozenset(), frozenset({link}))) == Faults(
            frozenset(), frozenset({link}), frozenset()
        )


@pytest.mark.parametrize("nodes", range(3, 10))
def test_two_faults_are_named_wherever_no_other_two_would_look_the_same(nodes: int) -> None:
    met = [pair for pairs in rounds(nodes) for pair in pairs]
    faults = [(frozenset({node}), frozenset[Pair]()) for node in range(nodes)]
    faults += [(frozenset[int](), frozenset({link})) for link in met]
    hypotheses = [*faults, *((a[0] | b[0], a[1] | b[1]) for a, b in combinations(faults, 2))]
    by_outcome: dict[tuple[bool, ...], list[tuple[frozenset[int], frozenset[Pair]]]] = {}
    for nodes_, links in hypotheses:
        links = frozenset(link for link in links if not nodes_ & set(link))  # of a bad node no link is seen
        explained = by_outcome.setdefault(tuple(outcome(met, nodes_, links).values()), [])
        explained += [] if (nodes_, links) in explained else [(nodes_, links)]
    exact = unclear = 0
    for seen, causes in by_outcome.items():
        good = dict(zip(met, seen, strict=True))
        found = find_faults(good)
        told = outcome(met, found.nodes, found.links | found.unclear)
        assert told == good, "what is named explains everything that was seen"
        if found.unclear:
            unclear += 1
            assert len(causes) > 1 or nodes == 3
        elif len(causes) == 1:
            assert (found.nodes, found.links) == causes[0]
            exact += 1
        else:
            assert (found.nodes, found.links) in causes
    assert exact > 0
    assert nodes <= 4 or not unclear


def test_a_node_is_slow_where_all_its_pairs_are_and_a_link_where_one_is() -> None:
    met = [pair for pairs in rounds(6) for pair in pairs]
    slow_node = {pair: LinkResult(FAST / 5 if 2 in pair else FAST, 1e-5) for pair in met}
    assert find_faults(is_good(slow_node)).nodes == {2}
    slow_link = {pair: LinkResult(FAST / 5 if pair == (1, 4) else FAST, 1e-5) for pair in met}
    assert find_faults(is_good(slow_link)).links == {(1, 4)}
    three = {(0, 1): LinkResult(FAST / 5), (0, 2): LinkResult(FAST), (1, 2): LinkResult(FAST / 5)}
    assert find_faults(is_good(three)).nodes == {1}  # most pairs are slow, and still one node is
    assert all(is_good({pair: LinkResult(FAST * (0.8 + 0.01 * sum(pair))) for pair in met}).values())


def test_verdicts_name_nodes_and_say_what_was_seen() -> None:
    names = ["alpha", "beta", "gamma", "delta"]
    met = [pair for pairs in rounds(4) for pair in pairs]
    [fine] = judge_pairs(names, {pair: LinkResult(FAST, 1e-5) for pair in met})
    assert (fine.state, fine.numbers["pairs"]) == ("ok", 6)
    cut = {pair: LinkResult(failed="timed out") if 1 in pair else LinkResult(FAST, 1e-5) for pair in met}
    [node] = judge_pairs(names, cut)
    assert (node.check, node.state) == ("network of beta", "bad")
    assert "3 of 3 connections failed (timed out)" in node.reason
    [link] = judge_pairs(names, {pair: LinkResult(FAST / 9 if pair == (0, 3) else FAST) for pair in met})
    assert link.check == "network between alpha and delta"
    [both] = judge_pairs(names[:2], {(0, 1): LinkResult(failed="refused")})
    assert both.reason == "one of them, or the link: refused"
