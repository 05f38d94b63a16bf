"""How the ranks of an axis divided a tensor: the few types that tensor parallelism of other projects is described in.

What a pattern makes of the shapes that the ranks hold is the form of our own shard maps: their parts lie end to end in a
*stored* tensor, the order of fused pieces is a permutation, a padded vocabulary is padding. Imports no torch. The
patterns are those of Lian et al., Universal Checkpointing, USENIX ATC 2025, table 2.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from evermesh.checkpoint.errors import ShardMapInvalid
from evermesh.checkpoint.regions import Box, Padding, Permutation, StoredForm

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Replicated:
    """Every rank holds all of it; the first one's is read."""


@dataclass(frozen=True, slots=True)
class Divided:
    """The parts of the ranks lie end to end along a dim."""

    dim: int = 0


@dataclass(frozen=True, slots=True)
class Fused:
    """Several tensors lie end to end along a dim, and each of them is divided: fused projections, SwiGLU halves."""

    dim: int
    widths: tuple[tuple[int, ...], ...]
    """By tensor and rank: indices along the dim."""


Pattern = Replicated | Divided | Fused


@dataclass(frozen=True, slots=True)
class Combined:
    """What the ranks hold together."""

    form: StoredForm
    boxes: tuple[Box | None, ...]
    """By rank: its part of the stored form; None: it holds only what another one holds too."""


def combine(pattern: Pattern, shapes: Sequence[Shape], rows: int | None = None) -> Combined:
    """Put together what ranks hold of a tensor, given the shape of each one's part.

    ``rows``: beyond these dim 0 is padding.

    Raises:
        ShardMapInvalid: the shapes are not what the pattern says.
    """
    if isinstance(pattern, Replicated):
        if len(set(shapes)) != 1:
            raise ShardMapInvalid(f"replicas have the shapes {sorted(set(shapes))}")
        whole = Box((0,) * len(shapes[0]), shapes[0])
        return Combined(_form(shapes[0], rows), (whole, *(None,) * (len(shapes) - 1)))
    dim = pattern.dim
    others = {(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}
    if len(others) != 1 or any(len(shape) <= dim for shape in shapes):
        raise ShardMapInvalid(f"parts along dim {dim} have the shapes {sorted(set(shapes))}")
    starts = [0, *itertools.accumulate(shape[dim] for shape in shapes)]
    first = shapes[0]
    boxes = [
        Box(tuple(start * (d == dim) for d in range(len(shape))), shape)
        for start, shape in zip(starts, shapes, strict=False)
    ]
    permutation = _permutation(pattern, shapes, starts) if isinstance(pattern, Fused) else None
    stored = (*first[:dim], starts[-1], *first[dim + 1 :])
    return Combined(_form(stored, rows, permutation), tuple(boxes))


def _form(stored: Shape, rows: int | None, permutation: Permutation | None = None) -> StoredForm:
    if rows is None or not stored or rows == stored[0]:
        return StoredForm(stored, permutation)
    if rows > stored[0]:
        raise ShardMapInvalid(f"{stored[0]} rows are there of {rows}")
    return StoredForm((rows, *stored[1:]), permutation, Padding(0, stored[0] - rows))


def _permutation(pattern: Fused, shapes: Sequence[Shape], starts: Sequence[int]) -> Permutation:
    """From the order of the ranks to the order of the fused tensors."""
    pieces, logical = [], 0
    reached = list(starts[:-1])
    for widths in pattern.widths:
        if len(widths) != len(shapes):
            raise ShardMapInvalid(f"{len(widths)} widths are given for {len(shapes)} ranks")
        for rank, width in enumerate(widths):
            pieces.append((logical, reached[rank], width))
            logical += width
            reached[rank] += width
    if reached != list(starts[1:]):
        raise ShardMapInvalid(
            f"fused widths {pattern.widths} are not those of parts {[s[pattern.dim] for s in shapes]}"
        )
    return Permutation(pattern.dim, tuple(pieces))
