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

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from evermesh.parallelism.cost import ModelShape
from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.layout.degrees import Layout, check_folding
from evermesh.parallelism.layout.exchange import Exchanged, exchanged
from evermesh.parallelism.layout.network import Network, node_orders
from evermesh.parallelism.layout.options import SearchOptions
from evermesh.parallelism.layout.ranked import FEWEST_TOKENS, Judge, RankedLayout
from evermesh.parallelism.layout.rates import Rates, rates
from evermesh.parallelism.layout.sizes import check_shape
from evermesh.parallelism.layout.space import Degrees, Space
from evermesh.parallelism.layout.throughput import Setup, estimate
from evermesh.parallelism.topology import Topology


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
        LayoutDoesNotFit: there are no batches, no layout fits into memory (it says what comes nearest), or nodes cannot
            talk to each other.
    """
    return _Search(topology, Judge(shape, lengths, options or SearchOptions())).run()


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
    judge = Judge(shape, lengths, options or SearchOptions())
    network = Network(topology, order)
    layout.check_world(network.world_size)
    check_folding(layout.hdp, layout.tp, layout.ep, layout.etp)
    check_shape(shape, layout)
    return judge.at_once(layout, network)


class _Candidate(NamedTuple):
    """The best layout of one set of degrees."""

    seconds: float
    number: int
    found: RankedLayout
    network: Network


class _Search:
    def __init__(self, topology: Topology, judge: Judge) -> None:
        self.topology, self.judge, self.options = topology, judge, judge.options
        most = max(self.options.planned, self.options.top)
        self.finalists = most if self.options.planned else self.options.top

    def run(self) -> list[RankedLayout]:
        """See ``search_layouts``."""
        finalists = self._candidates()[: self.finalists]
        if not finalists:
            raise LayoutDoesNotFit(self._why_none())
        ranked = [candidate.found for candidate in finalists]
        if self.options.planned:
            ranked = [self.judge.planned(candidate.found, candidate.network) for candidate in finalists]
        return sorted(ranked, key=lambda found: found.step.total)[: self.options.top]

    def _candidates(self) -> list[_Candidate]:
        """The best layout of every set of degrees that is worth it, the fastest first."""
        bounds, judge = list[tuple[float, int, Degrees, Space]](), self.judge
        for order in node_orders(self.topology):
            space = Space(judge.shape, Network(self.topology, order), self.options, judge.pairs / judge.tokens)
            for degrees in space.degrees():
                bounds.append((self._bound(degrees, space), len(bounds), degrees, space))
        best: dict[Degrees, _Candidate] = {}
        for bound, number, degrees, space in sorted(bounds, key=lambda entry: entry[:2]):
            times = sorted(candidate.seconds for candidate in best.values())
            limit = times[self.finalists - 1] if len(times) >= self.finalists else float("inf")
            if bound >= limit:
                break
            if degrees in best:  # on another order of the nodes
                limit = min(limit, best[degrees].seconds)
            found = self._best(degrees, space, limit)
            if found is not None:
                best[degrees] = _Candidate(found.step.total, number, found, space.network)
        return sorted(best.values(), key=lambda candidate: candidate[:2])

    def _bound(self, degrees: Degrees, space: Space) -> float:
        """Seconds that no layout with these degrees can beat."""
        judge, most = self.judge, max(self.options.tp_chunks)  # the more parts, the more traffic hides
        layout = space.plain(degrees).model_copy(update={"tp_chunks": most})
        found = rates(judge.shape, layout, judge.hardware(space.network))
        work = found.token * judge.tokens + found.pair * judge.pairs
        return work / (layout.hdp * layout.pp) / max(space.network.speeds)

    def _best(self, degrees: Degrees, space: Space, limit: float) -> RankedLayout | None:
        """The fastest layout with these degrees that fits and takes less than ``limit`` seconds; None: there is none."""
        judge, best = self.judge, None
        fewest = max(FEWEST_TOKENS, -(-judge.longest // space.plain(degrees).hdp))
        setups = [(setup.least(judge.batches, fewest), setup) for setup in self._setups(degrees, space)]
        for least, setup in sorted(setups, key=lambda entry: entry[0]):  # stable: equals in the order of the options
            if least >= limit:
                break
            for capacity in judge.capacities(setup.layout):
                sized = setup.layout.model_copy(update={"capacity": capacity})
                step = estimate(setup._replace(layout=sized), judge.batches)
                if step.total < limit:
                    best, limit = judge.ranked(sized, space.network, step), step.total
        return best

    def _setups(self, degrees: Degrees, space: Space) -> Iterator[Setup]:
        """All layouts with these degrees; what several of them share is computed once."""
        shape, hardware = self.judge.shape, self.judge.hardware(space.network)
        known_rates: dict[object, Rates] = {}
        known_traffic: dict[object, Exchanged] = {}
        for layout in space.layouts(degrees):
            by_activations = layout.activations, layout.offload, layout.tp_chunks
            if by_activations not in known_rates:
                known_rates[by_activations] = rates(shape, layout, hardware)
            by_holding = layout.schedule, layout.virtual_stages, layout.sharding
            if by_holding not in known_traffic:
                known_traffic[by_holding] = exchanged(shape, layout, hardware)
            yield Setup.from_parts(shape, layout, hardware, known_rates[by_activations], known_traffic[by_holding])

    def _why_none(self) -> str:
        tightest, longest = self.judge.tightest, self.judge.longest
        memory_gib = self.judge.options.device.memory_bytes / 2**30
        if tightest is None:
            return "no degrees divide the sizes of the model and the devices; use another number of nodes."
        return (
            f"no layout fits into {memory_gib:,.1f} GiB of device memory: the nearest needs {tightest}, with "
            f"micro-batches of {tightest.capacity:,} tokens, which the longest sequence of {longest:,} needs. "
            "Use more nodes, or shorter sequences."
        )


__all__ = ["RankedLayout", "estimate_layout", "search_layouts"]
