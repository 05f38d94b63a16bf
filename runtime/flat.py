"""The parameters and gradients of one rank's model in flat buffers, and who holds what of them.

*Owners* are ranks that hold the same parameters: each steps a part of them. *Sharers* are ranks that hold different parts
of the same model.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from evermesh.checkpoint.cutting import regions_of_interval
from evermesh.checkpoint.regions import Box, Region
from evermesh.checkpoint.shard_map import Shard
from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.experts import GridCut
from evermesh.parallelism.tensor import Cut

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
    """Where every parameter of a set lies in a flat buffer, and which part of it each of ``ranks`` owns. No tensors.

    The order is: matrices that sharers cut, matrices and vectors that they all hold, vectors that they cut. So one
    stretch decays, and one is replicated. The buffer is padded to a multiple of ``ranks``; all sharers have the same
    slots, so that what is replicated is owned by the same rank in all of them.

    Args:
        cuts: of every parameter, by name.
        ranks: owners, among whom the buffer is divided evenly.
    """

    def __init__(self, cuts: Mapping[str, AnyCut], ranks: int) -> None:
        self.entries = _entries(cuts)
        self.num_elements = self.entries[-1].stop if self.entries else 0
        self.num_decayed = max((entry.stop for entry in self.entries if len(entry.cut.shape) >= 2), default=0)
        self.shard_size = -(-self.num_elements // ranks)

    @property
    def replicated(self) -> slice:
        """The part of the buffers that all sharers hold alike."""
        replicated = [entry for entry in self.entries if entry.cut.dim is None]
        return slice(replicated[0].start, replicated[-1].stop) if replicated else slice(0, 0)

    def owned(self, rank: int) -> slice:
        """The part of the flat buffers that ``rank`` steps (for the last ranks it may reach into the padding)."""
        return slice(rank * self.shard_size, (rank + 1) * self.shard_size)

    def owned_parts(self, rank: int) -> Iterator[OwnedPart]:
        """What ``rank`` owns of every parameter that it owns a part of."""
        owned = self.owned(rank)
        for entry in self.entries:
            start, stop = max(entry.start, owned.start), min(entry.stop, owned.stop)
            if start < stop:
                local = slice(start - owned.start, stop - owned.start)
                yield OwnedPart(entry, start - entry.start, stop - entry.start, local)


class FlatParameters(FlatLayout):
    """The parameters and gradients of a model, or of some of it, as views of two flat buffers.

    Args:
        model: holds its parameters, one sharer's part of each.
        ranks: owners.
        cuts: of the parameters to take; None: all of them, and nothing is cut.
    """

    def __init__(self, model: nn.Module, ranks: int, cuts: Mapping[str, AnyCut] | None = None) -> None:
        named = dict(model.named_parameters())
        whole: dict[str, AnyCut] = {name: Cut(tuple(parameter.shape)) for name, parameter in named.items()}
        super().__init__(whole if cuts is None else cuts, ranks)
        like = next(iter(named.values()))
        self.values = torch.zeros(self.shard_size * ranks, dtype=like.dtype, device=like.device)
        self.gradients = torch.zeros_like(self.values)
        for entry in self.entries:
            parameter = named[entry.name]
            part, shape = slice(entry.start, entry.start + parameter.numel()), parameter.shape
            self.values[part] = parameter.detach().flatten()
            parameter.data = self.values[part].view(shape)
            parameter.grad = self.gradients[part].view(shape)

    def square_of_gradients(self, rank: int, *, with_replicated: bool) -> Tensor:
        """Sum of the squares of the gradients that ``rank`` owns, with the replicated ones or without; a float64 scalar."""
        owned, replicated = self.owned(rank), self.replicated
        start, stop = (min(max(edge, owned.start), owned.stop) for edge in (replicated.start, replicated.stop))
        if with_replicated:
            start = stop = owned.stop
        parts = (self.gradients[owned.start : start], self.gradients[stop : owned.stop])
        return torch.stack([part.to(torch.float64).square().sum() for part in parts]).sum()


class ParameterSet(NamedTuple):
    """Parameters that are cut and replicated over the same axes: all of a dense model, or its experts apart."""

    flat: FlatParameters
    owners: Communicator
    """The ranks that hold the same part: they sum its gradients and divide its optimizer state."""
    sharers: Communicator
    """The ranks over which the gradients of what they hold alike are summed."""
    sharer: int = 0
    """Which sharer this rank is: it says which part of a parameter it holds."""
    parts: Communicator | None = None
    """The ranks that hold the parts of the same layers, an expert being a layer; None: the sharers."""


def sum_gradients(sets: Sequence[ParameterSet]) -> Tensor:
    """Sum the gradients of all ranks; returns this rank's part of the square of their norm, a float64 scalar.

    Collective over the axes of every set. What sharers hold alike counts once, on the first of them.
    """
    squares = []
    for flat, owners, sharers, sharer, _ in sets:
        owners.all_reduce(flat.gradients, "gradients")
        # each saw its own tokens only; last, so that these ranks have the same bits of what they hold alike
        if flat.replicated.stop > flat.replicated.start:
            sharers.all_reduce(flat.gradients[flat.replicated], "gradients")
        squares.append(flat.square_of_gradients(owners.rank, with_replicated=sharer == 0))
    return torch.stack(squares).sum()


class HeldSet(NamedTuple):
    """A set of parameters of one pipeline stage, and who holds it."""

    layout: FlatLayout
    holders: Sequence[Sequence[int]]
    """The ranks: for every owner, its sharers."""

    def shards(self) -> Iterator[tuple[FlatEntry, Shard]]:
        """Who holds what of every parameter: every sharer its own part, or all of them the same."""
        for owner, sharers in enumerate(self.holders):
            for part in self.layout.owned_parts(owner):
                row = [tuple(sharers)] if part.entry.cut.dim is None else [(rank,) for rank in sharers]
                for sharer, ranks in enumerate(row):
                    for region in part.entry.regions(sharer, part.start, part.stop):
                        yield part.entry, Shard(region, ranks)


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
