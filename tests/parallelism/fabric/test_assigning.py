"""Streams on spines: against all choices on small networks, linear programming on larger ones, and what is proven."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from evermesh.parallelism.errors import TrafficImpossible
from evermesh.parallelism.fabric.assigning import assign, choose_spines
from evermesh.parallelism.fabric.bounds import lower_bound
from evermesh.parallelism.fabric.building import leaf_spine
from evermesh.parallelism.fabric.colouring import colour_edges, spread_evenly
from evermesh.parallelism.fabric.hashing import hashed
from evermesh.parallelism.fabric.paths import DIRECT, Connections, Loads, Paths, split
from evermesh.parallelism.fabric.wiring import Wiring
from tests.parallelism.fabric.networks import best_by_trying_all, connections, ring


def _small(nodes: int = 6, spines: int = 2, per_block: int = 2) -> Wiring:
    """One card and one port for each node; links and ports of one byte per second."""
    topology = leaf_spine(
        nodes,
        cards=1,
        ports=1,
        port_bytes_per_s=1e3,
        nodes_per_block=per_block,
        spines=spines,
        uplink_bytes_per_s=1.0,
    )
    return Wiring.of(topology)


def _pairs(nodes: int, largest: int) -> st.SearchStrategy[list[tuple[int, int, float]]]:
    ends = st.tuples(st.integers(0, nodes - 1), st.integers(0, nodes - 1), st.integers(1, largest).map(float))
    return st.lists(
        ends.filter(lambda pair: pair[0] != pair[1]), min_size=1, max_size=7, unique_by=lambda pair: pair[:2]
    )


@settings(deadline=None, max_examples=60)
@given(pairs=_pairs(6, 1), spines=st.integers(2, 3))
def test_streams_of_one_size_have_the_optimum_and_it_is_proven(
    pairs: list[tuple[int, int, float]], spines: int
) -> None:
    wiring = _small(spines=spines)
    found = assign(connections(pairs), wiring)
    most, squares = best_by_trying_all(found.paths, wiring)
    assert (found.loads.most, found.loads.sum_of_squares) == pytest.approx((most, squares))
    assert found.is_optimal


@settings(deadline=None, max_examples=60)
@given(pairs=_pairs(6, 9), spines=st.integers(2, 3))
def test_streams_of_any_size_are_within_the_proven_bound_of_the_optimum(
    pairs: list[tuple[int, int, float]], spines: int
) -> None:
    wiring = _small(spines=spines)
    found = assign(connections(pairs), wiring)
    best, _ = best_by_trying_all(found.paths, wiring)
    assert found.bound.seconds <= best * (1 + 1e-9)
    largest = max(size for *_, size in pairs)
    assert (
        best <= found.loads.most * (1 + 1e-9) <= (_most_per_leaf(found.paths, wiring) / spines + largest) * (1 + 1e-9)
    )


def _most_per_leaf(paths: Paths, wiring: Wiring) -> float:
    at = paths.crossing(wiring)
    ends = (wiring.port_leaf[port[at]] for port in (paths.source_port, paths.target_port))
    return max((float(np.bincount(leaf, paths.num_bytes[at]).max(initial=0.0)) for leaf in ends), default=0.0)


def test_how_often_mixed_sizes_and_broken_links_have_the_optimum() -> None:
    """100 networks with links of different speeds, broken ones and other jobs: always within a stream of the optimum."""
    draw, gaps = np.random.default_rng(7), Counter[str]()
    for _ in range(100):
        wiring = _small(spines=3)
        speeds = wiring.trunk_bytes_per_s * draw.choice([1.0, 2.0], wiring.trunk_bytes_per_s.shape)
        wiring.trunk_bytes_per_s[:] = speeds
        leaf, spine = (int(draw.integers(size)) for size in speeds.shape)
        wiring = wiring.without([f"{wiring.leaves[leaf]}-{wiring.spines[spine]}"])
        others = Loads.none(wiring)
        others.up[:] = draw.integers(0, 3, speeds.shape) * (wiring.trunk_bytes_per_s > 0)
        ends = [pair for pair in itertools.permutations(range(6), 2) if pair[0] // 2 != pair[1] // 2]
        chosen = draw.choice(len(ends), 5, replace=False)
        pairs = [(*ends[at], float(draw.integers(1, 6))) for at in chosen]
        found = assign(connections(pairs), wiring, others=others)
        best, _ = best_by_trying_all(found.paths, wiring, others)
        assert found.bound.seconds <= best * (1 + 1e-9)
        assert found.loads.most <= best + max(size for *_, size in pairs) + 1e-9
        gaps["optimum" if found.loads.most <= best * (1 + 1e-9) else "above"] += 1
    assert gaps["optimum"] >= 95, gaps


def test_the_bound_is_no_less_than_linear_programming_says_and_the_plan_close_to_it() -> None:
    draw = np.random.default_rng(3)
    for _ in range(10):
        wiring = _small(nodes=16, spines=4, per_block=4)
        wiring = wiring.without([f"leaf{draw.integers(4)}.0-spine{draw.integers(4)}"])
        ends = [pair for pair in itertools.permutations(range(16), 2) if pair[0] // 4 != pair[1] // 4]
        pairs = [(*ends[at], float(draw.integers(1, 10))) for at in draw.choice(len(ends), 80, replace=False)]
        found = assign(connections(pairs), wiring)
        fractional = _fractional(found.paths, wiring)
        assert fractional * (1 - 1e-7) <= found.bound.seconds * 1.02, "the cut of a leaf is nearly all that binds"
        assert fractional * (1 - 1e-7) <= found.loads.most <= fractional + 9


def _fractional(paths: Paths, wiring: Wiring) -> float:
    """The smallest largest load if streams could be cut, by linear programming."""
    leaves, spines = wiring.trunk_bytes_per_s.shape
    crossing = paths.crossing(wiring)
    number = len(crossing) * spines
    limits, rows = np.zeros((2 * leaves * spines, number + 1)), np.zeros((len(crossing), number + 1))
    bounds: list[tuple[float, float | None]] = [(0.0, None)] * (number + 1)
    for row, at in enumerate(crossing.tolist()):
        ends = (wiring.port_leaf[port[at]] for port in (paths.source_port, paths.target_port))
        for side, leaf in enumerate(ends):
            for spine in range(spines):
                limits[(side * leaves + leaf) * spines + spine, row * spines + spine] = paths.num_bytes[at]
                if wiring.trunk_bytes_per_s[leaf, spine] == 0:
                    bounds[row * spines + spine] = (0.0, 0.0)
        rows[row, row * spines : (row + 1) * spines] = 1.0
    limits[:, -1] = -np.tile(wiring.trunk_bytes_per_s.ravel(), 2)
    cost = np.zeros(number + 1)
    cost[-1] = 1.0
    solved = linprog(cost, limits, np.zeros(len(limits)), rows, np.ones(len(rows)), bounds)
    assert solved.success
    return float(solved.fun)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(0, 60), st.integers(0, 2**31))
def test_colours_at_a_vertex_differ(colours: int, number: int, seed: int) -> None:
    draw, degree, edges = np.random.default_rng(seed), Counter[tuple[int, int]](), []
    for _ in range(number):
        left, right = (int(at) for at in draw.integers(0, 5, 2))
        if degree[0, left] < colours and degree[1, right] < colours:
            edges.append((left, right))
            degree[0, left] += 1
            degree[1, right] += 1
    chosen = colour_edges(edges, colours)
    for side in (0, 1):
        assert len({(edge[side], colour) for edge, colour in zip(edges, chosen, strict=True)}) == len(edges)
    assert set(chosen) <= set(range(colours))


def test_a_leaf_spreads_its_streams_to_within_one() -> None:
    draw = np.random.default_rng(0)
    source, target = draw.integers(0, 8, 900), draw.integers(0, 8, 900)
    spine = np.array(spread_evenly(source, target, np.ones(900), 7))
    for leaf in (source, target):
        counts = np.zeros((8, 7), int)
        np.add.at(counts, (leaf, spine), 1)
        assert (counts.max(1) - counts.min(1) <= 1).all()


def test_both_ports_of_every_card_carry_the_same_and_sides_are_kept() -> None:
    wiring = Wiring.of(leaf_spine(8, cards=4, nodes_per_block=4))
    found = assign(connections(ring(range(8), range(4), 4, 64.0)), wiring, parts=2)
    for loads in (found.loads.send, found.loads.receive):
        assert len(set(loads.tolist())) == 1
    sides = [[card.ports.index(port) for card in wiring.cards if port in card.ports] for port in range(64)]
    for source, target in zip(found.paths.source_port.tolist(), found.paths.target_port.tolist(), strict=True):
        assert sides[source] == sides[target]
    assert found.is_optimal


def test_a_plan_avoids_links_that_other_jobs_use() -> None:
    wiring = _small(nodes=4, spines=3)
    others = Loads.from_names({"leaf0.0>spine0": 5.0, "spine1>leaf1.0": 5.0, "of another>cluster": 9.0}, wiring)
    found = assign(connections([(0, 2, 1.0)]), wiring, others=others)
    assert wiring.spines[found.paths.spine[0]] == "spine2"
    assert others.named(wiring) == {"leaf0.0>spine0": 5.0, "spine1>leaf1.0": 5.0}


def test_a_plan_is_the_same_every_time_and_no_worse_than_any_hash() -> None:
    wiring = Wiring.of(leaf_spine(16, cards=2, nodes_per_block=4, spines=4))
    wanted = connections(ring([(5 * at) % 16 for at in range(16)], range(2), 2, 1e9))
    found = assign(wanted, wiring)
    again = assign(wanted, wiring)
    assert (found.paths.spine == again.paths.spine).all()
    for seed in range(20):
        paths = hashed(wanted, wiring, seed)
        assert Loads.of(paths, wiring).seconds(wiring).most >= found.loads.most * (1 - 1e-9)


def test_a_hash_uses_every_path_and_no_broken_one() -> None:
    wiring = Wiring.of(leaf_spine(4, cards=1, nodes_per_block=2, spines=3)).without(
        ["leaf0.0l-spine1", "node3/mlx5_0/0"]
    )
    wanted = connections([(0, 2, 1.0), (0, 1, 1.0), (1, 3, 1.0)])
    seen: set[tuple[int, int, int]] = set()
    for seed in range(200):
        paths = hashed(wanted, wiring, seed)
        columns = (paths.source_port.tolist(), paths.target_port.tolist(), paths.spine.tolist())
        seen |= set(zip(*columns, strict=True))
    direct = {(0, 2, DIRECT), (1, 3, DIRECT)}  # node 0 to node 1 within either leaf
    far = {(0, target, spine) for target in (4, 5) for spine in (0, 2)}  # no spine 1 from the left leaf
    far |= {(1, target, spine) for target in (4, 5) for spine in (0, 1, 2)}
    of_second = {(2, 7, 0), (2, 7, 2), *((3, 7, spine) for spine in range(3))}  # no left port at node 3
    assert seen == direct | far | of_second


def test_where_no_path_is_left_the_error_names_the_cards() -> None:
    wiring = _small(nodes=4, spines=2).without(["leaf0.0-spine0", "leaf1.0-spine1"])
    with pytest.raises(TrafficImpossible, match="from card node0/mlx5_0 to card node2/mlx5_0"):
        split(connections([(0, 2, 1.0)]), wiring)
    assert len(split(connections([(0, 1, 1.0)]), wiring)) == 1


def test_the_bound_counts_whole_streams() -> None:
    wiring = _small(nodes=4, spines=2)
    paths = split(connections([(0, 2, 3.0), (0, 3, 3.0), (1, 2, 3.0)]), wiring)
    assert lower_bound(paths, wiring).seconds == 6.0  # two of three on one of two links; fractions: 4.5
    assert choose_spines(paths, wiring).loads.most == 6.0


def test_no_flows_are_no_load() -> None:
    none = np.zeros(0, np.int64)
    found = assign(Connections((), none, none, none, np.zeros(0)), _small())
    assert (found.loads.most, found.bound.seconds) == (0.0, 0.0)
