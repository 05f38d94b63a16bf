"""After a failure only what was cut moves, and what has to make room; compared with a plan from scratch."""

import numpy as np
import pytest

from evermesh.parallelism.errors import TrafficImpossible
from evermesh.parallelism.fabric.assigning import assign
from evermesh.parallelism.fabric.building import leaf_spine
from evermesh.parallelism.fabric.exchanges import Collective
from evermesh.parallelism.fabric.flows import flows_of
from evermesh.parallelism.fabric.paths import DIRECT, Connections, Loads
from evermesh.parallelism.fabric.rails import rail_report
from evermesh.parallelism.fabric.replanning import rehashed, replan
from evermesh.parallelism.fabric.wiring import Wiring
from tests.parallelism.fabric.networks import connections, ring


def _network() -> Wiring:
    return Wiring.of(leaf_spine(16, cards=2, nodes_per_block=4, spines=4, port_bytes_per_s=1.0, uplink_bytes_per_s=1.0))


WANTED = connections(
    [pair for step in (5, 7) for pair in ring([(step * at) % 16 for at in range(16)], range(2), 2, 8.0)]
)


def test_nothing_moves_where_nothing_was_cut() -> None:
    wiring = _network()
    before = assign(WANTED, wiring)
    found = replan(before.paths, WANTED, wiring)
    assert (found.cut, found.moved) == (0, 0)
    assert (found.assignment.paths.spine == before.paths.spine).all()


@pytest.mark.parametrize("spine", range(4))
def test_a_cut_link_is_left_and_the_rest_is_as_even_as_from_scratch(spine: int) -> None:
    whole = _network()
    before = assign(WANTED, whole).paths
    left = whole.without([f"leaf1.0r-spine{spine}"])
    found, scratch = replan(before, WANTED, left), assign(WANTED, left)
    now = found.assignment.paths
    of_leaf = whole.leaves.index("leaf1.0r")
    on = [whole.port_leaf[port] == of_leaf for port in (before.source_port, before.target_port)]
    was_cut = (on[0] | on[1]) & (before.spine == spine)
    assert found.cut == was_cut.sum() > 0
    assert not ((on[0] | on[1]) & (now.spine == spine)).any()
    changed = now.spine != before.spine
    assert (changed & was_cut).sum() == found.cut
    assert (changed & ~was_cut).sum() == found.moved <= found.cut
    elsewhere = np.isin(
        whole.port_leaf[before.source_port], [at for at, name in enumerate(whole.leaves) if "l" in name[5:]]
    )
    assert not changed[elsewhere].any(), "left leaves have nothing to do with it"
    assert found.assignment.loads.most == pytest.approx(scratch.loads.most)
    dead = Loads.of(now, left)
    assert dead.up[left.trunk_bytes_per_s == 0].sum() == dead.down[left.trunk_bytes_per_s == 0].sum() == 0
    static = [Loads.of(rehashed(before, WANTED, left, seed), left).seconds(left).most for seed in range(10)]
    assert min(static) >= found.assignment.loads.most
    assert np.mean(static) > found.assignment.loads.most


def test_the_other_port_of_a_card_takes_over_from_one_that_is_cut() -> None:
    whole = _network()
    before = assign(WANTED, whole).paths
    left = whole.without(["node3/mlx5_1/0"])
    found = replan(before, WANTED, left)
    port = left.port_names().index("node3/mlx5_1/0")
    now = found.assignment.paths
    assert port not in now.source_port
    assert port not in now.target_port
    sent = np.bincount(now.source_port, now.num_bytes)
    assert sent[port + 1] == sent.max() == 2 * sent[0]
    touched = np.isin(before.source_port, port) | np.isin(before.target_port, port)
    assert found.cut == (touched & (before.spine != DIRECT)).sum() + (touched & (before.spine == DIRECT)).sum()


def test_ranks_of_a_card_without_cables_talk_through_the_next_one() -> None:
    """Of 8 rings of one card a node, that of the lost card goes over the next rail there; the others keep their paths."""
    whole = Wiring.of(leaf_spine(8, cards=8, nodes_per_block=4, spines=4))
    rings = [
        Collective("gradients", "hdp", "all_reduce", tuple(range(card, 64, 8)), ((8e6, 1.0),)) for card in range(8)
    ]
    left = whole.without(["node3/mlx5_7/0", "node3/mlx5_7/1"])
    assert [left.card_of(rank) for rank in range(24, 32)] == [24, 25, 26, 27, 28, 29, 30, 24]
    was, now = (Connections.of(flows_of(rings, wiring)) for wiring in (whole, left))
    before = assign(was, whole).paths
    found = replan(before, now, left, was=was)
    assert found.cut == 4  # in and out, on both ports
    assert found.moved == 0
    rows = rail_report(flows_of(rings, left), left)
    assert rows[0].rail_bytes == pytest.approx(2 / 64 * rows[0].node_bytes)
    loads = found.assignment.loads
    assert loads.send[left.port_names().index("node3/mlx5_0/0")] == loads.most == 2 * np.median(loads.send)
    with pytest.raises(TrafficImpossible, match="no card of node node3 has a cable"):
        whole.without([f"node3/mlx5_{card}/{side}" for card in range(8) for side in (0, 1)]).card_of(24)


def test_a_card_without_ports_and_names_that_do_not_exist_are_refused() -> None:
    whole = _network()
    with pytest.raises(TrafficImpossible, match="no port of node3/mlx5_1 has a cable"):
        assign(WANTED, whole.without(["node3/mlx5_1/0", "node3/mlx5_1/1"]))
    with pytest.raises(TrafficImpossible, match=r"Did you mean leaf1\.0r-spine3"):
        whole.without(["leaf1.0r-spine9"])
    with pytest.raises(TrafficImpossible, match="no path is left"):
        assign(WANTED, whole.without([f"spine{spine}" for spine in range(4)]))
    assert len(assign(WANTED, whole.without(["spine1"])).paths) == len(WANTED) * 2
    of_leaf = whole.without(["leaf0.0l"])
    assert (of_leaf.port_bytes_per_s == 0).sum() == 4
    assert assign(WANTED, of_leaf).loads.most == pytest.approx(2 * assign(WANTED, whole).loads.most)
