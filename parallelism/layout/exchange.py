"""Seconds in which the ranks that hold the same part of a model exchange gradients and parameters; imports no torch.

The operations are those of ``tiers_traffic.owners_traffic``, each on the links that its group uses.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from evermesh.parallelism.layout.degrees import Layout
from evermesh.parallelism.layout.network import Network
from evermesh.parallelism.tiers import LEVELS, Division, Level
from evermesh.parallelism.tiers_traffic import SetSizes


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


__all__ = ["Exchange", "exchange"]
