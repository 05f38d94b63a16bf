"""Judges single layouts of a model for given batches: what fits, how long a step takes; imports no torch."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from evermesh.parallelism.cost import FlopConvention, ModelShape
from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.layout.degrees import Layout
from evermesh.parallelism.layout.flops import model_flops, utilisation
from evermesh.parallelism.layout.memory import Occupancy, RankMemory, fullest, layout_memory
from evermesh.parallelism.layout.network import Network
from evermesh.parallelism.layout.options import SearchOptions
from evermesh.parallelism.layout.rates import Hardware
from evermesh.parallelism.layout.sample import Batch
from evermesh.parallelism.layout.throughput import Setup, StepTime, estimate, planned

FEWEST_TOKENS = 64
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


class Judge:
    """Knows the model, the batches and the options of a search.

    Raises:
        LayoutDoesNotFit: there are no batches, or one without tokens.
    """

    def __init__(self, shape: ModelShape, lengths: Sequence[Sequence[int]], options: SearchOptions) -> None:
        self.shape, self.options = shape, options
        self.batches = [Batch(batch) for batch in lengths]
        if not self.batches:
            raise LayoutDoesNotFit("no batches to find a layout for; give the lengths of at least one.")
        number = len(self.batches)
        self.longest = max(batch.longest for batch in self.batches)
        self.tokens = sum(batch.tokens for batch in self.batches) / number
        self.pairs = sum(batch.pairs for batch in self.batches) / number
        flops = (model_flops(shape, batch.lengths, options.convention) for batch in self.batches)
        self.flops = sum(flops) / number
        self.tightest: RankMemory | None = None
        """Of all layouts that did not fit, what came nearest to it."""

    def hardware(self, network: Network) -> Hardware:
        """What layouts run on."""
        return Hardware(network, self.options.device, self.options.precision, self.options.imbalance)

    def capacities(self, layout: Layout) -> list[int]:
        """Tokens of a micro-batch to try, most first: what fits, holds the longest sequence, and is of any use."""
        memory = self.memory(layout)
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
        smaller = itertools.islice((size for size in below if size >= max(needed, FEWEST_TOKENS)), _CAPACITIES - 1)
        return [most if most >= needed else fits, *smaller]

    def memory(self, layout: Layout) -> tuple[RankMemory, ...]:
        """What its pipeline ranks need."""
        options = self.options
        use = Occupancy(options.device.reserve_bytes, longest=self.longest, imbalance=options.imbalance)
        return layout_memory(self.shape, layout, options.precision, use)

    def _fitting(self, memory: Sequence[RankMemory]) -> tuple[int, int]:
        """The most tokens of a micro-batch by device memory, and by host memory."""
        device = self.options.device
        host = max(rank.per_token.host for rank in memory)
        fits = min(rank.largest_capacity(device.memory_bytes) for rank in memory)
        return fits, int((device.host_memory_bytes or 0) / host) if host else fits

    def at_once(self, layout: Layout, network: Network) -> RankedLayout:
        """The layout as it is, by formula."""
        step = estimate(Setup.of(self.shape, layout, self.hardware(network)), self.batches)
        return self.ranked(layout, network, step)

    def planned(self, found: RankedLayout, network: Network) -> RankedLayout:
        """The same with every batch planned."""
        step = planned(Setup.of(self.shape, found.layout, self.hardware(network)), self.batches)
        return replace(found, step=step, mfu=self._mfu(step, network), is_planned=True)

    def ranked(self, layout: Layout, network: Network, step: StepTime) -> RankedLayout:
        """The layout with this step."""
        memory = self.memory(layout)
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


def _round(tokens: int, tp: int, *, up: bool) -> int:
    """To a number with few significant digits in binary, and a multiple of ``tp``."""
    unit = max(tp, 2 ** max(0, tokens.bit_length() - 4))
    return -(-tokens // unit) * unit if up else tokens // unit * unit


__all__ = ["FEWEST_TOKENS", "Judge", "RankedLayout"]
