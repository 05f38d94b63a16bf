"""How DeepSpeed divides parameters among ranks, by rule: what a checkpoint must know of every rank without asking it.

Stages 1 and 2 lay the parameters of a group end to end, pad them to a multiple of twice the ranks, and give every rank
an equal part. Stage 3 gives every rank an equal part of each parameter, the last ones what is left.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from evermesh.checkpoint.rules import FlatCut, RankGrid, ShardingRule
from evermesh.checkpoint.shard_map import ShardMap, TensorShards
from evermesh.runtime.optimizer import KINDS

ALIGNMENT = 2
"""Elements to a multiple of which stages 1 and 2 pad the part of a rank."""
STATE_DTYPE = "float32"
Shape = tuple[int, ...]


class Fragment(NamedTuple):
    """What a rank holds of one parameter: elements [start, stop) of it, flattened."""

    name: str
    rank: int
    start: int
    stop: int


def groups_of(shapes: Mapping[str, Shape]) -> tuple[list[str], ...]:
    """Names of what decays (matrices) and of what does not (vectors), each in the order of the model; none is empty."""
    decayed = [name for name, shape in shapes.items() if len(shape) >= 2]
    others = [name for name, shape in shapes.items() if len(shape) < 2]
    return tuple(names for names in (decayed, others) if names)


def fragments(shapes: Mapping[str, Shape], stage: int, ranks: int) -> Iterator[Fragment]:
    """What each of ``ranks`` holds, in the order of the groups; none is empty."""
    for name, cut in _flat_cuts(shapes, stage, ranks):
        yield from _cut(name, cut.start, math.prod(shapes[name]), cut.length, ranks)


def partition_size(sizes: Sequence[int], ranks: int) -> int:
    """Elements of every rank's part of a group of parameters of these sizes, with stages 1 and 2."""
    return -(-sum(sizes) // (ALIGNMENT * ranks)) * ALIGNMENT


def shard_map(shapes: Mapping[str, Shape], stage: int, ranks: int) -> ShardMap:
    """Which rank holds which part of which tensor; the same on every rank. Makes no tensors."""
    grid = RankGrid(0, ((ranks, 1),))
    rules = {name: ShardingRule(grid, flat=cut) for name, cut in _flat_cuts(shapes, stage, ranks)}
    return ShardMap(
        tensors={
            f"{kind}.{name}": TensorShards(STATE_DTYPE, shape, rules[name])
            for kind in KINDS
            for name, shape in shapes.items()
        }
    )


def _flat_cuts(shapes: Mapping[str, Shape], stage: int, ranks: int) -> Iterator[tuple[str, FlatCut]]:
    """How each parameter is cut, in the order of the groups."""
    for names in groups_of(shapes):
        sizes = {name: math.prod(shapes[name]) for name in names}
        position, part = 0, partition_size(list(sizes.values()), ranks)
        for name, size in sizes.items():
            yield name, FlatCut((0,), 0, -(-size // ranks)) if stage == 3 else FlatCut((0,), position, part)
            position += size


def _cut(name: str, position: int, size: int, part: int, ranks: int) -> Iterator[Fragment]:
    """A parameter at ``position`` of a buffer of which every rank holds ``part`` elements."""
    for rank in range(position // part, min(ranks, -(-(position + size) // part))):
        start, stop = max(position, rank * part), min(position + size, (rank + 1) * part)
        yield Fragment(name, rank, start - position, stop - position)
