"""Sharding rules: who holds what of a tensor, in a few numbers for any number of ranks.

The ranks stand in a grid. Some axes of the grid cut the tensor along dims, one cut within the other; some may then cut the
row-major storage of what is left, at its place in a buffer, into intervals (ZeRO); axes that cut nothing hold copies. So
what a rank holds, and who holds a region, follow by arithmetic, and that every element is held follows from the rule.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from evermesh.checkpoint.cutting import regions_of_interval
from evermesh.checkpoint.errors import ShardMapInvalid
from evermesh.checkpoint.regions import STRICT, Box, Interval, Region, StoredForm
from evermesh.parallelism.tensor import part_of

Coordinates = tuple[int, ...]
"""Of a rank, along every axis of a grid."""


@dataclass(frozen=True, slots=True)
class RankGrid:
    """Ranks in a grid: ``first``, and for every axis a coordinate times its stride more."""

    __pydantic_config__ = STRICT

    first: int
    axes: tuple[tuple[int, int], ...]
    """(size, stride) of each."""

    @property
    def last(self) -> int:
        """The highest rank."""
        return self.first + sum((size - 1) * stride for size, stride in self.axes)

    def rank(self, coordinates: Coordinates) -> int:
        """The rank that stands there."""
        return self.first + sum(at * stride for at, (_, stride) in zip(coordinates, self.axes, strict=True))

    def coordinates(self, rank: int) -> Coordinates | None:
        """Where ``rank`` stands; None: outside."""
        rest, found = rank - self.first, [0] * len(self.axes)
        for axis in sorted(range(len(self.axes)), key=lambda axis: -self.axes[axis][1]):
            size, stride = self.axes[axis]
            found[axis] = min(max(rest, 0) // stride, size - 1)
            rest -= found[axis] * stride
        return tuple(found) if rest == 0 else None

    def check(self) -> None:
        """Raise ``ShardMapInvalid`` unless every rank stands in one place."""
        reach = 0
        for size, stride in sorted(self.axes, key=lambda axis: axis[1]):
            if size < 1 or (size > 1 and stride <= reach):
                raise ShardMapInvalid(
                    f"{self} puts a rank in two places, or none anywhere. Give axes their own strides."
                )
            reach += (size - 1) * stride
        if self.first < 0:
            raise ShardMapInvalid(f"{self} begins at a negative rank.")


@dataclass(frozen=True, slots=True)
class DimCut:
    """A cut along a dim of what the cuts before it have left."""

    __pydantic_config__ = STRICT

    dim: int
    axes: tuple[int, ...]
    """Of the grid, that number the parts; the slowest first."""
    rounding: Literal["even", "up"] = "even"
    """``even``: where the parts do not divide the size, the first ones are longer by one; ``up``: all are as long as the
    first, until nothing is left (``torch.chunk``)."""

    def span(self, size: int, parts: int, index: int) -> tuple[int, int]:
        """[start, stop) of one of ``parts`` of ``size``."""
        if self.rounding == "even":
            return part_of(size, parts, index)
        each = -(-size // parts)
        return min(index * each, size), min((index + 1) * each, size)

    def index_at(self, size: int, parts: int, position: int) -> int:
        """The part that holds a position below ``size``."""
        each, longer = divmod(size, parts)
        if self.rounding == "up":
            return position // -(-size // parts)
        in_longer = longer * (each + 1)
        return position // (each + 1) if position < in_longer else longer + (position - in_longer) // each


@dataclass(frozen=True, slots=True)
class FlatCut:
    """A cut of the row-major storage of what the other cuts have left, as it lies in a buffer of equal intervals."""

    __pydantic_config__ = STRICT

    axes: tuple[int, ...]
    """Of the grid, that number the intervals; the slowest first."""
    start: int
    """Where the storage begins in the buffer, elements."""
    length: int
    """Elements of an interval of the buffer."""


class Held(NamedTuple):
    """What every rank at some coordinates holds of a tensor."""

    box: Box
    start: int
    """Elements [start, stop) of the row-major storage of the box."""
    stop: int
    buffer: int
    """Where the storage of the box begins in its interval of the buffer, elements; negative if before it."""


@dataclass(frozen=True)
class ShardingRule:
    """Who holds what of one tensor."""

    __pydantic_config__ = STRICT

    grid: RankGrid
    cuts: tuple[DimCut, ...] = ()
    flat: FlatCut | None = None

    @cached_property
    def copy_axes(self) -> tuple[int, ...]:
        """Axes along which ranks hold the same."""
        cutting = set(itertools.chain.from_iterable(cut.axes for cut in self._all_cuts))
        return tuple(axis for axis in range(len(self.grid.axes)) if axis not in cutting)

    @cached_property
    def num_copies(self) -> int:
        """Ranks that hold the same."""
        return self.parts(self.copy_axes)

    def parts(self, axes: Sequence[int]) -> int:
        """Places along some axes."""
        return math.prod(self.grid.axes[axis][0] for axis in axes)

    def copy(self, coordinates: Coordinates) -> int:
        """Which of ``num_copies`` a rank has."""
        return self._index(self.copy_axes, coordinates)

    def placed(self, base: Coordinates, axes: Sequence[int], index: int) -> Coordinates:
        """``base`` with the coordinates along ``axes`` that are place ``index`` of them."""
        found = list(base)
        for axis in reversed(axes):
            index, found[axis] = divmod(index, self.grid.axes[axis][0])
        return tuple(found)

    def held(self, form: StoredForm, coordinates: Coordinates) -> Held:
        """What a rank holds; it may be empty."""
        box = Box((0,) * len(form.shape), form.stored_shape)
        for cut in self.cuts:
            box = self.cut_box(box, cut, self._index(cut.axes, coordinates))
        num_elements = box.num_elements if self.cuts else form.num_elements
        if self.flat is None:
            return Held(box, 0, num_elements, 0)
        begin = self.flat.start - self._index(self.flat.axes, coordinates) * self.flat.length
        return Held(box, min(max(-begin, 0), num_elements), max(min(self.flat.length - begin, num_elements), 0), begin)

    def cut_box(self, box: Box, cut: DimCut, index: int) -> Box:
        """One part of a box."""
        start, stop = cut.span(box.sizes[cut.dim], self.parts(cut.axes), index)
        offsets, sizes = list(box.offsets), list(box.sizes)
        offsets[cut.dim] += start
        sizes[cut.dim] = stop - start
        return Box(tuple(offsets), tuple(sizes))

    def regions(self, form: StoredForm, coordinates: Coordinates) -> tuple[Region, ...]:
        """What a rank holds as regions; their storages laid end to end are what it stores. None is empty."""
        held = self.held(form, coordinates)
        if held.start >= held.stop:
            return ()
        if self.flat is None:
            whole = form.num_elements if not self.cuts else held.box.num_elements
            return (held.box,) if whole == held.box.num_elements else (Interval(0, whole),)
        return regions_of_interval(held.box, form.stored_shape, held.start, held.stop)

    def holdings(self, form: StoredForm) -> Iterator[tuple[Region, tuple[int, ...]]]:
        """Every region with its holders, ascending: as many as the ranks that cut."""
        axes = [axis for cut in self._all_cuts for axis in cut.axes]
        zeros = (0,) * len(self.grid.axes)
        for index in range(self.parts(axes)):
            base = self.placed(zeros, axes, index)
            regions = self.regions(form, base)
            if regions:
                copies = (self.placed(base, self.copy_axes, copy) for copy in range(self.num_copies))
                ranks = tuple(sorted(map(self.grid.rank, copies)))
                yield from ((region, ranks) for region in regions)

    def check(self, form: StoredForm) -> None:
        """Return if the rule gives every element of the stored form to somebody, and to copies only of one place.

        Cuts of a dim and intervals of a buffer cover what they cut, once, by construction; what is left to prove is that
        no axis cuts twice and that the buffer is long enough.

        Raises:
            ShardMapInvalid: names the axis, the dim or the buffer.
        """
        self.grid.check()
        form.check()
        cutting = list(itertools.chain.from_iterable(cut.axes for cut in self._all_cuts))
        if len(set(cutting)) != len(cutting) or not set(cutting) <= set(range(len(self.grid.axes))):
            raise ShardMapInvalid(f"axes {cutting} cut, of {len(self.grid.axes)}. Let each cut once.")
        for cut in self.cuts:
            if not 0 <= cut.dim < len(form.shape):
                raise ShardMapInvalid(f"{cut} names no dim of shape {form.shape}. Correct it.")
        if self.cuts and form.num_elements != math.prod(form.stored_shape):
            raise ShardMapInvalid("a tensor that is padded at its flat end cannot be cut along a dim. Cut it flat.")
        if self.flat is not None:
            self._check_buffer(self.flat, form)

    def largest(self, form: StoredForm) -> int:
        """Elements of the storage of the largest part that the cuts along dims leave."""
        if not self.cuts:
            return form.num_elements
        sizes = list(form.stored_shape)
        for cut in self.cuts:
            sizes[cut.dim] = -(-sizes[cut.dim] // self.parts(cut.axes))
        return math.prod(sizes)

    def _check_buffer(self, flat: FlatCut, form: StoredForm) -> None:
        stop, length = flat.start + self.largest(form), flat.length * self.parts(flat.axes)
        if flat.start < 0 or flat.length < 0 or stop > length:
            raise ShardMapInvalid(
                f"elements {flat.start} to {stop} of a buffer are cut into {self.parts(flat.axes)} intervals of "
                f"{flat.length}, which end at {length}. Make them longer."
            )

    def _index(self, axes: Sequence[int], coordinates: Coordinates) -> int:
        index = 0
        for axis in axes:
            index = index * self.grid.axes[axis][0] + coordinates[axis]
        return index

    @property
    def _all_cuts(self) -> tuple[DimCut | FlatCut, ...]:
        return (*self.cuts, self.flat) if self.flat is not None else self.cuts
