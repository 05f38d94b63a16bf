"""The regions of a logical tensor that a flat interval of one of its boxes stands for.

Tensor parallelism gives a rank a box of a tensor; ZeRO cuts the row-major storage of that box into intervals.
"""

import math
from collections.abc import Iterator, Sequence

from evermesh.checkpoint.regions import Box, Interval, Region


def regions_of_interval(box: Box, shape: Sequence[int], start: int, stop: int) -> tuple[Region, ...]:
    """Regions of the tensor of ``shape`` that together are elements [start, stop) of the row-major storage of ``box``.

    Their storages laid end to end are that interval. A box that is whole in all dims but the first gives one interval,
    another one at most ``2 x dims - 1`` boxes.
    """
    if tuple(box.sizes[1:]) == tuple(shape[1:]):
        first = box.offsets[0] * math.prod(shape[1:]) if shape else 0
        return (Interval(first + start, first + stop),) if start < stop else ()
    return tuple(
        Box(tuple(o + i for o, i in zip(box.offsets, offsets, strict=True)), sizes)
        for offsets, sizes in _boxes(tuple(box.sizes), start, stop)
    )


def _boxes(sizes: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of the boxes that elements [start, stop) of an array of ``sizes`` fill, ascending."""
    if start >= stop:
        return
    if len(sizes) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(sizes[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # within one row
        yield from _in_row(sizes, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _in_row(sizes, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0,) * (len(sizes) - 1)), (last - first, *sizes[1:])
    yield from _in_row(sizes, last, 0, stop - last * row)


def _in_row(
    sizes: tuple[int, ...], index: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offsets, inner in _boxes(sizes[1:], start, stop):
        yield (index, *offsets), (1, *inner)
