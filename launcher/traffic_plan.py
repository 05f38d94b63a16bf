"""What ``evermesh traffic plan`` computes: the paths of a job on a network, before (hash) and after (plan)."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from evermesh.launcher.errors import TrafficRequestInvalid
from evermesh.launcher.layouts import LengthsAsked, Source
from evermesh.launcher.topology_file import read_topology
from evermesh.launcher.traffic_registry import Registry
from evermesh.parallelism.cost import CostModel, ModelShape
from evermesh.parallelism.fabric.assigning import Assignment, assign
from evermesh.parallelism.fabric.exchanges import Exchange, plan_exchanges
from evermesh.parallelism.fabric.flows import Algorithm, Flows, flows_of
from evermesh.parallelism.fabric.hashing import hashed
from evermesh.parallelism.fabric.model import model_of
from evermesh.parallelism.fabric.ordering import Order, order_nodes
from evermesh.parallelism.fabric.paths import Connections, Loads
from evermesh.parallelism.fabric.rails import RailRow, rail_report
from evermesh.parallelism.fabric.replanning import Replanned, replan
from evermesh.parallelism.fabric.settings import Part, what_holds
from evermesh.parallelism.fabric.wiring import Wiring
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.layout.activations import Precision
from evermesh.parallelism.layout.network import Network
from evermesh.parallelism.layout.options import SearchOptions
from evermesh.parallelism.layout.rates import Hardware, rates
from evermesh.parallelism.layout.search import estimate_layout
from evermesh.parallelism.planner import plan_batch
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.topology import Topology


@dataclass(frozen=True, slots=True)
class TrafficAsked:
    """What to plan."""

    job: Path
    topology: Path
    nodes: tuple[str, ...] = ()
    """Nodes of the job, by name; none: all of the topology."""
    failed: tuple[str, ...] = ()
    """Cables and switches that are broken."""
    reorders: bool = True
    """Whether the order of nodes may be improved."""
    algorithm: Algorithm = "ring"
    pxn: bool = True
    parts: int = 1
    """Streams of a connection on each port."""
    seeds: int = 20
    """Hashes to compare with."""
    batches: int = 2
    """Of the job's data, to plan."""
    registry: Path | None = None
    """File with the loads of other jobs."""
    step_s: float | None = None
    """Seconds of a step; None: by formula."""


class Busiest(NamedTuple):
    """Seconds that the busiest link of each kind needs in a step."""

    ports: float
    trunks: float
    """Between leaves and spines."""

    @classmethod
    def of(cls, seconds: Loads) -> "Busiest":
        """Of these loads, in seconds."""
        largest = [float(array.max(initial=0.0)) for array in (seconds.send, seconds.receive, seconds.up, seconds.down)]
        return cls(max(largest[:2]), max(largest[2:]))

    @property
    def most(self) -> float:
        """Of all links."""
        return max(self)


@dataclass(frozen=True, slots=True)
class TrafficPlan:
    """Paths of a job, and what they are compared with."""

    job: str
    layout: Layout
    asked: TrafficAsked
    wiring: Wiring
    """Without what is broken."""
    order: Order
    flows: Flows
    connections: Connections
    assignment: Assignment
    hashed: tuple[Busiest, ...]
    """Of every hash."""
    replanned: Replanned | None
    """Where something is broken: from the paths without that, moving as little as can be."""
    step_s: float
    rails: tuple[RailRow, ...]
    parts: tuple[Part, ...]

    @property
    def gain(self) -> float:
        """Largest load under a hash, the median, over that of the plan."""
        most = self.assignment.loads.most
        return statistics.median(one.most for one in self.hashed) / most if most else 1.0


def plan_traffic_of(asked: TrafficAsked, console: Console) -> TrafficPlan:
    """Plan the paths of a job.

    Raises:
        EvermeshError: of the job and its data; TrafficRequestInvalid where job and topology do not go together;
            TrafficImpossible where the network is not described, or cannot carry the job.
    """
    given = _given(asked, console)
    order = order_nodes(given.topology, given.exchanges, improves=asked.reorders)
    whole = Wiring.of(given.topology, order.nodes)
    wiring = whole.without(asked.failed)
    others = Registry.read(asked.registry).loads(given.job, wiring, given.step_s)
    flows = flows_of(given.exchanges, wiring, algorithm=asked.algorithm, pxn=asked.pxn)
    connections = Connections.of(flows)
    hashes = (hashed(connections, wiring, seed, parts=asked.parts) for seed in range(asked.seeds))
    return TrafficPlan(
        job=given.job,
        layout=given.layout,
        asked=asked,
        wiring=wiring,
        order=order,
        flows=flows,
        connections=connections,
        assignment=assign(connections, wiring, parts=asked.parts, others=others),
        hashed=tuple(Busiest.of(Loads.of(paths, wiring, others).seconds(wiring)) for paths in hashes),
        replanned=_replanned(given, asked, (whole, wiring), others) if asked.failed else None,
        step_s=given.step_s,
        rails=tuple(rail_report(flows, wiring)),
        parts=tuple(what_holds(wiring, parts=asked.parts, pxn=asked.pxn)),
    )


class _Given(NamedTuple):
    """A job, its nodes, and what its ranks send each other in a step."""

    job: str
    layout: Layout
    topology: Topology
    exchanges: Sequence[Exchange]
    step_s: float


def _given(asked: TrafficAsked, console: Console) -> _Given:
    source = Source.read(asked.job)
    if source.job is None:
        raise TrafficRequestInvalid(f"{asked.job} is no job: paths need train.layout and the data. Give a job file.")
    layout = source.job.train.layout
    if layout.deepspeed is not None:
        raise TrafficRequestInvalid(
            f"{asked.job} has DeepSpeed divide gradients and states: what it sends is not known here. Give the job with "
            "train.layout.sharding of kind tiers."
        )
    topology = _chosen(read_topology(asked.topology), asked, layout)
    lengths, vocabulary = source.lengths(LengthsAsked(batches=asked.batches), console)
    shape, options = source.model.shape(vocabulary), source.options(None)
    exchanges = _exchanges(shape, layout, topology, lengths, options, source.job.train.cost)
    step_s = asked.step_s or estimate_layout(shape, topology, lengths, layout, options).step.total
    return _Given(source.job.name, layout, topology, exchanges, step_s)


def _replanned(given: _Given, asked: TrafficAsked, networks: tuple[Wiring, Wiring], others: Loads | None) -> Replanned:
    """From the paths on the first network, where nothing is broken, to those on the second."""
    was, now = (
        Connections.of(flows_of(given.exchanges, wiring, algorithm=asked.algorithm, pxn=asked.pxn))
        for wiring in networks
    )
    before = assign(was, networks[0], parts=asked.parts, others=others)
    return replan(before.paths, now, networks[1], parts=asked.parts, others=others, was=was)


def _chosen(topology: Topology, asked: TrafficAsked, layout: Layout) -> Topology:
    """The nodes of the job, as many as its layout needs."""
    by_name = {node.name: node for node in topology.nodes}
    if unknown := [name for name in asked.nodes if name not in by_name]:
        raise TrafficRequestInvalid(
            f"{asked.topology} has no node {unknown[0]}; it has {', '.join(list(by_name)[:8])}, ..."
        )
    nodes = tuple(by_name[name] for name in asked.nodes) or topology.nodes
    devices = sum(node.devices for node in nodes)
    if devices != layout.world_size:
        way_out = "Name the nodes of the job with --nodes" if devices > layout.world_size else "Describe more nodes"
        raise TrafficRequestInvalid(
            f"the job has {layout.world_size:,} ranks, the {len(nodes):,} nodes have {devices:,} devices. {way_out}, or set "
            "workers and train.layout to as many."
        )
    return topology.model_copy(update={"nodes": nodes, "speeds": ()})


def _exchanges(
    shape: ModelShape,
    layout: Layout,
    topology: Topology,
    lengths: Sequence[Sequence[int]],
    options: SearchOptions,
    measured: CostModel | None,
) -> list[Exchange]:
    """Of a step, the mean over batches, planned with the cost model of the job or with nominal rates."""
    hardware = Hardware(Network(topology), options.device, Precision(options.element_bytes, options.device.fused_norms))
    devices = topology.nodes[0].devices
    cost = measured or rates(shape, layout, hardware).cost_model()
    pool = Pool.of(layout.hdp, max(1, devices // layout.tp))
    model = model_of(shape, layout, options.element_bytes)
    nodes = [rank // devices for rank in range(layout.world_size)]
    found = list[Exchange]()
    for batch in lengths:
        plan = plan_batch(batch, layout, cost, pool=pool)
        found += [one.scaled(1 / len(lengths)) for one in plan_exchanges(plan, model, nodes)]
    return found


__all__ = ["Busiest", "TrafficAsked", "TrafficPlan", "plan_traffic_of"]
