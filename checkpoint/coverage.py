"""Proof that the regions of a tensor cover it exactly once."""

import functools
import math
from collections.abc import Sequence

import numpy as np

from evermesh.checkpoint.errors import ShardMapInvalid
from evermesh.checkpoint.regions import Box, IntArray, Region, Runs, StoredForm, stored_runs

_MOST_GRID_ROWS = 1 << 20
"""That boxes may have on the grid of their edges, all together: 24 MiB."""
Part = tuple[Region, int, int]
"""A region, and the elements [start, stop) of its row-major storage that are meant."""


def whole(region: Region) -> Part:
    """The part that is all of ``region``."""
    return region, 0, region.num_elements


@functools.lru_cache(maxsize=512)
def check_cover(form: StoredForm, parts: tuple[Part, ...]) -> None:
    """Return if ``parts`` cover every element of the stored form, padding included, exactly once.

    What was proven is remembered, so that layers alike and the next save cost nothing. Boxes alone are checked on the
    grid of their edges: the cost does not depend on the size of the tensor.

    Raises:
        ShardMapInvalid: names the region that reaches outside, the first gap, or the first overlap and both regions.
    """
    form.check()
    for region, start, stop in parts:
        form.check_inside(region)
        if not 0 <= start <= stop <= region.num_elements:
            raise ShardMapInvalid(
                f"elements {start} to {stop} do not lie in {region} of {region.num_elements} elements."
            )
    held = [part for part in parts if part[1] < part[2]]
    boxes = [region for region, start, stop in held if isinstance(region, Box) and stop - start == region.num_elements]
    if len(boxes) == len(held) and form.num_elements == _product(form.stored_shape):
        _check_boxes(boxes, form.stored_shape)
    else:
        runs = [stored_runs(region, form) for region, _, _ in held]
        _check_runs([_clip(r, *part[1:]) for r, part in zip(runs, held, strict=True)], held, form.num_elements)


def _check_boxes(boxes: Sequence[Box], shape: tuple[int, ...]) -> None:
    """On the grid of their edges, which tells the place of what is wrong; where that grid is fine, as no framework lays
    tensors, box against box: the memory is bounded by the number of boxes, whatever they are."""
    edges = [
        np.unique([0, size, *(b.offsets[dim] for b in boxes), *(b.offsets[dim] + b.sizes[dim] for b in boxes)])
        for dim, size in enumerate(shape)
    ]
    grid = StoredForm(tuple(len(cuts) - 1 for cuts in edges))
    on_grid = [_to_grid(box, edges) for box in boxes]
    if sum(math.prod(box.sizes[:-1]) for box in on_grid) > _MOST_GRID_ROWS:
        _check_pairs(boxes, shape)
        return
    corners = [tuple(map(int, cuts)) for cuts in edges]
    _check_runs([stored_runs(box, grid) for box in on_grid], [whole(b) for b in boxes], grid.num_elements, corners)


def _check_pairs(boxes: Sequence[Box], shape: tuple[int, ...]) -> None:
    """Boxes inside of a shape cover it once if no two overlap and they have as many elements as it has."""
    first = np.array([box.offsets for box in boxes], np.int64)
    last = first + np.array([box.sizes for box in boxes], np.int64)
    for at in range(len(boxes) - 1):
        meets = ((first[at + 1 :] < last[at]) & (first[at] < last[at + 1 :])).all(axis=1)
        if meets.any():
            other = at + 1 + int(np.argmax(meets))
            place = f"index {np.maximum(first[at], first[other]).tolist()}"
            raise _overlap(str(boxes[at]), str(boxes[other]), place)
    missing = _product(shape) - sum(box.num_elements for box in boxes)
    if missing:
        raise ShardMapInvalid(f"{missing:,} of {_product(shape):,} elements are held by nobody. Add regions for them.")


def _overlap(one: str, other: str, place: str) -> ShardMapInvalid:
    return ShardMapInvalid(f"{one} and {other} overlap at {place}. List a shared region once, with all its ranks.")


def _to_grid(box: Box, edges: Sequence[IntArray]) -> Box:
    first = [int(np.searchsorted(cuts, offset)) for cuts, offset in zip(edges, box.offsets, strict=True)]
    ends = [o + s for o, s in zip(box.offsets, box.sizes, strict=True)]
    last = [int(np.searchsorted(cuts, end)) for cuts, end in zip(edges, ends, strict=True)]
    return Box(tuple(first), tuple(stop - start for start, stop in zip(first, last, strict=True)))


def _clip(runs: Runs, start: int, stop: int) -> Runs:
    """The elements [start, stop) of a region's storage, as runs from stored positions."""
    swapped = Runs(runs.destination, runs.source, runs.length).clip(start, stop)
    return Runs(swapped.destination, swapped.source, swapped.length)


def _check_runs(
    runs: Sequence[Runs], parts: Sequence[Part], num_elements: int, corners: Sequence[tuple[int, ...]] | None = None
) -> None:
    owner = np.repeat(np.arange(len(runs)), [len(r.source) for r in runs])
    starts = np.concatenate([np.empty(0, np.int64), *(r.source for r in runs)])
    stops = starts + np.concatenate([np.empty(0, np.int64), *(r.length for r in runs)])
    order = np.argsort(starts, kind="stable")
    expected = np.concatenate([[0], stops[order]])
    found = np.concatenate([starts[order], [num_elements]])
    wrong = np.flatnonzero(expected != found)
    if not len(wrong):
        return
    at = int(wrong[0])
    place = _place(int(min(expected[at], found[at])), corners)
    if found[at] > expected[at]:
        size = f", {found[at] - expected[at]} elements," if corners is None else ""
        raise ShardMapInvalid(f"a gap at {place}{size} is held by nobody. Add a region that covers it.")
    one, other = (_name(parts[int(owner[order[i]])]) for i in (at - 1, min(at, len(order) - 1)))
    raise _overlap(one, other, place)


def _place(position: int, corners: Sequence[tuple[int, ...]] | None) -> str:
    if corners is None:
        return f"flat element {position}"
    cell = np.unravel_index(position, [len(cuts) - 1 for cuts in corners]) if corners else ()
    return f"index {[cuts[int(i)] for cuts, i in zip(corners, cell, strict=True)]}"


def _name(part: Part) -> str:
    region, start, stop = part
    return str(region) if stop - start == region.num_elements else f"elements {start}:{stop} of {region}"


def _product(shape: tuple[int, ...]) -> int:
    return Box((0,) * len(shape), shape).num_elements
