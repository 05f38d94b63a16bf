"""Searches the layout with which a model trains fastest on a cluster, for given lengths of sequences; imports no torch.

Branch and bound over (order of nodes, pp, tp, ep, etp): each set of degrees has a time that none of its layouts can beat,
all work spread evenly and nothing waited for; they are looked at in the order of that bound, until it exceeds the times of
as many layouts as are wanted. Within a set of degrees all combinations of schedule, sharding, activations and capacity are
tried by formula, those that do not fit into memory or that the runtime cannot run left out. The best are then planned by
the real planner, and ranked by that. Ties break by the order of the choices, so the result is a pure function of the
arguments.

Sources: the degrees and what bounds them, Narayanan et al. (arXiv 2104.04473, section 3); order of nodes and uneven stages,
Holmes (arXiv 2312.03549); experts folded over the ranks of attention, arXiv 2504.14960.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from evermesh.parallelism.cost import FlopConvention, ModelShape
from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.layout.degrees import Layout, check_folding
from evermesh.parallelism.layout.flops import model_flops, utilisation
from evermesh.parallelism.layout.memory import Occupancy, RankMemory, fullest, layout_memory
from evermesh.parallelism.layout.network import Network, node_orders
from evermesh.parallelism.layout.options import ActivationChoice, SearchOptions
from evermesh.parallelism.layout.rates import Hardware, Rates, rates
from evermesh.parallelism.layout.sample import Batch
from evermesh.parallelism.layout.sizes import balanced_layers, check_shape
from evermesh.parallelism.layout.throughput import Exchanged, Setup, StepTime, estimate, exchanged, planned
from evermesh.parallelism.pipeline.schedule import PipelineSchedule, ScheduleName
from evermesh.parallelism.tiers import Tiers
from evermesh.parallelism.topology import Topology

_FEWEST_TOKENS = 64
"""Of a micro-batch; smaller ones are never worth their launches."""
_CAPACITIES = 6
"""That are tried for every layout: the most that fits, and powers of two below."""


@dataclass(frozen=True, slots=True)
class RankedLayout:
    """A layout that fits, and what it would do."""

    layout: Layout
    node_order: tuple[int, ...]
    """Indices of the nodes of the topology, in the order in which ranks are numbered."""
    step: StepTime
    """Mean over the batches."""
    memory: RankMemory
    """Of the pipeline rank that needs most."""
    memory_bytes: int
    """That a device has."""
    largest_capacity: int
    """Tokens of a micro-batch with which everything would still fit."""
    host_binds: bool
    """Whether host memory is what bounds these."""
    tokens: float
    """Of a batch, mean."""
    mfu: float
    """Model FLOPs utilisation, a share of the peak."""
    convention: FlopConvention
    """Which FLOPs it counts."""
    is_planned: bool
    """Whether the planner has planned the batches; otherwise a formula says how long they take."""

    @property
    def tokens_per_s(self) -> float:
        """Of all devices."""
        return self.tokens / self.step.total


def search_layouts(
    shape: ModelShape, topology: Topology, lengths: Sequence[Sequence[int]], options: SearchOptions | None = None
) -> list[RankedLayout]:
    """The fastest layouts that use all devices, the best first, no two with the same degrees.

    Args:
        shape: the model.
        topology: nodes, their devices and network cards.
        lengths: of the sequences of some batches, each one step.
        options: what to choose from.

    Raises:
        LayoutDoesNotFit: no layout fits into memory, or nodes cannot talk to each other; says what comes nearest.
    """
    return _Search(shape, topology, lengths, options or SearchOptions()).run()


def estimate_layout(
    shape: ModelShape,
    topology: Topology,
    lengths: Sequence[Sequence[int]],
    layout: Layout,
    options: SearchOptions | None = None,
    order: Sequence[int] | None = None,
) -> RankedLayout:
    """What one layout does, by formula, on the nodes in this ``order`` (None: as they are), whether it fits or not.

    Raises:
        LayoutDoesNotFit: it does not divide the model, or does not use all devices.
    """
    search = _Search(shape, topology, lengths, options or SearchOptions())
    network = Network(topology, order)
    layout.check_world(network.world_size)
    check_folding(layout.hdp, layout.tp, layout.ep, layout.etp)
    check_shape(shape, layout)
    return search.examine(layout, network)


class _Degrees(NamedTuple):
    pp: int
    tp: int
    ep: int
    etp: int


class _Candidate(NamedTuple):
    """The best layout of one set of degrees."""

    seconds: float
    number: int
    found: RankedLayout
    network: Network


class _Search:
    def __init__(
        self, shape: ModelShape, topology: Topology, lengths: Sequence[Sequence[int]], options: SearchOptions
    ) -> None:
        self.shape, self.topology, self.options = shape, topology, options
        self.batches = [Batch(batch) for batch in lengths]
        if not self.batches:
            raise LayoutDoesNotFit("no batches to find a layout for; give the lengths of at least one.")
        self.longest = max(batch.longest for batch in self.batches)
        self.tokens = sum(batch.tokens for batch in self.batches) / len(self.batches)
        self.flops = sum(model_flops(shape, batch.lengths, options.convention) for batch in self.batches) / len(
            self.batches
        )
        self.tightest: RankMemory | None = None
        """Of all layouts that did not fit, what came nearest to it."""

    def run(self) -> list[RankedLayout]:
        """See ``search_layouts``."""
        candidates = self._candidates()
        if not candidates:
            raise LayoutDoesNotFit(self._why_none())
        ranked = [candidate.found for candidate in candidates]
        for index in range(min(self.options.planned, len(ranked))):
            ranked[index] = self._planned(candidates[index])
        some = ranked[: self.options.planned] or ranked
        return sorted(some, key=lambda found: found.step.total)[: self.options.top]

    def _candidates(self) -> list[_Candidate]:
        """The best layout of every set of degrees that is worth it, the fastest first."""
        bounds = [
            (self._bound(degrees, network), number, degrees, network)
            for number, (network, degrees) in enumerate(self._degrees())
        ]
        wanted = max(self.options.top, self.options.planned)
        best: dict[_Degrees, _Candidate] = {}
        for bound, number, degrees, network in sorted(bounds, key=lambda entry: entry[:2]):
            times = sorted(candidate.seconds for candidate in best.values())
            limit = times[wanted - 1] if len(times) >= wanted else float("inf")
            if bound >= limit:
                break
            found = self._best(degrees, network, min(limit, best[degrees].seconds) if degrees in best else limit)
            if found is not None:
                best[degrees] = _Candidate(found.step.total, number, found, network)
        return sorted(best.values(), key=lambda candidate: candidate[:2])

    def _degrees(self) -> Iterator[tuple[Network, _Degrees]]:
        """All degrees that divide the model and use all devices, on every order of the nodes."""
        shape, experts = self.shape, self.shape.experts
        for order in node_orders(self.topology):
            network = Network(self.topology, order)
            most_tp = min(self.options.most_tp or network.devices, network.devices)
            for tp, pp in itertools.product(
                _divisors(network.devices, most_tp), _divisors(network.world_size, shape.layers)
            ):
                if network.world_size % (pp * tp):
                    continue
                stage = network.world_size // pp
                eps = _divisors(experts.experts) if experts is not None else (1,)
                etps = _divisors(experts.ffn, network.devices) if experts is not None else (1,)
                for ep, etp in itertools.product(eps, etps):
                    degrees = _Degrees(pp, tp, ep, etp)
                    if stage % (ep * etp) == 0 and self._divides(degrees, network):
                        yield network, degrees

    def _divides(self, degrees: _Degrees, network: Network) -> bool:
        try:
            check_shape(self.shape, self._plain(degrees, network))
        except LayoutDoesNotFit:
            return False
        return True

    def _plain(self, degrees: _Degrees, network: Network) -> Layout:
        pp, tp, ep, etp = degrees
        return Layout(pp=pp, tp=tp, hdp=network.world_size // (pp * tp), ep=ep, etp=etp)

    def _bound(self, degrees: _Degrees, network: Network) -> float:
        """Seconds that no layout with these degrees can beat."""
        layout = self._plain(degrees, network)
        found = rates(self.shape, layout, self._hardware(network))
        pairs = sum(batch.pairs for batch in self.batches) / len(self.batches)
        return (found.token * self.tokens + found.pair * pairs) / (layout.hdp * layout.pp) / max(network.speeds)

    def _hardware(self, network: Network) -> Hardware:
        return Hardware(network, self.options.device, self.options.precision, self.options.imbalance)

    def _best(self, degrees: _Degrees, network: Network, limit: float) -> RankedLayout | None:
        """The fastest layout with these degrees that fits and takes less than ``limit`` seconds; None: there is none."""
        fewest = max(_FEWEST_TOKENS, -(-self.longest // (network.world_size // (degrees.pp * degrees.tp))))
        setups = [(setup.least(self.batches, fewest), setup) for setup in self._setups(degrees, network)]
        best: RankedLayout | None = None
        for least, setup in sorted(setups, key=lambda entry: entry[0]):  # stable: equals in the order of the options
            if least >= limit:
                break
            for capacity in self._capacities(setup.layout):
                sized = setup.layout.model_copy(update={"capacity": capacity})
                step = estimate(setup._replace(layout=sized), self.batches)
                if step.total < limit:
                    best, limit = self._ranked(sized, network, step), step.total
        return best

    def _setups(self, degrees: _Degrees, network: Network) -> Iterator[Setup]:
        """All layouts with these degrees; what several of them share is computed once."""
        hardware = self._hardware(network)
        known_rates: dict[object, Rates] = {}
        known_traffic: dict[object, Exchanged] = {}
        for layout in self._layouts(degrees, network):
            by_activations = layout.activations, layout.offload
            if by_activations not in known_rates:
                known_rates[by_activations] = rates(self.shape, layout, hardware)
            by_holding = layout.schedule, layout.virtual_stages, layout.sharding
            if by_holding not in known_traffic:
                known_traffic[by_holding] = exchanged(self.shape, layout, hardware)
            yield Setup.from_parts(self.shape, layout, hardware, known_rates[by_activations], known_traffic[by_holding])

    def _layouts(self, degrees: _Degrees, network: Network) -> Iterator[Layout]:
        """All layouts with these degrees that the runtime can run; their capacity is yet to be found."""
        plain, options = self._plain(degrees, network), self.options
        schedules: Sequence[tuple[ScheduleName, int]] = options.schedules if degrees.pp > 1 else (("1f1b", 1),)
        for (schedule, virtual), tiers, activations in itertools.product(
            schedules, self._tiers(plain, network), options.activations
        ):
            moves_nowhere = activations.policy == "offload" and options.device.host_memory_bytes is None
            if degrees.pp * virtual > self.shape.layers or moves_nowhere:
                continue
            fields: dict[str, Any] = {
                **degrees._asdict(),
                "hdp": plain.hdp,
                "schedule": schedule,
                "virtual_stages": virtual,
                "sharding": tiers,
                **_activation_fields(activations),
            }
            if not network.is_even and degrees.pp > 1:
                fields["split"] = self._split(plain, PipelineSchedule(schedule, degrees.pp, virtual), network)
            layout = Layout(**fields)
            if options.supports is None or options.supports(layout):
                yield layout

    def _tiers(self, layout: Layout, network: Network) -> list[Tiers]:
        """Those of the options, and those that divide within a node, as far as they differ for this many ranks."""
        near = max(1, network.devices // layout.tp)
        inside: list[Tiers] = []
        if 1 < near < layout.hdp and layout.hdp % near == 0:
            inside = [
                Tiers(parameters=near, gradients=near, keep_for="micro_batch"),
                Tiers(parameters=near, gradients="all", keep_for="micro_batch"),
            ]
        if layout.hdp == 1 and layout.edp == 1:
            return [Tiers()]
        return [*self.options.tiers, *inside]

    def _split(self, layout: Layout, schedule: PipelineSchedule, network: Network) -> tuple[int, ...]:
        """Layers of every stage in proportion to the speed of its devices (Holmes, section 3.3)."""
        device, speeds = self.options.device, network.stage_speeds(layout)
        of_stages = tuple(speeds[schedule.rank_of(stage)] for stage in range(schedule.num_stages))
        pairs_per_token = sum(batch.pairs for batch in self.batches) / sum(batch.tokens for batch in self.batches)
        attention = 3.5 / 3.0 * self.shape.attention_flops_per_pair() / self.shape.layers * pairs_per_token
        attention *= device.flops_per_s / device.attention_flops_per_s
        return tuple(len(held) for held in balanced_layers(self.shape, schedule.num_stages, of_stages, attention))

    def _capacities(self, layout: Layout) -> list[int]:
        """Tokens of a micro-batch to try, most first: what fits, holds the longest sequence, and is of any use."""
        memory = self._memory(layout)
        fits = min(self._fitting(memory))
        needed = max(-(-self.longest // layout.hdp), 1)
        if fits < needed:
            nearest = fullest([rank.at(needed) for rank in memory])
            if self.tightest is None or nearest.total < self.tightest.total:
                self.tightest = nearest
            return []
        if self.options.capacities:
            return [capacity for capacity in self.options.capacities if needed <= capacity <= fits]
        useful = max(self.longest, *(-(-batch.tokens // layout.hdp) for batch in self.batches))
        most = _round(min(fits, useful), layout.tp, up=fits >= _round(useful, layout.tp, up=True))
        below = (2**power for power in range((most - 1).bit_length() - 1, 0, -1))
        smaller = itertools.islice((size for size in below if size >= max(needed, _FEWEST_TOKENS)), _CAPACITIES - 1)
        return [most if most >= needed else fits, *smaller]

    def _memory(self, layout: Layout) -> tuple[RankMemory, ...]:
        options = self.options
        use = Occupancy(options.device.reserve_bytes, longest=self.longest, imbalance=options.imbalance)
        return layout_memory(self.shape, layout, options.precision, use)

    def _fitting(self, memory: Sequence[RankMemory]) -> tuple[int, int]:
        """The most tokens of a micro-batch by device memory, and by host memory."""
        device = self.options.device
        host = max(rank.per_token.host for rank in memory)
        fits = min(rank.largest_capacity(device.memory_bytes) for rank in memory)
        return fits, int((device.host_memory_bytes or 0) / host) if host else fits

    def examine(self, layout: Layout, network: Network) -> RankedLayout:
        """The layout as it is."""
        step = estimate(Setup.of(self.shape, layout, self._hardware(network)), self.batches)
        return self._ranked(layout, network, step)

    def _planned(self, candidate: _Candidate) -> RankedLayout:
        found = candidate.found
        setup = Setup.of(self.shape, found.layout, self._hardware(candidate.network))
        step = planned(setup, self.batches)
        return replace(found, step=step, mfu=self._mfu(step, candidate.network), is_planned=True)

    def _ranked(self, layout: Layout, network: Network, step: StepTime) -> RankedLayout:
        memory = self._memory(layout)
        by_device, by_host = self._fitting(memory)
        return RankedLayout(
            layout=layout,
            node_order=network.order,
            step=step,
            memory=fullest(memory),
            memory_bytes=self.options.device.memory_bytes,
            largest_capacity=min(by_device, by_host),
            host_binds=by_host < by_device,
            tokens=self.tokens,
            mfu=self._mfu(step, network),
            convention=self.options.convention,
            is_planned=False,
        )

    def _mfu(self, step: StepTime, network: Network) -> float:
        return utilisation(self.flops, step.total, network.world_size, self.options.device.peak_flops_per_s)

    def _why_none(self) -> str:
        memory_gib = self.options.device.memory_bytes / 2**30
        if self.tightest is None:
            return "no degrees divide the sizes of the model and the devices; use another number of nodes."
        return (
            f"no layout fits into {memory_gib:,.1f} GiB of device memory: the nearest needs {self.tightest}, with "
            f"micro-batches of {self.tightest.capacity:,} tokens, which the longest sequence of {self.longest:,} needs. "
            "Use more nodes, or shorter sequences."
        )


def _activation_fields(choice: ActivationChoice) -> dict[str, Any]:
    return {"activations": choice.policy, "offload": choice.offload}


def _divisors(number: int, most: int | None = None) -> tuple[int, ...]:
    return tuple(divisor for divisor in range(1, min(number, most or number) + 1) if number % divisor == 0)


def _round(tokens: int, tp: int, *, up: bool) -> int:
    """To a number with few significant digits in binary, and a multiple of ``tp``."""
    unit = max(tp, 2 ** max(0, tokens.bit_length() - 4))
    return -(-tokens // unit) * unit if up else tokens // unit * unit


__all__ = ["RankedLayout", "estimate_layout", "search_layouts"]
