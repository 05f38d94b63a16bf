"""Paths of a job on leaves and spines: plan and hash side by side, C4P's experiments in shape, how long planning takes.

C4P's figures are published ones (arXiv 2406.04594), no peer was run; both are given as shares of the most there is: of the
line rate here, of about 360 Gb/s there.
"""

import statistics
import time

import numpy as np

from evermesh.parallelism import Layout
from evermesh.parallelism.cost import CostModel, ModelShape
from evermesh.parallelism.fabric.assigning import assign
from evermesh.parallelism.fabric.building import leaf_spine
from evermesh.parallelism.fabric.exchanges import Exchange, plan_exchanges
from evermesh.parallelism.fabric.flows import flows_of
from evermesh.parallelism.fabric.hashing import hashed
from evermesh.parallelism.fabric.model import model_of
from evermesh.parallelism.fabric.ordering import order_nodes
from evermesh.parallelism.fabric.paths import Connections, Loads, Paths
from evermesh.parallelism.fabric.replanning import rehashed, replan
from evermesh.parallelism.fabric.wiring import Wiring
from evermesh.parallelism.planner import plan_batch
from evermesh.parallelism.topology import Topology
from tests.benchmarks.harness import Row, exact_row
from tests.parallelism.fabric import c4p

_SEEDS = 5
_SHAPE = ModelShape(
    hidden=12288, layers=96, heads=96, kv_heads=96, head_dim=128, ffn=49152, vocabulary=51200, gated=False
)
"""GPT-175B."""
_COST = CostModel(token_s=1e-6, pair_s=1e-11, micro_batch_s=1e-4)


def run() -> list[Row]:
    """All figures."""
    rows = _published()
    for nodes in (64, 1024):
        rows += _job(nodes)
    return rows


def _published() -> list[Row]:
    line, reached = c4p.LINE_GBPS, c4p.REACHED_GBPS
    rows = []
    for name, found, published in (
        ("one job, bonded ports, 4 streams a port", c4p.dual_port(4), c4p.DUAL_PORT),
        ("8 jobs at once, 4 streams a port", c4p.eight_jobs(4), c4p.EIGHT_JOBS),
        ("8 jobs, link lost, 1 stream a port", c4p.failed_link(1, shifts=True), c4p.FAILED_LINK),
        ("8 jobs, link lost, 4 streams a port", c4p.failed_link(4, shifts=True), c4p.FAILED_LINK),
    ):
        words = ("planned before", "planned again") if published is c4p.FAILED_LINK else ("hash", "plan")
        sides = zip(words, (found.before, found.after), (published.before, published.after), strict=True)
        for word, rates, theirs in sides:
            ends = [("lowest", min(rates), theirs[0]), ("highest", max(rates), theirs[1])]
            if theirs[0] == theirs[1]:
                ends.insert(1, ("mean", statistics.mean(rates), theirs[0]))
            for end, value, peer in ends:
                what = f"{name}: {word}, {end} share of the line rate"
                rows.append(exact_row(what, value / line, "", peer="C4P, published", peer_value=peer / reached))
    return rows


def _job(nodes: int) -> list[Row]:
    """GPT-175B as tp 8 x pp 8 on nodes that came in any order."""
    layout = Layout(tp=8, pp=8, hdp=nodes // 8, capacity=8192)
    ordered = leaf_spine(nodes, nodes_per_block=min(64, nodes // 4), spines=32, uplink_bytes_per_s=50e9)
    shuffled = np.random.default_rng(0).permutation(nodes)
    topology = ordered.model_copy(update={"nodes": tuple(ordered.nodes[at] for at in shuffled)})
    name, rows = f"{nodes:,} nodes x 8 cards", list[Row]()
    plan = plan_batch([2048] * (16 * layout.hdp), layout, _COST)
    started = time.perf_counter()
    exchanges = plan_exchanges(plan, model_of(_SHAPE, layout, 2), [rank // 8 for rank in range(8 * nodes)])
    rows.append(exact_row(f"{name}: what ranks send, computed in", time.perf_counter() - started, "s"))
    started = time.perf_counter()
    order = order_nodes(topology, exchanges)
    rows.append(exact_row(f"{name}: nodes put in order in", time.perf_counter() - started, "s"))
    rows.append(
        exact_row(
            f"{name}: bytes of a step over spines",
            order.crossing_bytes / 1e12,
            "TB",
            peer="nodes in any order",
            peer_value=order.given_bytes / 1e12,
        )
    )
    for word, places in (("any order", tuple(range(nodes))), ("own order", order.nodes)):
        rows += _planned(f"{name}, {word}", topology, exchanges, places)
    return rows


def _planned(name: str, topology: Topology, exchanges: list[Exchange], places: tuple[int, ...]) -> list[Row]:
    wiring = Wiring.of(topology, places)
    wanted = Connections.of(flows_of(exchanges, wiring))
    started = time.perf_counter()
    found = assign(wanted, wiring)
    took = time.perf_counter() - started
    hashes = [_most(hashed(wanted, wiring, seed), wiring) for seed in range(_SEEDS)]
    left = wiring.without([f"{wiring.leaves[0]}-{wiring.spines[0]}"])
    started = time.perf_counter()
    again = replan(found.paths, wanted, left)
    again_took = time.perf_counter() - started
    static = [_most(rehashed(found.paths, wanted, left, seed), left) for seed in range(_SEEDS)]
    hash_s, bound_s = statistics.median(hashes), found.bound.seconds
    return [
        exact_row(f"{name}: {len(found.paths):,} streams planned in", took, "s", goal=60.0),
        exact_row(f"{name}: busiest link", found.loads.most, "s", peer="hash, median", peer_value=hash_s),
        exact_row(f"{name}: busiest link", found.loads.most, "s", peer="lower bound", peer_value=bound_s),
        exact_row(
            f"{name}: link lost, busiest link",
            again.assignment.loads.most,
            "s",
            peer="hash of what was cut",
            peer_value=statistics.median(static),
        ),
        exact_row(f"{name}: link lost, planned again in", again_took, "s"),
        exact_row(f"{name}: link lost, streams moved besides {again.cut} cut", again.moved, ""),
    ]


def _most(paths: Paths, wiring: Wiring) -> float:
    return Loads.of(paths, wiring).seconds(wiring).most
