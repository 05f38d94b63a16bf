"""The experiments of C4P (arXiv 2406.04594) in shape: 16 nodes with eight bonded cards of two ports of 200 Gb/s.

The cables between its leaves and spines are chosen here: a leaf serves two rails of eight nodes and has eight links of
400 Gb/s to spines, so nothing is oversubscribed. Rates are those of fair sharing, in Gb/s of bus bandwidth per card: 400
is the line rate here, about 360 what was reached there.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from evermesh.parallelism.fabric.assigning import assign
from evermesh.parallelism.fabric.building import leaf_spine
from evermesh.parallelism.fabric.hashing import Hashed, hashed
from evermesh.parallelism.fabric.paths import Connections, Paths
from evermesh.parallelism.fabric.replanning import rehashed, replan
from evermesh.parallelism.fabric.sharing import ring_rates
from evermesh.parallelism.fabric.wiring import Ints, Wiring
from tests.parallelism.fabric.networks import connections, ring

LINE_GBPS = 400.0
REACHED_GBPS = 360.0
"""The most that was published, taken as the line rate there."""
SEEDS = 20
_CARDS = 8


class Published(NamedTuple):
    """Bus bandwidth, Gb/s: without and with what is tested, lowest and highest job."""

    before: tuple[float, float]
    after: tuple[float, float]


DUAL_PORT = Published((240.0, 240.0), (360.0, 360.0))
"""A single job; before: less than that."""
EIGHT_JOBS = Published((171.93, 263.27), (353.86, 360.57))
FAILED_LINK = Published((185.76, 185.76), (301.46, 301.46))
"""Paths planned before the failure, and again after it."""


class Outcome(NamedTuple):
    """Bus bandwidth of every job, Gb/s; of hashes, those of all seeds."""

    before: tuple[float, ...]
    after: tuple[float, ...]


def dual_port(streams: int = 1) -> Outcome:
    """One job on 16 nodes under the same leaves: only the ports of cards are chosen."""
    wiring = Wiring.of(leaf_spine(16, nodes_per_block=16, rails_per_leaf=2, uplink_bytes_per_s=50e9))
    wanted = connections(ring(range(16), range(_CARDS), _CARDS, 1.0))
    jobs = [list(range(len(wanted)))]
    return _compared(wiring, wanted, jobs, streams, "ports and spines")


def eight_jobs(streams: int = 1, hashes: Hashed = "spines") -> Outcome:
    """Eight jobs of two nodes, the two under different leaves: all traffic crosses spines."""
    wiring, wanted, jobs = _eight_jobs()
    return _compared(wiring, wanted, jobs, streams, hashes)


def failed_link(streams: int = 4, *, shifts: bool = False) -> Outcome:
    """The same, planned, and one link of a leaf fails: switches hash what it carried, or it is planned again."""
    wiring, wanted, jobs = _eight_jobs()
    planned, left = assign(wanted, wiring, parts=streams).paths, wiring.without(["leaf0.0l-spine0"])

    def static(seed: int) -> Paths:
        return rehashed(planned, wanted, left, seed, parts=streams)

    before = _all_seeds(static, left, jobs)
    after = replan(planned, wanted, left, parts=streams).assignment.paths
    return Outcome(before, _gbps(after, left, jobs, shifts=shifts))


def _eight_jobs() -> tuple[Wiring, Connections, list[list[int]]]:
    wiring = Wiring.of(leaf_spine(16, nodes_per_block=8, rails_per_leaf=2, uplink_bytes_per_s=50e9))
    pairs = [pair for job in range(8) for pair in ring((job, 8 + job), range(_CARDS), _CARDS, 1.0)]
    wanted = connections(pairs)
    jobs = [[at for at in range(len(wanted)) if wanted.source[at] // _CARDS % 8 == job] for job in range(8)]
    return wiring, wanted, jobs


def _compared(
    wiring: Wiring, wanted: Connections, jobs: Sequence[Sequence[int]], streams: int, hashes: Hashed
) -> Outcome:
    def by_hash(seed: int) -> Paths:
        return hashed(wanted, wiring, seed, parts=streams, hashes=hashes)

    return Outcome(_all_seeds(by_hash, wiring, jobs), _gbps(assign(wanted, wiring, parts=streams).paths, wiring, jobs))


def _all_seeds(chosen: Callable[[int], Paths], wiring: Wiring, jobs: Sequence[Sequence[int]]) -> tuple[float, ...]:
    return tuple(rate for seed in range(SEEDS) for rate in _gbps(chosen(seed), wiring, jobs))


def _gbps(paths: Paths, wiring: Wiring, jobs: Sequence[Sequence[int]], *, shifts: bool = False) -> tuple[float, ...]:
    streams: list[Ints] = [np.flatnonzero(np.isin(paths.connection, job)) for job in jobs]
    return tuple(rate * 8 / 1e9 for rate in ring_rates(paths, wiring, streams, shifts=shifts))
