"""What the ranks that hold the same part of a model send to divide its parameters, gradients and states, by formula."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from evermesh.parallelism.ledger import Traffic, collective_traffic
from evermesh.parallelism.links import Operation
from evermesh.parallelism.tiers import Division, Level


@dataclass(frozen=True, slots=True)
class SetSizes:
    """Parameters that are gathered and summed together, as one rank holds them."""

    padded: int
    """Elements of the whole buffer."""
    replicated: tuple[int, int] = (0, 0)
    """Start and stop of what all ranks of a tensor-parallel group train."""
    of_experts: bool = False
    layer: int | None = None
    """The layer they are of; None: of several, or of none."""
    has_embedding: bool = False
    gathers: int = 0
    """How often a micro-batch gathers them, forward and backward, where they stay for a block only."""
    num_norms: int = 0
    """Layers whose norms decide how far an update goes; 0: none do."""


class Rounds(NamedTuple):
    """How often the ranks of a group do something in a step."""

    gathers: int
    reduces: int
    publishes: int


class Owned(NamedTuple):
    """A collective of the ranks that own a set of parameters, in every group of a level."""

    level: Level
    call_site: str
    operation: Operation
    payload_bytes: int
    times: int


def owned_collectives(sizes: SetSizes, division: Division, rounds: Rounds, element_bytes: int) -> Iterator[Owned]:
    """What the owners of one set do in a step; ``element_bytes`` of a parameter."""
    gradient_bytes = max(4, element_bytes)
    of_part, of_gradient = sizes.padded // division.parameters, sizes.padded // division.gradients
    interval = sizes.padded // division.states
    for found in (
        Owned("parameters", "sharded parameters", "all_gather", of_part * element_bytes, rounds.gathers),
        Owned("parameters", "gradients", "reduce_scatter", sizes.padded * gradient_bytes, rounds.reduces),
        Owned("gradients", "gradients", "reduce_scatter", of_part * gradient_bytes, rounds.reduces),
        Owned("sums", "gradients", "all_reduce", of_gradient * gradient_bytes, 1),
        Owned("states", "parameters", "all_gather", interval * element_bytes, rounds.publishes),
        Owned("gradients", "parameters", "all_gather", of_gradient * element_bytes, rounds.publishes),
    ):
        if division.size(found.level) > 1:
            yield found


def owners_traffic(
    sizes: SetSizes, division: Division, rounds: Rounds, axis: str, nodes: Sequence[int], element_bytes: int
) -> Iterator[Traffic]:
    """What the owners of one set send in a step; ``nodes`` of all of them, ``element_bytes`` of a parameter."""
    for found in owned_collectives(sizes, division, rounds, element_bytes):
        for places in division.groups(found.level):
            for _ in range(found.times):
                yield from collective_traffic(
                    found.call_site, found.operation, axis, found.payload_bytes, [nodes[place] for place in places]
                )


def alike(sizes: SetSizes, division: Division, rank: int) -> int:
    """Elements that a rank sums over its tensor-parallel group: what these hold alike, in its part of the gradients."""
    size = sizes.padded // division.gradients
    first = division.gradient_part(rank) * size
    start, stop = sizes.replicated
    return max(0, min(stop, first + size) - max(start, first))


__all__ = ["Owned", "Rounds", "SetSizes", "alike", "owned_collectives", "owners_traffic"]
