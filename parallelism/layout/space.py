"""Which layouts a search chooses from; imports no torch."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from evermesh.parallelism.cost import ModelShape
from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.layout.degrees import Layout
from evermesh.parallelism.layout.network import Network
from evermesh.parallelism.layout.options import SearchOptions
from evermesh.parallelism.layout.sizes import balanced_layers, check_shape
from evermesh.parallelism.pipeline.schedule import PipelineSchedule, ScheduleName
from evermesh.parallelism.tiers import Tiers


class Degrees(NamedTuple):
    """Of every axis but hdp, which has the rest of the devices."""

    pp: int
    tp: int
    ep: int
    etp: int


class Space:
    """All layouts that a search may choose from, on one order of the nodes; their capacities are not in it.

    Args:
        shape: the model.
        network: the nodes in their order.
        options: what to choose from.
        pairs_per_token: visible pairs of tokens for each token, which say how heavy attention is.
    """

    def __init__(self, shape: ModelShape, network: Network, options: SearchOptions, pairs_per_token: float) -> None:
        self.shape, self.network, self.options, self.pairs_per_token = shape, network, options, pairs_per_token

    def degrees(self) -> Iterator[Degrees]:
        """All that divide the model and use all devices; tensor-parallel groups stay in a node."""
        network, experts = self.network, self.shape.experts
        most_tp = min(self.options.most_tp or network.devices, network.devices)
        eps = _divisors(experts.experts) if experts is not None else (1,)
        etps = _divisors(experts.ffn, network.devices) if experts is not None else (1,)
        for tp, pp in itertools.product(
            _divisors(network.devices, most_tp), _divisors(network.world_size, self.shape.layers)
        ):
            if network.world_size % (pp * tp):
                continue
            for ep, etp in itertools.product(eps, etps):
                degrees = Degrees(pp, tp, ep, etp)
                if network.world_size // pp % (ep * etp) == 0 and self._divides(degrees):
                    yield degrees

    def plain(self, degrees: Degrees) -> Layout:
        """A layout with these degrees, and the default of everything else."""
        pp, tp, ep, etp = degrees
        return Layout(pp=pp, tp=tp, hdp=self.network.world_size // (pp * tp), ep=ep, etp=etp)

    def layouts(self, degrees: Degrees) -> Iterator[Layout]:
        """All with these degrees that the runtime can run."""
        plain, options = self.plain(degrees), self.options
        schedules: Sequence[tuple[ScheduleName, int]] = options.schedules if degrees.pp > 1 else (("1f1b", 1),)
        for (schedule, virtual), tiers, activations in itertools.product(
            schedules, self._tiers(plain), options.activations
        ):
            offloads = activations.policy == "offload"
            moves_nowhere = offloads and options.device.host_memory_bytes is None
            if degrees.pp * virtual > self.shape.layers or moves_nowhere:
                continue
            fields: dict[str, Any] = {
                **degrees._asdict(),
                "hdp": plain.hdp,
                "schedule": schedule,
                "virtual_stages": virtual,
                "sharding": tiers,
                "activations": activations.policy,
                "offload": activations.offload,
            }
            if not self.network.is_even and degrees.pp > 1:
                fields["split"] = self._split(plain, PipelineSchedule(schedule, degrees.pp, virtual))
            layout = Layout(**fields)
            for chunks in options.tp_chunks if degrees.tp > 1 and not offloads else (1,):
                in_parts = layout if chunks == 1 else layout.model_copy(update={"tp_chunks": chunks})
                if options.supports is None or options.supports(in_parts):
                    yield in_parts

    def _divides(self, degrees: Degrees) -> bool:
        try:
            check_shape(self.shape, self.plain(degrees))
        except LayoutDoesNotFit:
            return False
        return True

    def _tiers(self, layout: Layout) -> list[Tiers]:
        """Those of the options, and those that divide within a node."""
        if layout.hdp == 1 and layout.edp == 1:
            return [Tiers()]
        near = max(1, self.network.devices // layout.tp)
        if near == 1 or near >= layout.hdp or layout.hdp % near:
            return list(self.options.tiers)
        return [
            *self.options.tiers,
            Tiers(parameters=near, gradients=near, keep_for="micro_batch"),
            Tiers(parameters=near, gradients="all", keep_for="micro_batch"),
        ]

    def _split(self, layout: Layout, schedule: PipelineSchedule) -> tuple[int, ...]:
        """Layers of every stage in proportion to the speed of its devices (Holmes, arXiv 2312.03549)."""
        device, speeds = self.options.device, self.network.stage_speeds(layout)
        of_stages = tuple(speeds[schedule.rank_of(stage)] for stage in range(schedule.num_stages))
        attention = 3.5 / 3.0 * self.shape.attention_flops_per_pair() / self.shape.layers * self.pairs_per_token
        attention *= device.flops_per_s / device.attention_flops_per_s
        return tuple(len(held) for held in balanced_layers(self.shape, schedule.num_stages, of_stages, attention))


def _divisors(number: int, most: int | None = None) -> tuple[int, ...]:
    return tuple(divisor for divisor in range(1, min(number, most or number) + 1) if number % divisor == 0)


__all__ = ["Degrees", "Space"]
