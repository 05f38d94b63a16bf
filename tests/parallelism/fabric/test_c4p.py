"""The published experiments of C4P in shape, as shares of the line rate; and fair sharing against examples by hand."""

import numpy as np
import pytest

from evermesh.parallelism.fabric.building import leaf_spine
from evermesh.parallelism.fabric.paths import split
from evermesh.parallelism.fabric.sharing import fair_rates, ring_rates
from evermesh.parallelism.fabric.wiring import Wiring
from tests.parallelism.fabric import c4p
from tests.parallelism.fabric.networks import connections


def test_links_are_shared_until_each_stream_has_a_full_one() -> None:
    """Two streams share one link of 1; the third has the rest of a link of 2 that one of these uses too."""
    wiring = Wiring.of(leaf_spine(4, cards=1, ports=1, nodes_per_block=2, spines=1, port_bytes_per_s=2.0))
    wiring.trunk_bytes_per_s[:] = [[1.0], [100.0]]
    paths = split(connections([(0, 2, 1.0), (1, 3, 1.0), (3, 2, 1.0)]), wiring)
    assert fair_rates(paths, wiring).tolist() == [0.5, 0.5, 1.5]
    assert ring_rates(paths, wiring, [np.array([0, 2]), np.array([1])]) == [0.5, 0.5]


def test_equal_shares_wait_for_the_slowest_stream_and_shifted_ones_add_up() -> None:
    wiring = Wiring.of(
        leaf_spine(2, cards=1, nodes_per_block=1, spines=1, port_bytes_per_s=4.0, uplink_bytes_per_s=9.0)
    )
    wiring.trunk_bytes_per_s[0, 0] = 1.0  # of the left leaf
    paths = split(connections([(0, 1, 1.0)]), wiring)
    both = np.arange(2)
    assert ring_rates(paths, wiring, [both]) == [2.0]
    assert ring_rates(paths, wiring, [both], shifts=True) == [5.0]


def test_a_bond_that_hashes_loses_a_third_or_more_and_pinned_ports_have_the_line_rate() -> None:
    for streams in (1, 4):
        found = c4p.dual_port(streams)
        assert max(found.before) <= c4p.DUAL_PORT.before[1] / c4p.REACHED_GBPS * c4p.LINE_GBPS
        assert found.after == (c4p.LINE_GBPS,)


def test_eight_jobs_at_once_differ_under_hashes_and_all_have_the_line_rate_by_plan() -> None:
    found, (low, high) = c4p.eight_jobs(4), c4p.EIGHT_JOBS.before
    shares = np.array(found.before) / c4p.LINE_GBPS
    assert shares.min() <= low / c4p.REACHED_GBPS
    assert low / c4p.REACHED_GBPS <= np.median(shares) <= high / c4p.REACHED_GBPS
    assert shares.max() <= high / c4p.REACHED_GBPS
    assert set(found.after) == {c4p.LINE_GBPS}


@pytest.mark.parametrize("streams", [1, 4])
def test_a_failed_link_costs_little_more_than_its_share_once_paths_are_planned_again(streams: int) -> None:
    found = c4p.failed_link(streams, shifts=True)
    left = 7 / 8 * c4p.LINE_GBPS
    assert np.mean(found.before) < 0.75 * c4p.LINE_GBPS
    assert min(found.after) >= c4p.FAILED_LINK.after[0] / c4p.REACHED_GBPS * c4p.LINE_GBPS * 0.99
    assert np.mean(found.after) >= left
    assert np.mean(found.after) > 1.2 * np.mean(found.before)
