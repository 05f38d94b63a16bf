"""Which ranks of a sharding rule may hold elements of a region: by arithmetic, without looking at all ranks.

It may name some that hold none, never the other way round; ``regions.intersect`` then tells exactly.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from evermesh.checkpoint.regions import Box, Interval, Region, StoredForm
from evermesh.checkpoint.rules import Coordinates, DimCut, ShardingRule


@dataclass(frozen=True, slots=True)
class Sought:
    """A region in the coordinates of a stored form."""

    bounds: Box
    """All of it lies in there."""
    interval: Interval | None
    """It is this interval of the flat form; None: it is not known to be one."""

    @classmethod
    def of(cls, region: Region, given: StoredForm, form: StoredForm) -> "Sought":
        """The ``region`` of form ``given`` in the coordinates of ``form``; all of that where pieces are ordered otherwise."""
        whole = Box((0,) * len(form.shape), form.stored_shape)
        if given != form and (given.permutation is not None or form.permutation is not None):
            return cls(whole, None)
        if isinstance(region, Box):
            return cls(region, None)
        if given != form and given.stored_shape != form.stored_shape:
            return cls(whole, None)
        row = math.prod(form.stored_shape[1:])
        if not form.stored_shape or not row:
            return cls(whole, region)
        first, last = (min(edge, form.stored_shape[0]) for edge in (region.start // row, -(-region.stop // row)))
        return cls(Box((first, *whole.offsets[1:]), (last - first, *whole.sizes[1:])), region)


def holders_near(rule: ShardingRule, form: StoredForm, sought: Sought) -> Iterator[tuple[Coordinates, int, int]]:
    """Coordinates (of the first copy) that may hold some of it, each with [start, stop) of the storage of their box that
    may be meant."""
    zeros = (0,) * len(rule.grid.axes)
    boxes = [(Box((0,) * len(form.shape), form.stored_shape), zeros)]
    for cut in rule.cuts:
        boxes = [
            (rule.cut_box(box, cut, index), rule.placed(base, cut.axes, index))
            for box, base in boxes
            for index in _touched(rule, cut, box, sought.bounds)
        ]
    for box, base in boxes:
        start, stop = _storage_range(rule, form, box, sought)
        if start >= stop:
            continue
        if rule.flat is None:
            yield base, start, stop
            continue
        flat = rule.flat
        for index in range((flat.start + start) // flat.length, -(-(flat.start + stop) // flat.length)):
            yield rule.placed(base, flat.axes, index), start, stop


def _touched(rule: ShardingRule, cut: DimCut, box: Box, bounds: Box) -> range:
    """The parts of a cut of ``box`` that ``bounds`` reaches into."""
    size, offset = box.sizes[cut.dim], box.offsets[cut.dim]
    start = max(bounds.offsets[cut.dim] - offset, 0)
    stop = min(bounds.offsets[cut.dim] + bounds.sizes[cut.dim] - offset, size)
    if start >= stop:
        return range(0)
    parts = rule.parts(cut.axes)
    return range(cut.index_at(size, parts, start), cut.index_at(size, parts, stop - 1) + 1)


def _storage_range(rule: ShardingRule, form: StoredForm, box: Box, sought: Sought) -> tuple[int, int]:
    """[start, stop) of the row-major storage of ``box`` outside of which nothing of it lies."""
    if sought.interval is not None and box.sizes[1:] == form.stored_shape[1:]:
        first = box.offsets[0] * math.prod(box.sizes[1:]) if box.sizes else 0
        num_elements = box.num_elements if rule.cuts else form.num_elements
        return max(sought.interval.start - first, 0), min(sought.interval.stop - first, num_elements)
    start, last, stride = 0, 0, 1
    spans = zip(box.offsets, box.sizes, sought.bounds.offsets, sought.bounds.sizes, strict=True)
    for offset, size, bound, extent in reversed(list(spans)):
        low, high = max(bound - offset, 0), min(bound + extent - offset, size)
        if low >= high:
            return 0, 0
        start += low * stride
        last += (high - 1) * stride
        stride *= size
    return start, last + 1
