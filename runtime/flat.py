"""The parameters and gradients of one rank's model in two flat buffers."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from evermesh.checkpoint.cutting import regions_of_interval
from evermesh.checkpoint.regions import Box, Region
from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.tensor import Cut


class FlatEntry(NamedTuple):
    """Where one parameter lies in the flat buffer: in a slot as large as the largest part that any rank holds of it."""

    name: str
    cut: Cut
    start: int
    stop: int

    def regions(self, tp_rank: int, start: int, stop: int) -> tuple[Region, ...]:
        """What elements [start, stop) of the slot hold, on this tensor-parallel rank, of the whole parameter."""
        box = Box(self.cut.offsets(tp_rank), self.cut.local_shape(tp_rank))
        return regions_of_interval(box, self.cut.shape, start, min(stop, box.num_elements))


class OwnedPart(NamedTuple):
    """What an HDP rank owns of one parameter: elements [start, stop) of its slot, ``local`` in the rank's own part."""

    entry: FlatEntry
    start: int
    stop: int
    local: slice


class FlatParameters:
    """The parameters and gradients of a model as views of two flat buffers.

    The order is: matrices that tensor-parallel ranks share, matrices and vectors that they all hold, vectors that they
    share. So one stretch decays, and one is replicated. The buffers are padded to a multiple of ``ranks``; all
    tensor-parallel ranks have the same slots, so that what is replicated is owned by the same HDP rank in all of them.

    Args:
        model: holds its parameters, one tensor-parallel rank's part of each.
        ranks: number of HDP ranks.
        cuts: of every parameter, as ``apply_tensor_parallel`` returns them; None: nothing is cut.
    """

    def __init__(self, model: nn.Module, ranks: int, cuts: Mapping[str, Cut] | None = None) -> None:
        named = dict(model.named_parameters())
        whole = {name: Cut(tuple(parameter.shape)) for name, parameter in named.items()}
        self.entries = _entries(whole if cuts is None else cuts)
        self.num_elements = self.entries[-1].stop
        self.num_decayed = max((entry.stop for entry in self.entries if len(entry.cut.shape) >= 2), default=0)
        self.shard_size = -(-self.num_elements // ranks)
        like = next(iter(named.values()))
        self.values = torch.zeros(self.shard_size * ranks, dtype=like.dtype, device=like.device)
        self.gradients = torch.zeros_like(self.values)
        for entry in self.entries:
            parameter = named[entry.name]
            part, shape = slice(entry.start, entry.start + parameter.numel()), parameter.shape
            self.values[part] = parameter.detach().flatten()
            parameter.data = self.values[part].view(shape)
            parameter.grad = self.gradients[part].view(shape)

    @property
    def replicated(self) -> slice:
        """The part of the buffers that all ranks of a tensor-parallel group hold alike."""
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

    def square_of_gradients(self, rank: int, *, with_replicated: bool) -> Tensor:
        """Sum of the squares of the gradients that ``rank`` owns, with the replicated ones or without; a float64 scalar."""
        owned, replicated = self.owned(rank), self.replicated
        start, stop = (min(max(edge, owned.start), owned.stop) for edge in (replicated.start, replicated.stop))
        if with_replicated:
            start = stop = owned.stop
        parts = (self.gradients[owned.start : start], self.gradients[stop : owned.stop])
        return torch.stack([part.to(torch.float64).square().sum() for part in parts]).sum()


def sum_gradients(flat: FlatParameters, hdp: Communicator, tp: Communicator) -> Tensor:
    """Sum the gradients of all ranks; returns this rank's part of the square of their norm, a float64 scalar.

    Collective over both axes. What tensor-parallel ranks hold alike counts once, on the first of them.
    """
    hdp.all_reduce(flat.gradients, "gradients")
    # each saw its own tokens only; last, so that these ranks have the same bits of what they hold alike
    tp.all_reduce(flat.gradients[flat.replicated], "gradients")
    return flat.square_of_gradients(hdp.rank, with_replicated=tp.rank == 0)


def _entries(cuts: Mapping[str, Cut]) -> list[FlatEntry]:
    entries: list[FlatEntry] = []
    position = 0
    for name, cut in sorted(cuts.items(), key=lambda item: _group(item[1])):  # stable: in the order of the model
        size = max(cut.num_elements(rank) for rank in range(cut.ranks))
        entries.append(FlatEntry(name, cut, position, position + size))
        position += size
    return entries


def _group(cut: Cut) -> int:
    is_matrix, is_replicated = len(cut.shape) >= 2, cut.dim is None
    return (1 if is_replicated else 0) if is_matrix else (2 if is_replicated else 3)
