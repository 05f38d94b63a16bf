"""The HDP ranks that a batch is planned for: which share a node, and how fast each is."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Pool:
    """HDP ranks 0 to n - 1, numbered node by node."""

    nodes: tuple[int, ...]
    """Node of every rank, ascending."""
    speeds: tuple[float, ...]
    """Of every rank, 1 being nominal; a rank at 0.7 takes 1 / 0.7 of the time."""

    @classmethod
    def of(cls, hdp: int, ranks_per_node: int | None = None, speeds: Sequence[float] = ()) -> Self:
        """So many ranks, ``ranks_per_node`` to a node (None: all); equally fast unless ``speeds`` says other."""
        if speeds and len(speeds) != hdp:
            raise ValueError(f"{len(speeds)} speeds for {hdp} ranks; give one per rank or none.")
        nodes = tuple(rank // (ranks_per_node or hdp) for rank in range(hdp))
        return cls(nodes, tuple(speeds) or (1.0,) * hdp)

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def largest_node(self) -> int:
        """Most ranks that share a node."""
        return max(Counter(self.nodes).values(), default=1)

    def without(self, lost: Collection[int]) -> Self:
        """The pool that is left when ranks are ``lost``; those after them move up."""
        kept = [rank for rank in range(len(self)) if rank not in lost]
        return type(self)(tuple(self.nodes[rank] for rank in kept), tuple(self.speeds[rank] for rank in kept))

    def crosses_nodes(self, ring: Sequence[int]) -> bool:
        """Whether the members of ``ring`` are in more than one node."""
        return len({self.nodes[rank] for rank in ring}) > 1
