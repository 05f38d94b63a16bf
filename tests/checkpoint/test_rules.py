"""Sharding rules against counting: what every rank holds and writes, and who is asked for a region."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evermesh.checkpoint import Box, Interval, Padding, Region, ShardMap, ShardMapInvalid, StoredForm, TensorShards
from evermesh.checkpoint.regions import intersect, stored_runs
from evermesh.checkpoint.rules import DimCut, FlatCut, RankGrid, ShardingRule
from evermesh.checkpoint.write_plan import WritePlan
from tests.checkpoint.large import own_map, transformers_map, zero3_map
from tests.checkpoint.test_shard_map import forms, regions

Draw = Any


@st.composite
def grids(draw: Draw) -> RankGrid:
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    strides, stride = [0] * len(sizes), 1
    for axis in draw(st.permutations(range(len(sizes)))):
        strides[axis] = stride
        stride *= sizes[axis] + draw(st.integers(0, 1))
    return RankGrid(draw(st.integers(0, 3)), tuple(zip(sizes, strides, strict=True)))


@st.composite
def tensors(draw: Draw) -> TensorShards:
    grid = draw(grids())
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=0, max_size=3)))
    axes = list(draw(st.permutations(range(len(grid.axes)))))
    cuts = []
    while shape and axes and draw(st.booleans()):
        taken = tuple(axes.pop() for _ in range(draw(st.integers(1, len(axes)))))
        cuts.append(DimCut(draw(st.integers(0, len(shape) - 1)), taken, draw(st.sampled_from(["even", "up"]))))
    form = draw(forms(shape))
    if cuts and form.padding is not None and form.padding.dim is None:
        form = StoredForm(shape, form.permutation)
    rule = ShardingRule(grid, tuple(cuts))
    if axes and draw(st.booleans()):
        taken, start = tuple(axes[: draw(st.integers(1, len(axes)))]), draw(st.integers(0, 9))
        least = -(-(start + rule.largest(form)) // rule.parts(taken))
        rule = ShardingRule(grid, tuple(cuts), FlatCut(taken, start, least + draw(st.integers(0, 3))))
    dtype = draw(st.sampled_from(["float32", "bfloat16"]))
    return TensorShards(dtype, shape, rule, form.permutation, form.padding)


def elements(region: Region, form: StoredForm, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int64]:
    """Flat positions in the stored form, in the order of the region's storage."""
    runs = stored_runs(region, form)
    order = np.argsort(runs.destination)
    found = [np.arange(s, s + n) for s, n in zip(runs.source[order], runs.length[order], strict=True)]
    return np.concatenate([np.empty(0, np.int64), *found])[start:stop]


def ranks_of(whole: ShardMap) -> range:
    return range(max(tensor.last_rank for tensor in whole.tensors.values()) + 1)


@settings(max_examples=120, deadline=None)
@given(tensors())
def test_a_rule_that_passes_its_check_covers_the_tensor_once_and_tells_each_rank_what_the_list_says(
    tensor: TensorShards,
) -> None:
    tensor.check()
    listed = TensorShards(tensor.dtype, tensor.shape, tensor.shards, tensor.permutation, tensor.padding)
    listed.check()
    for rank in ranks_of(ShardMap({"w": tensor})):
        assert tensor.of_rank(rank) == listed.of_rank(rank)
    assert ShardMap.from_json(ShardMap({"w": tensor}).to_json()).tensors["w"] == tensor


@settings(max_examples=120, deadline=None)
@given(st.lists(tensors(), min_size=1, max_size=4), st.integers(1, 40))
def test_every_element_is_written_once_by_a_rank_that_holds_it(found: list[TensorShards], least: int) -> None:
    whole = ShardMap({f"t{index}": tensor for index, tensor in enumerate(found)})
    plan = WritePlan(whole, least)
    counts = {name: np.zeros(tensor.form.num_elements, int) for name, tensor in whole.tensors.items()}
    for rank in ranks_of(whole):
        held = whole.of_rank(rank)
        for part in plan.of_rank(rank):
            assert held[part.name][part.held] == part.region
            assert part.start < part.stop
            counts[part.name][elements(part.region, whole.tensors[part.name].form, part.start, part.stop)] += 1
    assert all((count == 1).all() for count in counts.values())


@settings(max_examples=120, deadline=None)
@given(st.data(), tensors(), st.integers(1, 40))
def test_whoever_wrote_elements_of_a_region_is_asked_for_it(
    data: st.DataObject, tensor: TensorShards, least: int
) -> None:
    if data.draw(st.booleans()):
        tensor = TensorShards(tensor.dtype, tensor.shape, tensor.shards, tensor.permutation, tensor.padding)
    given_form = data.draw(st.one_of(st.just(tensor.form), forms(tensor.shape)))
    region = data.draw(regions(given_form))
    plan = WritePlan(ShardMap({"w": tensor}), least)
    asked = set(plan.writers_near("w", region, given_form))
    for rank in ranks_of(plan.shard_map):
        for part in plan.of_rank(rank):
            runs = intersect(part.region, tensor.form, region, given_form).clip(part.start, part.stop)
            assert rank in asked or not len(runs.length)


def test_copies_are_divided_evenly_where_they_are_large_and_not_at_all_where_they_are_small() -> None:
    everybody = ShardingRule(RankGrid(0, ((8, 1),)))
    whole = ShardMap({f"t{index:02}": TensorShards("float32", (1000, 77), everybody) for index in range(30)})
    plan = WritePlan(whole)
    written = [sum((part.stop - part.start) * 4 for part in plan.of_rank(rank)) for rank in range(8)]
    assert max(written) - min(written) <= 8
    assert max(len(plan.of_rank(rank)) for rank in range(8)) <= 5, "neighbours are written together"
    small = WritePlan(ShardMap({"t": TensorShards("float32", (100,), everybody)}))
    assert [rank for rank in range(8) if small.of_rank(rank)] == [0]


def test_few_of_many_ranks_are_asked_for_what_one_rank_of_another_layout_wants() -> None:
    shape = (8192, 28672)
    mesh = RankGrid(0, ((8, 2048), (256, 8), (8, 1)))
    flat = ShardingRule(mesh, (DimCut(1, (2,)),), FlatCut((1, 0), 12345, 20_000))
    tensor = TensorShards("float32", shape, flat)
    tensor.check()
    plan = WritePlan(ShardMap({"w": tensor}))
    rows = Box((1024, 0), (4, shape[1]))
    assert len(set(plan.writers_near("w", rows, tensor.form))) <= 16
    assert len(set(plan.writers_near("w", Box((0, 0), (4, 100)), tensor.form))) <= 2
    by_rows = TensorShards("float32", shape, ShardingRule(mesh, (DimCut(0, (1, 0, 2), "up"),)))
    assert len(set(WritePlan(ShardMap({"w": by_rows})).writers_near("w", Interval(7, 28_000), by_rows.form))) == 1


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (ShardingRule(RankGrid(0, ((2, 1), (2, 1)))), "puts a rank in two places"),
        (ShardingRule(RankGrid(0, ((0, 1),))), "puts a rank in two places, or none"),
        (ShardingRule(RankGrid(-1, ((2, 1),))), "negative rank"),
        (ShardingRule(RankGrid(0, ((2, 1),)), (DimCut(0, (0,)), DimCut(1, (0,)))), "Let each cut once"),
        (ShardingRule(RankGrid(0, ((2, 1),)), (DimCut(0, (1,)),)), "Let each cut once"),
        (ShardingRule(RankGrid(0, ((2, 1),)), (DimCut(2, (0,)),)), "names no dim"),
        (ShardingRule(RankGrid(0, ((2, 1),)), (), FlatCut((0,), 1, 10)), r"end at 20\. Make them longer"),
    ],
)
def test_rules_that_leave_something_out_are_refused(rule: ShardingRule, message: str) -> None:
    with pytest.raises(ShardMapInvalid, match=f"tensor w of shape .*{message}"):
        ShardMap({"w": TensorShards("float32", (4, 5), rule)}).check()


def test_a_tensor_that_is_padded_at_its_flat_end_is_cut_flat() -> None:
    flat = ShardingRule(RankGrid(0, ((3, 1),)), (), FlatCut((0,), 0, 4))
    tensor = TensorShards("float32", (2, 5), flat, padding=Padding(None, 2))
    tensor.check()
    assert [tensor.of_rank(rank) for rank in range(4)] == [
        (Interval(0, 4),),
        (Interval(4, 8),),
        (Interval(8, 12),),
        (),
    ]


@pytest.mark.parametrize(
    "whole",
    [own_map(2, 2, 6, 2), own_map(2, 1, 8, 2, states=2), transformers_map(1, 5, 4), zero3_map(1, 7)],
    ids=["own", "own, states in groups", "transformers", "DeepSpeed stage 3"],
)
def test_ranks_of_a_huge_model_write_all_of_it_once_and_each_plans_alone(whole: ShardMap) -> None:
    whole.check()
    size = ranks_of(whole).stop
    plan, written = WritePlan(whole), dict.fromkeys(whole.tensors, 0)
    for rank in range(size):
        held = whole.of_rank(rank)
        parts = WritePlan(whole).of_rank(rank)
        assert parts == plan.of_rank(rank)
        for part in parts:
            assert held[part.name][part.held] == part.region
            assert rank in set(plan.writers_near(part.name, part.region, whole.tensors[part.name].form))
            written[part.name] += part.stop - part.start
    assert written == {name: tensor.form.num_elements for name, tensor in whole.tensors.items()}
    for tensor in list(whole.tensors.values())[:8]:
        TensorShards(tensor.dtype, tensor.shape, tensor.shards).check()
    loads = [sum((part.stop - part.start) * 4 for part in plan.of_rank(rank)) for rank in range(size)]
    assert max(loads) <= 1.3 * sum(loads) / size
