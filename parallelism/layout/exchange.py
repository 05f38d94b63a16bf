"""Seconds in which the ranks that hold the same part of a model exchange gradients and parameters; imports no torch.

The operations are those of ``tiers_traffic.owners_traffic``, each on the links that its group uses.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from evermesh.parallelism.cost import ModelShape
from evermesh.parallelism.layout.degrees import Layout
from evermesh.parallelism.layout.network import Network
from evermesh.parallelism.layout.rates import Hardware
from evermesh.parallelism.layout.sizes import contents, rank_sets
from evermesh.parallelism.tiers import LEVELS, Division, Level
from evermesh.parallelism.tiers_traffic import SetSizes

_UPDATE_BYTES = 30
"""That an update reads and writes for each element: master and moments both ways, gradient, parameter."""


class Exchange(NamedTuple):
    """Of one pipeline rank."""

    gathers: float
    """Once: the parameters that others hold."""
    reduces: float
    """Once: gradients to those who divide them."""
    sums: float
    """Per step: what is added up among those who hold the same part of gradients."""
    publishes: float
    """Per step: updated parameters, back to those who divide gradients or states."""


def exchange(
    sets: Sequence[SetSizes], layout: Layout, network: Network, element_bytes: int, hop_s: float = 0.0
) -> Exchange:
    """Of a pipeline rank with these sets; ``hop_s`` fixed seconds of each step of an operation."""
    total = [0.0, 0.0, 0.0, 0.0]
    for (padded, of_experts), number in Counter((sizes.padded, sizes.of_experts) for sizes in sets).items():
        division = layout.expert_division if of_experts else layout.division
        stride = layout.ep * layout.etp if of_experts else layout.tp
        paths = {level: _Path.of(division, level, stride, network, hop_s) for level in LEVELS}
        for index, seconds in enumerate(_exchange(padded, division, paths, element_bytes)):
            total[index] += number * seconds
    return Exchange(*total)


class _Path(NamedTuple):
    """The groups of a level, and how they reach each other."""

    ranks: int
    bytes_per_s: float
    hop_s: float

    @classmethod
    def of(cls, division: Division, level: Level, stride: int, network: Network, hop_s: float) -> "_Path":
        inner = {
            "parameters": 1,
            "gradients": division.parameters,
            "sums": division.gradients,
            "states": division.gradients,
        }
        ranks = division.size(level)
        return cls(ranks, network.group_bytes_per_s(ranks, stride * inner[level]) if ranks > 1 else 1.0, hop_s)

    def seconds(self, num_bytes: float) -> float:
        """To gather, or to reduce and scatter, a buffer of so many bytes."""
        if self.ranks == 1:
            return 0.0
        return (self.ranks - 1) * (num_bytes / self.ranks / self.bytes_per_s + self.hop_s)


def _exchange(
    padded: int, division: Division, paths: Mapping[Level, _Path], element_bytes: int
) -> tuple[float, float, float, float]:
    wide = max(4, element_bytes)
    of_part, of_gradient = padded / division.parameters, padded / division.gradients
    parameters, gradients, sums, states = (paths[level].seconds for level in LEVELS)
    return (
        parameters(padded * element_bytes),
        parameters(padded * wide) + gradients(of_part * wide),
        2.0 * sums(of_gradient * wide),
        states(of_gradient * element_bytes) + gradients(of_part * element_bytes),
    )


class Exchanged(NamedTuple):
    """Traffic besides that of tokens, of the pipeline rank for which it takes longest, in seconds; and its update."""

    once: Mapping[str, float]
    """Of each step."""
    per_micro_batch: float
    """Of each micro-batch; hides behind computation as far as it fits."""


def exchanged(shape: ModelShape, layout: Layout, hardware: Hardware) -> Exchanged:
    """Of the pipeline rank that is slowest; raises LayoutDoesNotFit where nodes that have to talk cannot."""
    device, in_step = hardware.device, layout.tiers.in_lock_step
    found: list[Exchanged] = []
    for sets in {rank_sets(shape, layout, pp_rank): None for pp_rank in _different(shape, layout)}:
        parts = exchange(sets, layout, hardware.network, hardware.precision.element_bytes, device.hop_s)
        reduces = 0.0 if in_step and not layout.keeps_gradients else parts.reduces
        once = {
            "gradients": reduces + parts.sums,
            "sharded parameters": 0.0 if in_step else parts.gathers,
            "updated parameters": parts.publishes,
            "update": _owned(sets, layout) * _UPDATE_BYTES / device.memory_bytes_per_s,
        }
        found.append(Exchanged(once, (2.0 * parts.gathers + parts.reduces - reduces) if in_step else 0.0))
    return max(found, key=lambda one: sum(one.once.values()) + one.per_micro_batch)


def _owned(sets: Sequence[SetSizes], layout: Layout) -> float:
    """Elements that a rank updates."""
    dense, experts = layout.division.states, layout.expert_division.states
    return sum(sizes.padded / (experts if sizes.of_experts else dense) for sizes in sets)


def _different(shape: ModelShape, layout: Layout) -> list[int]:
    """Pipeline ranks that hold different things, as far as it matters what they hold."""
    kinds: dict[object, int] = {}
    for pp_rank, kind in enumerate(contents(shape, layout)):
        kinds.setdefault(kind, pp_rank)
    return list(kinds.values())


__all__ = ["Exchange", "Exchanged", "exchange", "exchanged"]
