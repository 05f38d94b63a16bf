"""Regions of a logical tensor, the form it is stored in, and the one algorithm that intersects them.

A *logical* tensor is what the model means: a shape and row-major elements. Its *stored form* may order the pieces of a
dim differently (fused projections, SwiGLU halves, stacked experts) and may be padded. Regions are given in the stored
form of whoever holds them; two holders with different forms meet in the logical tensor.

Flat positions and offsets are counted in elements.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict

from evermesh.checkpoint.errors import ShardMapInvalid

IntArray = npt.NDArray[np.int64]
STRICT: Any = ConfigDict(extra="forbid", ser_json_inf_nan="constants")
_MOST_ELEMENTS = 1 << 62


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular part of a tensor; without dims, the one element of a 0-d tensor. May be empty."""

    __pydantic_config__ = STRICT

    offsets: tuple[int, ...]
    """First index along every dim."""
    sizes: tuple[int, ...]
    """Number of indices along every dim."""

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.sizes) or min((*self.offsets, *self.sizes), default=0) < 0:
            raise ShardMapInvalid(f"{self} is no box: it needs as many offsets as sizes, none of them negative.")

    @property
    def num_elements(self) -> int:
        """Elements of the box."""
        return math.prod(self.sizes)

    def __str__(self) -> str:
        return "[" + ", ".join(f"{o}:{o + s}" for o, s in zip(self.offsets, self.sizes, strict=False)) + "]"


@dataclass(frozen=True, slots=True)
class Interval:
    """Elements [start, stop) of the row-major flattened tensor: what ZeRO and flat parameters hold. May be empty."""

    __pydantic_config__ = STRICT

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ShardMapInvalid(f"{self} is no interval: 0 <= start <= stop must hold.")

    @property
    def num_elements(self) -> int:
        """Elements of the interval."""
        return self.stop - self.start

    def __str__(self) -> str:
        return f"[flat {self.start}:{self.stop}]"


Region = Box | Interval
"""In JSON told apart by their fields."""


@dataclass(frozen=True, slots=True)
class Permutation:
    """The order in which the pieces of a dim are stored."""

    __pydantic_config__ = STRICT

    dim: int
    pieces: tuple[tuple[int, int, int], ...]
    """(logical start, stored start, length) of every piece; together they cover the dim once on both sides."""


@dataclass(frozen=True, slots=True)
class Padding:
    """Stored elements that are not part of the logical tensor, after the end of a dim or of the flat form."""

    __pydantic_config__ = STRICT

    dim: int | None
    """The dim that is longer in the stored form; None: the flat form is."""
    length: int
    """Indices added to the dim, or elements added to the flat form."""


@dataclass(frozen=True, slots=True)
class StoredForm:
    """How a logical tensor lies in the storage of its holders, all of them together."""

    shape: tuple[int, ...]
    """Shape of the logical tensor."""
    permutation: Permutation | None = None
    padding: Padding | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape that boxes refer to: the logical one with its padded dim."""
        if self.padding is None or self.padding.dim is None:
            return self.shape
        return tuple(size + self.padding.length * (dim == self.padding.dim) for dim, size in enumerate(self.shape))

    @property
    def num_elements(self) -> int:
        """Elements of the stored form, padding included."""
        flat = self.padding.length if self.padding is not None and self.padding.dim is None else 0
        return math.prod(self.stored_shape) + flat

    def check(self) -> None:
        """Raise ``ShardMapInvalid`` unless permutation and padding fit the shape, which some memory could hold."""
        sizes = (*self.shape, self.padding.length if self.padding is not None else 0)
        is_possible = all(0 <= size <= _MOST_ELEMENTS for size in sizes) and self.num_elements <= _MOST_ELEMENTS
        _require(is_possible, f"no tensor has the shape {self.shape} with padding {self.padding}")
        if self.padding is not None:
            _require(_is_dim(self.padding.dim, self.shape), f"{self.padding} names no dim of shape {self.shape}")
        if self.permutation is not None:
            _require(
                _is_dim(self.permutation.dim, self.shape), f"{self.permutation} names no dim of shape {self.shape}"
            )
            size = self.shape[self.permutation.dim]
            for side, name in enumerate(("logical", "stored")):
                spans = sorted((piece[side], piece[2]) for piece in self.permutation.pieces)
                _require(
                    _is_cover(spans, size), f"{self.permutation} does not cover 0 to {size} once on the {name} side"
                )

    def check_inside(self, region: Region) -> None:
        """Raise ``ShardMapInvalid`` unless ``region`` lies in the stored form."""
        if isinstance(region, Interval):
            _require(region.stop <= self.num_elements, f"{region} reaches beyond its {self.num_elements} elements")
            return
        shape = self.stored_shape
        inside = len(region.sizes) == len(shape) and all(
            offset + size <= length for offset, size, length in zip(region.offsets, region.sizes, shape, strict=True)
        )
        _require(inside, f"{region} does not lie in its stored shape {shape}")


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Contiguous stretches that two regions share, ascending in the source. Arrays of equal length, in elements."""

    source: IntArray
    """Offsets in the row-major storage of the source region."""
    destination: IntArray
    """Offsets in the row-major storage of the destination region."""
    length: IntArray

    @property
    def num_elements(self) -> int:
        """Elements of all runs."""
        return int(self.length.sum())

    def clip(self, start: int, stop: int) -> "Runs":
        """What remains when only elements [start, stop) of the source are stored; offsets count from ``start``."""
        head = np.maximum(start - self.source, 0)
        length = np.minimum(self.source + self.length, stop) - self.source - head
        kept = length > 0
        return Runs((self.source + head - start)[kept], (self.destination + head)[kept], length[kept])

    def shifted(self, by: int) -> "Runs":
        """The same runs of a source that begins ``by`` elements later."""
        return Runs(self.source + by, self.destination, self.length)


_EMPTY = Runs(*(np.empty(0, np.int64),) * 3)


def intersect(source: Region, source_form: StoredForm, destination: Region, destination_form: StoredForm) -> Runs:
    """The elements of one logical tensor that two regions share, as the fewest runs that are contiguous in both.

    Padding belongs to nobody and is in no run. Memory and time are linear in the number of rows of the two regions.
    """
    assert source_form.shape == destination_form.shape, "two forms of the same logical tensor"
    if source_form == destination_form and are_apart(source, destination):
        return _EMPTY
    return join(logical_runs(source, source_form), logical_runs(destination, destination_form))


def join(a: Runs, b: Runs) -> Runs:
    """Where the sources of ``a`` and ``b`` coincide: from the destinations of ``a`` to those of ``b``, fewest runs.

    In both the sources ascend and do not overlap. So two steps become one: where elements of a stored tensor lie, and
    where they are to go.
    """
    return _coalesce(_join(a, b))


def logical_runs(region: Region, form: StoredForm) -> Runs:
    """The logical elements of ``region``: source is the position in the logical tensor, ascending, destination the
    offset in the storage of the region."""
    runs = stored_runs(region, form)
    if form.permutation is None and form.padding is None:
        return runs
    offsets = _join(_stored_to_logical(form), runs)
    order = np.argsort(offsets.source)
    return Runs(offsets.source[order], offsets.destination[order], offsets.length[order])


def stored_runs(region: Region, form: StoredForm) -> Runs:
    """All elements of ``region``: source is the flat position in the stored form, ascending, destination the offset
    in the storage of the region."""
    if isinstance(region, Interval):
        starts, length = np.full(min(region.num_elements, 1), region.start, np.int64), region.num_elements
    else:
        starts, length = _rows(region, form.stored_shape, _outer_dims(region, form.stored_shape))
    return Runs(starts, np.arange(len(starts), dtype=np.int64) * length, np.full(len(starts), length, np.int64))


@functools.lru_cache(maxsize=256)
def _stored_to_logical(form: StoredForm) -> Runs:
    """The stored form without its padding: source is the stored position, ascending, destination the logical one."""
    found = [_EMPTY, *(_piece_runs(form, stored, logical) for stored, logical in _pieces(form))]
    source, destination, length = (
        np.concatenate([getattr(runs, name) for runs in found]) for name in ("source", "destination", "length")
    )
    order = np.argsort(source)
    return Runs(source[order], destination[order], length[order])


def _piece_runs(form: StoredForm, stored: Box, logical: Box) -> Runs:
    outer = max(_outer_dims(stored, form.stored_shape), _outer_dims(logical, form.shape))
    starts, length = _rows(stored, form.stored_shape, outer)
    return Runs(starts, _rows(logical, form.shape, outer)[0], np.full(len(starts), length, np.int64))


def _pieces(form: StoredForm) -> list[tuple[Box, Box]]:
    """The boxes of the stored form, and where each lies in the logical tensor."""
    if form.permutation is None:
        whole = Box((0,) * len(form.shape), form.shape)
        return [(whole, whole)]
    dim = form.permutation.dim

    def slab(start: int, length: int) -> Box:
        sizes = tuple(length if d == dim else size for d, size in enumerate(form.shape))
        return Box(tuple(start * (d == dim) for d in range(len(form.shape))), sizes)

    return [(slab(stored, length), slab(logical, length)) for logical, stored, length in form.permutation.pieces]


def _outer_dims(box: Box, shape: Sequence[int]) -> int:
    """Number of leading dims to run over so that the rest of the box is contiguous in a tensor of ``shape``."""
    outer = len(shape)
    while outer > 0:
        outer -= 1
        if box.sizes[outer] != shape[outer]:
            break
    return outer


def _rows(box: Box, shape: Sequence[int], outer: int) -> tuple[IntArray, int]:
    """Flat starts of the rows of ``box`` over its first ``outer`` dims, ascending, and the length of one row."""
    if box.num_elements == 0:
        return np.empty(0, np.int64), 0
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    starts = np.array([sum(o * s for o, s in zip(box.offsets, strides, strict=True))], np.int64)
    for dim in range(outer):
        starts = (starts[:, None] + strides[dim] * np.arange(box.sizes[dim], dtype=np.int64)).ravel()
    return starts, math.prod(box.sizes[outer:])


def _join(a: Runs, b: Runs) -> Runs:
    """Where the sources of ``a`` and ``b`` coincide: the destinations of both. Sources ascend and do not overlap."""
    first = np.searchsorted(b.source + b.length, a.source, "right")
    counts = np.maximum(np.searchsorted(b.source, a.source + a.length, "left") - first, 0)
    in_a = np.repeat(np.arange(len(a.source)), counts)
    in_b = np.arange(len(in_a)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
    start = np.maximum(a.source[in_a], b.source[in_b])
    stop = np.minimum(a.source[in_a] + a.length[in_a], b.source[in_b] + b.length[in_b])
    to_a, to_b = a.destination[in_a] - a.source[in_a], b.destination[in_b] - b.source[in_b]
    return Runs(start + to_a, start + to_b, stop - start)


def _coalesce(runs: Runs) -> Runs:
    order = np.argsort(runs.source)
    source, destination, length = runs.source[order], runs.destination[order], runs.length[order]
    goes_on = (source[1:] == source[:-1] + length[:-1]) & (destination[1:] == destination[:-1] + length[:-1])
    heads = np.flatnonzero(np.concatenate([np.ones(min(len(source), 1), bool), ~goes_on]))
    return Runs(source[heads], destination[heads], np.add.reduceat(length, heads) if len(heads) else length)


def are_apart(a: Region, b: Region) -> bool:
    """Whether two regions of the same form are disjoint at first sight."""
    if isinstance(a, Interval) and isinstance(b, Interval):
        return a.stop <= b.start or b.stop <= a.start
    if isinstance(a, Box) and isinstance(b, Box):
        spans = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
        return any(ao + an <= bo or bo + bn <= ao for ao, an, bo, bn in spans)
    return False


def _is_dim(dim: int | None, shape: Sequence[int]) -> bool:
    return dim is None or 0 <= dim < len(shape)


def _is_cover(spans: Sequence[tuple[int, int]], size: int) -> bool:
    """Whether ascending (start, length) spans cover 0 to ``size`` once."""
    reached = 0
    for start, length in spans:
        if start != reached or length < 0:
            return False
        reached += length
    return reached == size


def _require(holds: bool, fact: str) -> None:
    if not holds:
        raise ShardMapInvalid(f"{fact}. Correct the region, or the shape it refers to.")
