"""Where the parameters of a model lie in flat buffers, and who holds what of them. No tensors.

*Owners* are ranks that hold the same parameters: each steps a part of them. *Sharers* are ranks that hold different parts
of the same model.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from evermesh.checkpoint.cutting import regions_of_interval
from evermesh.checkpoint.regions import Box, Region
from evermesh.checkpoint.rules import DimCut, FlatCut, RankGrid, ShardingRule
from evermesh.parallelism.experts import GridCut
from evermesh.parallelism.tensor import Cut
from evermesh.parallelism.tiers import Division

AnyCut = Cut | GridCut


class FlatEntry(NamedTuple):
    """Where one parameter lies in the flat buffer: in a slot as large as the largest part that any rank holds of it."""

    name: str
    cut: AnyCut
    start: int
    stop: int

    def regions(self, sharer: int, start: int, stop: int) -> tuple[Region, ...]:
        """What elements [start, stop) of the slot hold, on this sharer, of the whole parameter."""
        box = Box(self.cut.offsets(sharer), self.cut.local_shape(sharer))
        return regions_of_interval(box, self.cut.shape, start, min(stop, box.num_elements))


class OwnedPart(NamedTuple):
    """What a rank owns of one parameter: elements [start, stop) of its slot, ``local`` in the rank's own part."""

    entry: FlatEntry
    start: int
    stop: int
    local: slice


class FlatLayout:
    """Where every parameter of a set lies in a flat buffer, and which part of it each owner steps.

    The order is: matrices that sharers cut, matrices and vectors that they all hold, vectors that they cut. So one
    stretch decays, and one is replicated. The buffer is padded so that all intervals are equal; all sharers have the
    same slots, so that what is replicated is owned by the same rank in all of them.

    Args:
        cuts: of every parameter, by name.
        division: of the buffer among its owners.
    """

    def __init__(self, cuts: Mapping[str, AnyCut], division: Division) -> None:
        self.entries, self.division = _entries(cuts), division
        self.num_elements = self.entries[-1].stop if self.entries else 0
        self.num_decayed = max((entry.stop for entry in self.entries if len(entry.cut.shape) >= 2), default=0)
        self.shard_size = -(-self.num_elements // division.states)
        """Elements that a rank steps."""

    @property
    def replicated(self) -> slice:
        """The part of the buffers that all sharers hold alike."""
        replicated = [entry for entry in self.entries if entry.cut.dim is None]
        return slice(replicated[0].start, replicated[-1].stop) if replicated else slice(0, 0)

    @property
    def padded(self) -> int:
        """Elements of a whole buffer."""
        return self.shard_size * self.division.states

    def owned(self, rank: int) -> slice:
        """The part of the flat buffers that ``rank`` steps (the last ones may reach into the padding)."""
        return self._part(self.division.interval(rank), self.division.states)

    def gradient_part(self, rank: int) -> slice:
        """The part of the flat buffers whose summed gradients ``rank`` holds."""
        return self._part(self.division.gradient_part(rank), self.division.gradients)

    def parameter_part(self, rank: int) -> slice:
        """The part of the flat buffers that ``rank`` holds while nobody computes with them."""
        return self._part(self.division.parameter_part(rank), self.division.parameters)

    def _part(self, index: int, parts: int) -> slice:
        size = self.padded // parts
        return slice(index * size, (index + 1) * size)

    def owned_parts(self, rank: int) -> Iterator[OwnedPart]:
        """What ``rank`` owns of every parameter that it owns a part of."""
        owned = self.owned(rank)
        for entry in self.entries:
            start, stop = max(entry.start, owned.start), min(entry.stop, owned.stop)
            if start < stop:
                local = slice(start - owned.start, stop - owned.start)
                yield OwnedPart(entry, start - entry.start, stop - entry.start, local)


class HeldSet(NamedTuple):
    """A set of parameters of one pipeline stage, and who holds it."""

    layout: FlatLayout
    holders: Sequence[Sequence[int]]
    """The ranks: for every owner, its sharers."""

    def rules(self) -> Iterator[tuple[FlatEntry, ShardingRule]]:
        """Who holds what of every parameter: every sharer its own part, or all of them the same."""
        grid = self._grid
        for entry in self.layout.entries:
            flat = FlatCut(_INTERVALS, entry.start, self.layout.shard_size)
            yield entry, ShardingRule(grid, _dim_cuts(entry.cut), flat)

    @property
    def _grid(self) -> RankGrid:
        """Its axes: three that number the intervals of the owners (``Division.interval``), their copies, the sharers; of
        experts one for each cut."""
        division, first = self.layout.division, self.holders[0][0]
        owner = self.holders[1][0] - first if len(self.holders) > 1 else len(self.holders[0])
        degrees = (1, division.parameters, division.gradients, division.states, division.ranks)
        owners = tuple((high // low, low * owner) for low, high in itertools.pairwise(degrees))
        cut = self.layout.entries[0].cut
        sizes = [number for _, number in cut.parts] if isinstance(cut, GridCut) else [len(self.holders[0])]
        strides = [math.prod(sizes[at + 1 :]) for at in range(len(sizes))]
        grid = RankGrid(first, (*owners, *zip(sizes, strides, strict=True)))
        assert grid.last == self.holders[-1][-1], "a mesh numbers its ranks axis by axis"
        return grid


_INTERVALS, _SHARERS = (0, 1, 2), 4
"""Axes of the grid of a set."""


def _dim_cuts(cut: AnyCut) -> tuple[DimCut, ...]:
    if isinstance(cut, GridCut):
        return tuple(DimCut(dim, (_SHARERS + at,)) for at, (dim, _) in enumerate(cut.parts))
    return () if cut.dim is None else (DimCut(cut.dim, (_SHARERS,)),)


def _entries(cuts: Mapping[str, AnyCut]) -> list[FlatEntry]:
    entries: list[FlatEntry] = []
    position = 0
    for name, cut in sorted(cuts.items(), key=lambda item: _group(item[1])):  # stable: in the order of the model
        size = max(cut.num_elements(rank) for rank in range(cut.ranks))
        entries.append(FlatEntry(name, cut, position, position + size))
        position += size
    return entries


def _group(cut: AnyCut) -> int:
    is_matrix, is_replicated = len(cut.shape) >= 2, cut.dim is None
    return (1 if is_replicated else 0) if is_matrix else (2 if is_replicated else 3)
