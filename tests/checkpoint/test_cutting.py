"""Intervals of boxes against counting: which elements of the tensor they are, and in which order."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from evermesh.checkpoint.cutting import regions_of_interval
from evermesh.checkpoint.regions import Box, Interval, StoredForm, stored_runs


@st.composite
def intervals_of_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box, int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    edges = [sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in shape]
    box = Box(tuple(start for start, _ in edges), tuple(stop - start for start, stop in edges))
    start, stop = sorted(draw(st.tuples(*(st.integers(0, box.num_elements),) * 2)))
    return shape, box, start, stop


@given(intervals_of_boxes())
def test_the_regions_hold_the_elements_of_the_interval_in_its_order(
    case: tuple[tuple[int, ...], Box, int, int],
) -> None:
    shape, box, start, stop = case
    positions = np.arange(math.prod(shape)).reshape(shape)
    inside = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
    expected = positions[inside].ravel()[start:stop].tolist()
    regions = regions_of_interval(box, shape, start, stop)
    found = [
        first + index
        for region in regions
        for first, length in zip(*_runs(region, shape), strict=True)
        for index in range(length)
    ]
    assert found == expected
    assert all(region.num_elements for region in regions)
    assert len(regions) <= 2 * len(shape) - 1


def _runs(region: Box | Interval, shape: tuple[int, ...]) -> tuple[list[int], list[int]]:
    runs = stored_runs(region, StoredForm(shape))
    return runs.source.tolist(), runs.length.tolist()


def test_whole_rows_are_one_interval_and_columns_are_three_boxes() -> None:
    assert regions_of_interval(Box((2, 0), (4, 10)), (8, 10), 5, 27) == (Interval(25, 47),)
    assert regions_of_interval(Box((0, 4), (8, 3)), (8, 10), 2, 10) == (
        Box((0, 6), (1, 1)),
        Box((1, 4), (2, 3)),
        Box((3, 4), (1, 1)),
    )
    assert regions_of_interval(Box((0, 4), (8, 3)), (8, 10), 4, 4) == ()
