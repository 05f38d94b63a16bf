"""Which rank is where: nodes, each with its share of the ranks."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a job: a machine, or a part of one that stands for a machine."""

    number: int
    count: int
    """Nodes of the job."""
    first_rank: int
    """Its ranks are this and the next ones."""
    workers: int
    """Number of its ranks."""
    world_size: int


@dataclass(frozen=True, slots=True)
class Place:
    """One rank."""

    node: Node
    local_rank: int

    @property
    def rank(self) -> int:
        return self.node.first_rank + self.local_rank


def number_ranks(workers: Sequence[int]) -> tuple[Node, ...]:
    """The nodes that have so many ranks each, numbered node by node."""
    starts = itertools.accumulate(workers, initial=0)
    return tuple(
        Node(number, len(workers), first, own, sum(workers))
        for number, (first, own) in enumerate(zip(starts, workers, strict=False))
    )


def places(nodes: Sequence[Node]) -> list[Place]:
    """The ranks of ``nodes``."""
    return [Place(node, local_rank) for node in nodes for local_rank in range(node.workers)]
