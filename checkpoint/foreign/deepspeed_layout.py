"""How ZeRO lays parameters end to end and cuts them among ranks. Imports no torch.

Format: as found in files of version 0.19.8, and in what its unmodified engine loads. Positions are elements.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

from evermesh.checkpoint.foreign.deepspeed_model import Slicing, even

_ALIGNMENT = 2
"""Of partitions of stages 1 and 2, elements."""
SUB_GROUP_SIZE = 1_000_000_000
"""Of stage 3: elements of one rank, unless the configuration says otherwise."""
T = TypeVar("T")


class Partition(NamedTuple):
    """What a rank holds of a group (stage 3: sub-group) of parameters laid end to end."""

    slices: tuple[Slicing, ...]
    length: int
    padding: int
    """Elements at its end that belong to no parameter (stage 3: 0, they are between parameters)."""


def flat_partition(shapes: dict[str, tuple[int, ...]], rank: int, ranks: int) -> Partition:
    """Stages 1 and 2: parameters end to end, padded, cut into equal partitions."""
    total = sum(map(math.prod, shapes.values()))
    length = -(-total // (_ALIGNMENT * ranks)) * _ALIGNMENT
    begin, slices, at = rank * length, list[Slicing](), 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        first, last = max(at, begin), min(at + size, begin + length)
        if first < last:
            slices.append((name, first - begin, first - at, last - first))
        at += size
    return Partition(tuple(slices), length, min(max(begin + length - total, 0), length))


def even_partition(shapes: dict[str, tuple[int, ...]], rank: int, ranks: int) -> Partition:
    """Stage 3: every parameter is cut evenly, rounded up."""
    return Partition(
        tuple(even(shapes, rank, ranks)), sum(-(-math.prod(shape) // ranks) for shape in shapes.values()), 0
    )


def sub_groups(shapes: dict[str, tuple[int, ...]], ranks: int, most: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Stage 3 cuts a group into sub-groups once they have ``most`` elements on a rank."""
    found: dict[str, tuple[int, ...]] = {}
    length = 0
    for name, shape in shapes.items():
        found[name] = shape
        length += -(-math.prod(shape) // ranks)
        if length >= most:
            yield found
            found, length = {}, 0
    if found:
        yield found


def dealt(items: Sequence[T], ranks: int) -> list[T]:
    """The order of parameters with ``round_robin_gradients``: every ``ranks``-th one, beginning with each in turn."""
    return [item for first in range(ranks) for item in items[first::ranks]]


def undealt(items: Sequence[T], ranks: int) -> list[T]:
    """The order before ``dealt``."""
    order = dealt(range(len(items)), ranks)
    return [item for _, item in sorted(zip(order, items, strict=True), key=lambda pair: pair[0])]
