"""Regions, their intersection, coverage and the division of writing, each against brute force."""

import itertools
import json
import math
import os
import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evermesh.checkpoint import (
    Box,
    Interval,
    Padding,
    Permutation,
    Region,
    Shard,
    ShardMap,
    ShardMapInvalid,
    StoredForm,
    TensorShards,
    coverage,
    intersect,
)
from evermesh.checkpoint.balance import quotas
from evermesh.checkpoint.coverage import check_cover, whole
from evermesh.checkpoint.write_plan import WritePlan
from tests.checkpoint.states import shard_map

Draw = Any


@st.composite
def shapes(draw: Draw) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(0, 5), min_size=0, max_size=4)))


@st.composite
def forms(draw: Draw, shape: tuple[int, ...]) -> StoredForm:
    permutation = draw(permutations(shape)) if shape and draw(st.booleans()) else None
    dims = st.sampled_from([None, *range(len(shape))])
    padding = Padding(draw(dims), draw(st.integers(0, 3))) if draw(st.booleans()) else None
    form = StoredForm(shape, permutation, padding)
    form.check()
    return form


@st.composite
def permutations(draw: Draw, shape: tuple[int, ...]) -> Permutation:
    dim = draw(st.integers(0, len(shape) - 1))
    cuts = sorted({0, shape[dim], *draw(st.lists(st.integers(0, shape[dim]), max_size=3))})
    pieces, stored = [], 0
    for start, stop in draw(st.permutations(list(itertools.pairwise(cuts)))):
        pieces.append((start, stored, stop - start))
        stored += stop - start
    return Permutation(dim, tuple(pieces))


@st.composite
def regions(draw: Draw, form: StoredForm) -> Region:
    if draw(st.booleans()):
        start, stop = sorted(draw(st.tuples(*[st.integers(0, form.num_elements)] * 2)))
        return Interval(start, stop)
    spans = [sorted(draw(st.tuples(*[st.integers(0, size)] * 2))) for size in form.stored_shape]
    return Box(tuple(start for start, _ in spans), tuple(stop - start for start, stop in spans))


def stored_indices(form: StoredForm) -> npt.NDArray[np.int64]:
    """The flat stored form; every element is its logical flat index, or -1 for padding."""
    logical = np.arange(math.prod(form.shape)).reshape(form.shape)
    stored = np.full(form.stored_shape, -1)
    pieces = form.permutation.pieces if form.permutation else ((0, 0, form.shape[0]),) if form.shape else ()
    dim = form.permutation.dim if form.permutation else 0
    inside = tuple(slice(0, size) for size in form.shape)
    if not form.shape:
        stored[...] = logical
    for start, to, length in pieces:
        there, here = list(inside), list(inside)
        there[dim], here[dim] = slice(to, to + length), slice(start, start + length)
        stored[tuple(there)] = logical[tuple(here)]
    flat = form.padding.length if form.padding and form.padding.dim is None else 0
    return np.concatenate([stored.ravel(), np.full(flat, -1)])


def storage(region: Region, form: StoredForm) -> npt.NDArray[np.int64]:
    """The logical index of every element of a region's storage, by numpy indexing alone."""
    flat = stored_indices(form)
    if isinstance(region, Interval):
        return flat[region.start : region.stop]
    shaped = flat[: math.prod(form.stored_shape)].reshape(form.stored_shape)
    return shaped[tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))].ravel()


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_runs_of_two_regions_are_those_of_numpy_index_arrays(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    source_form, destination_form = data.draw(forms(shape)), data.draw(forms(shape))
    source, destination = data.draw(regions(source_form)), data.draw(regions(destination_form))

    runs = intersect(source, source_form, destination, destination_form)

    have, want = storage(source, source_form), storage(destination, destination_form)
    got = np.full(len(want), -1)
    for start, to, length in zip(runs.source, runs.destination, runs.length, strict=True):
        assert length > 0
        assert (got[to : to + length] == -1).all(), "an element was filled twice"
        got[to : to + length] = have[start : start + length]
    shared = np.isin(want, have) & (want >= 0)
    np.testing.assert_array_equal(got, np.where(shared, want, -1))
    joined = (runs.source[1:] == (runs.source + runs.length)[:-1]) & (
        runs.destination[1:] == (runs.destination + runs.length)[:-1]
    )
    assert not joined.any(), "runs that follow each other on both sides are one"
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, len(have))] * 2)))
    clipped = runs.clip(low, high)
    assert clipped.num_elements == int(np.isin(have[low:high], want[shared]).sum())
    for start, to, length in zip(clipped.source, clipped.destination, clipped.length, strict=True):
        np.testing.assert_array_equal(have[low:high][start : start + length], want[to : to + length])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_map_is_valid_exactly_if_every_stored_element_is_held_once(data: st.DataObject) -> None:
    form = data.draw(forms(data.draw(shapes())))
    held = data.draw(st.lists(regions(form), max_size=4))
    if data.draw(st.booleans()):  # often valid: the rest is covered element by element, or a box is split in two
        held = [Interval(0, form.num_elements)] if data.draw(st.booleans()) else _split_box(data, form)
    counts = np.zeros(form.num_elements, int)
    positions = np.arange(form.num_elements)
    whole = positions[: math.prod(form.stored_shape)].reshape(form.stored_shape)
    for region in held:
        if isinstance(region, Interval):
            counts[region.start : region.stop] += 1
        else:
            counts[
                whole[tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))].ravel()
            ] += 1
    shards = tuple(Shard(region, (0,)) for region in held)
    tensor = TensorShards("float32", form.shape, shards, form.permutation, form.padding)
    if (counts == 1).all():
        ShardMap({"w": tensor}).check()
    else:
        with pytest.raises(ShardMapInvalid, match="tensor w of shape"):
            ShardMap({"w": tensor}).check()


def _split_box(data: st.DataObject, form: StoredForm) -> list[Region]:
    shape = form.stored_shape
    if not shape:
        return [Box((), ())]
    dim, rest = data.draw(st.integers(0, len(shape) - 1)), math.prod(shape)
    cut = data.draw(st.integers(0, shape[dim]))
    zeros = (0,) * len(shape)
    first = Box(zeros, (*shape[:dim], cut, *shape[dim + 1 :]))
    second = Box((*zeros[:dim], cut, *zeros[dim + 1 :]), (*shape[:dim], shape[dim] - cut, *shape[dim + 1 :]))
    return [first, second, Interval(rest, form.num_elements)]


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([Box((0, 0), (2, 4)), Box((3, 0), (1, 4))], r"gap at index \[2, 0\]"),
        ([Box((0, 0), (4, 2)), Box((0, 1), (4, 3))], r"\[0:4, 0:2\] and \[0:4, 1:4\] overlap at index \[0, 1\]"),
        ([Interval(0, 10), Interval(12, 16)], "gap at flat element 10, 2 elements"),
        ([Interval(0, 10), Box((2, 0), (2, 4))], r"\[flat 0:10\] and \[2:4, 0:4\] overlap at flat element 8"),
        ([Interval(0, 17)], "reaches beyond its 16 elements"),
        ([Box((0, 0), (4, 5))], r"does not lie in its stored shape \(4, 4\)"),
    ],
)
def test_the_error_names_the_gap_the_overlap_or_the_region_outside(held: list[Region], message: str) -> None:
    tensor = TensorShards("float32", (4, 4), tuple(Shard(region, (0,)) for region in held))
    with pytest.raises(ShardMapInvalid, match=message):
        ShardMap({"w": tensor}).check()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (TensorShards("float24", (1,), (Shard(Interval(0, 1), (0,)),)), "float24 cannot be stored"),
        (TensorShards("float32", (1,), (Shard(Interval(0, 1), ()),)), "Name at least one"),
        (TensorShards("float32", (4,), (), Permutation(0, ((0, 0, 3),))), "does not cover 0 to 4 once"),
        (TensorShards("float32", (4,), (), Permutation(1, ())), "names no dim"),
        (TensorShards("float32", (4,), (), padding=Padding(1, 2)), "names no dim"),
    ],
)
def test_entries_that_mean_nothing_are_refused(tensor: TensorShards, message: str) -> None:
    with pytest.raises(ShardMapInvalid, match=message):
        ShardMap({"w": tensor}).check()


def test_regions_refuse_negative_sizes_and_unequal_dims() -> None:
    for make in (lambda: Box((0,), (1, 2)), lambda: Box((0,), (-1,)), lambda: Interval(2, 1), lambda: Interval(-1, 1)):
        with pytest.raises(ShardMapInvalid, match="is no"):
            make()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_map_survives_json(data: st.DataObject) -> None:
    form = data.draw(forms(data.draw(shapes())))
    shards = tuple(
        Shard(region, tuple(range(count + 1)))
        for count, region in enumerate(data.draw(st.lists(regions(form), max_size=3)))
    )
    original = ShardMap({"w": TensorShards("bfloat16", form.shape, shards, form.permutation, form.padding)})
    assert ShardMap.from_json(original.to_json()) == original


def test_json_with_unknown_fields_or_of_another_version_is_refused() -> None:
    values = json.loads(shard_map(2).to_json())
    for change in ({"format_version": 1}, {"surprise": 1}, {"tensors": 3}):
        with pytest.raises(ShardMapInvalid):
            ShardMap.from_json(json.dumps(values | change))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 90_000), st.sets(st.integers(0, 5), min_size=1)), min_size=1, max_size=12))
def test_writers_write_every_element_once_and_only_what_they_hold(tensors: list[tuple[int, set[int]]]) -> None:
    whole = ShardMap(
        {
            f"t{index}": TensorShards(
                ("float32", "bfloat16")[index % 2], (size,), (Shard(Interval(0, size), tuple(sorted(ranks))),)
            )
            for index, (size, ranks) in enumerate(tensors)
        }
    )
    counts = {name: np.zeros(tensor.shape, int) for name, tensor in whole.tensors.items()}
    plan = WritePlan(whole)
    for rank in range(6):
        for part in plan.of_rank(rank):
            assert whole.of_rank(rank)[part.name][part.held] == part.region
            counts[part.name][part.start : part.stop] += 1
    assert all((count == 1).all() for count in counts.values())


def test_replicated_bytes_are_divided_evenly_next_to_what_ranks_hold_alone() -> None:
    alone = TensorShards(
        "float32", (300_000,), (Shard(Interval(0, 100_000), (0,)), Shard(Interval(100_000, 300_000), (1,)))
    )
    shared = TensorShards("bfloat16", (1000, 700), (Shard(Box((0, 0), (1000, 700)), (0, 1, 2, 3)),))
    whole = ShardMap({"alone": alone, "shared": shared})
    sizes = {"alone": 4, "shared": 2}
    written = [
        sum((part.stop - part.start) * sizes[part.name] for part in WritePlan(whole).of_rank(rank)) for rank in range(4)
    ]
    assert sum(written) == whole.num_bytes
    # rank 1 holds 800,000 bytes alone; the other three share the rest of 2,600,000
    assert written[1] == 800_000
    assert max(written) - min(written[0], written[2], written[3]) <= 200_000
    assert max(written) <= 800_000


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(0, 60))
def test_quotas_reach_the_least_possible_maximum(loads: list[int], num_bytes: int) -> None:
    shares = quotas(loads, num_bytes)
    assert sum(shares) == num_bytes
    assert min(shares) >= 0
    least = next(top for top in range(200) if sum(max(0, top - load) for load in loads) >= num_bytes)
    assert max(load + share for load, share in zip(loads, shares, strict=True)) == max(least, *loads)


def test_small_replicated_groups_are_written_by_few_ranks() -> None:
    tiny = TensorShards("float32", (10,), (Shard(Interval(0, 10), tuple(range(64))),))
    plan = WritePlan(ShardMap({"tiny": tiny}))
    assert [rank for rank in range(64) if plan.of_rank(rank)] == [0]


def test_the_division_is_the_same_on_every_hash_seed() -> None:
    program = (
        "from tests.checkpoint.states import shard_map as m; from evermesh.checkpoint.write_plan import WritePlan; "
        "print([WritePlan(m(4)).of_rank(rank) for rank in range(4)], m(4).digest())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_the_package_imports_without_torch() -> None:
    program = "import sys, evermesh.checkpoint, evermesh.fault; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_boxes_that_are_compared_with_each_other_are_refused_exactly_when_counting_refuses_them(data: Draw) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 4)] * data.draw(st.integers(1, 3))))
    boxes, left = [], [Box((0,) * len(shape), shape)]
    while left:  # cut at random, then perhaps spoil it
        box = left.pop()
        dim = data.draw(st.integers(0, len(shape) - 1))
        cut = data.draw(st.integers(0, box.sizes[dim]))
        if cut in (0, box.sizes[dim]):
            boxes.append(box)
            continue
        for start, size in ((0, cut), (cut, box.sizes[dim] - cut)):
            offsets, sizes = list(box.offsets), list(box.sizes)
            offsets[dim], sizes[dim] = offsets[dim] + start, size
            left.append(Box(tuple(offsets), tuple(sizes)))
    for change in data.draw(st.lists(st.sampled_from(["drop", "repeat"]), max_size=2)):
        at = data.draw(st.integers(0, len(boxes) - 1)) if boxes else None
        if at is not None:
            boxes = [*boxes[:at], *boxes[at + 1 :]] if change == "drop" else [*boxes, boxes[at]]
    counts = np.zeros(shape, np.int64)
    for box in boxes:
        counts[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))] += 1
    if not boxes or (counts == 1).all():
        if boxes:
            coverage._check_pairs(boxes, shape)
        return
    with pytest.raises(ShardMapInvalid, match="overlap" if (counts > 1).any() else f"^{(counts == 0).sum()} of "):
        coverage._check_pairs(boxes, shape)


def test_boxes_whose_edges_make_a_fine_grid_cost_no_memory() -> None:
    number = 1000
    shape = (2 * number,) * 3
    crafted = [Box((2 * at,) * 3, (1, 1, 1)) for at in range(number)]
    tracemalloc.start()
    try:
        with pytest.raises(ShardMapInvalid, match=r"\[0:1, 0:1, 0:1\] and \[0:2000, 0:2000, 0:2000\] overlap at index"):
            check_cover(StoredForm(shape), tuple(whole(box) for box in [*crafted, Box((0, 0, 0), shape)]))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
