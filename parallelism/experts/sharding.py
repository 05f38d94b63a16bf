"""How a model family says which parameters are stacks of experts, and what each rank holds of them; imports no torch.

The ranks of an expert group are a grid of ``ep`` x ``etp``: rank ``ep_rank * etp + etp_rank`` holds block ``ep_rank`` of the
experts, and of each of them part ``etp_rank`` of its width (Megatron-Core, MoE Parallel Folding, arXiv 2504.14960).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.tensor.sharding import part_of


@dataclass(frozen=True, slots=True)
class GridCut:
    """One parameter, and what each rank of a grid holds of it. Answers what ``evermesh.parallelism.tensor.Cut`` does."""

    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    parts: tuple[tuple[int, int], ...] = ()
    """(dim, number of parts) of every cut, the slowest coordinate of the grid first."""

    @property
    def ranks(self) -> int:
        """Ranks of the grid."""
        return math.prod(number for _, number in self.parts)

    @property
    def dim(self) -> int | None:
        """The first dim that is cut; None: every rank holds all."""
        return next((dim for dim, number in self.parts if number > 1), None)

    def spans(self, rank: int) -> dict[int, tuple[int, int]]:
        """[start, stop) of what ``rank`` holds, by the dims that have a cut."""
        spans: dict[int, tuple[int, int]] = {}
        for dim, number in reversed(self.parts):
            rank, coordinate = divmod(rank, number)
            spans[dim] = part_of(self.shape[dim], number, coordinate)
        return spans

    def offsets(self, rank: int) -> tuple[int, ...]:
        """First index of this rank's part, along every dim."""
        spans = self.spans(rank)
        return tuple(spans[dim][0] if dim in spans else 0 for dim in range(len(self.shape)))

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of this rank's part."""
        spans = self.spans(rank)
        return tuple(spans[dim][1] - spans[dim][0] if dim in spans else size for dim, size in enumerate(self.shape))

    def num_elements(self, rank: int) -> int:
        """Elements of this rank's part."""
        return math.prod(self.local_shape(rank))


@dataclass(frozen=True, slots=True)
class ExpertSharding:
    """What a model family declares."""

    parameters: Mapping[str, int]
    """By pattern of ``fnmatch``: the dim of a stack of experts that is their width. Dim 0 is the expert."""

    def cuts(self, shapes: Mapping[str, Sequence[int]], ep: int, etp: int) -> dict[str, GridCut]:
        """The cut of every stack of experts among ``shapes``, which are those of the whole parameters.

        Raises:
            LayoutDoesNotFit: a degree does not divide the experts or their width; names the degrees that do.
        """
        cuts: dict[str, GridCut] = {}
        for name, shape in shapes.items():
            for pattern, width in self.parameters.items():
                if fnmatchcase(name, pattern):
                    check_degrees(ep, etp, experts=shape[0], ffn=shape[width])
                    cuts[name] = GridCut(tuple(shape), ((0, ep), (width, etp)))
        return cuts


def check_degrees(ep: int, etp: int, *, experts: int, ffn: int) -> None:
    """Raise ``LayoutDoesNotFit``, with the degrees that would do, unless ep divides ``experts`` and etp ``ffn``."""
    for axis, degree, what, size in (("ep", ep, "experts", experts), ("etp", etp, "the width of an expert", ffn)):
        if size % degree:
            legal = ", ".join(str(number) for number in range(1, size + 1) if size % number == 0)
            raise LayoutDoesNotFit(
                f"layout.{axis} is {degree}, which does not divide {what}, {size}. It can be {legal}.", axis=axis
            )


__all__ = ["ExpertSharding", "GridCut", "check_degrees"]
