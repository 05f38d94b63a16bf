"""Tensors move between shard maps through memory: bit for bit, with the fewest bytes, in bounded memory."""

import itertools
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from evermesh.checkpoint import (
    Box,
    Interval,
    Region,
    Shard,
    ShardMap,
    ShardMapInvalid,
    TensorShards,
    intersect,
    load,
    save,
    wanted_regions,
)
from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.regions import Runs
from evermesh.checkpoint.relayout import Carrier, Holding, Moved, relayout
from evermesh.checkpoint.relayout.plan import make_plan, portion
from evermesh.checkpoint.relayout.strided import copy_runs
from evermesh.checkpoint.scattering import progressions
from evermesh.parallelism.collectives import CollectiveRecord, Communicator
from tests.checkpoint.states import held_by, local_storage, logical_state, shard_map
from tests.checkpoint.test_shard_map import forms, shapes, storage
from tests.cluster import peak_memory, run_ranks

Draw = Any
Storages = dict[str, list[torch.Tensor]]


@st.composite
def cut_tensors(draw: Draw, dtype: str, shape: tuple[int, ...], ranks: int) -> TensorShards:
    """A tensor that is cut into intervals or boxes of any sizes, each held by any ranks."""
    form = draw(forms(shape))
    cut: list[Region]
    if draw(st.booleans()) or (form.padding is not None and form.padding.dim is None):
        cut = [Interval(*ends) for ends in _cuts(draw, form.num_elements)]
    else:
        spans = itertools.product(*(_cuts(draw, size) for size in form.stored_shape))
        cut = [Box(tuple(a for a, _ in box), tuple(b - a for a, b in box)) for box in spans]
    holders = st.sets(st.integers(0, ranks - 1), min_size=1).map(lambda found: tuple(sorted(found)))
    shards = tuple(Shard(region, draw(holders)) for region in cut)
    return TensorShards(dtype, shape, shards, form.permutation, form.padding)


def _cuts(draw: Draw, size: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise(sorted([0, size, *draw(st.lists(st.integers(0, size), max_size=3))])))


@st.composite
def map_pairs(draw: Draw, ranks: int) -> tuple[ShardMap, ShardMap]:
    """Two maps of the same tensors."""
    sides: tuple[dict[str, TensorShards], dict[str, TensorShards]] = ({}, {})
    for number in range(draw(st.integers(0, 3))):
        dtype, shape = draw(st.sampled_from(["float64", "bfloat16", "bool", "float32"])), draw(shapes())
        for side in sides:
            side[f"tensor {number}"] = draw(cut_tensors(dtype, shape, ranks))
    return ShardMap(sides[0]), ShardMap(sides[1])


def _elements(tensor: TensorShards, rank: int) -> set[int]:
    """Logical elements that a rank holds, by numpy indexing alone."""
    held = [storage(shard.region, tensor.form) for shard in tensor.shards if rank in shard.ranks]
    return set(np.concatenate([np.empty(0, np.int64), *held]).tolist()) - {-1}


def least_bytes(source: ShardMap, target: ShardMap, ranks: int) -> tuple[int, ...]:
    """By rank: bytes that it wants and does not hold."""
    missing = [0] * ranks
    for (name, tensor), rank in itertools.product(target.tensors.items(), range(ranks)):
        found = _elements(tensor, rank) - _elements(source.tensors[name], rank)
        missing[rank] += len(found) * DTYPES[tensor.dtype].num_bytes
    return tuple(missing)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_plans_of_all_ranks_fit_each_other_and_move_only_what_is_missing(data: st.DataObject) -> None:
    ranks, room_bytes = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([8, 24, 100, 1 << 20]))
    source, target = data.draw(map_pairs(ranks))
    nodes = data.draw(st.lists(st.integers(0, 1), min_size=ranks, max_size=ranks))
    plans = [make_plan(source, target, rank, nodes, room_bytes) for rank in range(ranks)]
    assert {plan.received_bytes for plan in plans} <= {least_bytes(source, target, ranks)}
    sent, received = defaultdict(list), defaultdict(list)
    for rank, plan in enumerate(plans):
        for part in plan.rounds:
            sizes = [parcel.num_bytes for side in (part.sends, part.receives) for p in side.values() for parcel in p]
            assert 0 < sum(sizes) <= room_bytes
            for peer, parcels in part.sends.items():
                sent[rank, peer].append([(p.piece[:3], p.start, p.stop) for p in parcels])
            for peer, parcels in part.receives.items():
                received[peer, rank].append([(p.piece[:3], p.start, p.stop) for p in parcels])
    assert sent == received
    if len(plans) > 1 and len(set(nodes)) > 1:
        _assert_near(source, target, nodes, plans)


def _assert_near(source: ShardMap, target: ShardMap, nodes: list[int], plans: list[Any]) -> None:
    """What a rank of the receiver's node holds comes from there."""
    for rank, plan in enumerate(plans):
        for part in plan.rounds:
            for giver, parcels in part.receives.items():
                for parcel in parcels:
                    holders = source.tensors[parcel.piece.name].shards[parcel.piece.source].ranks
                    near = nodes[rank] in {nodes[holder] for holder in holders}
                    assert not near or nodes[giver] == nodes[rank]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_runs_are_copied_as_one_by_one_and_cut_anywhere(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 3), max_size=12))
    if data.draw(st.booleans()):
        lengths = lengths[:1] * len(lengths)
    sides = []
    for is_ordered in (True, data.draw(st.booleans())):
        order = list(range(len(lengths))) if is_ordered else data.draw(st.permutations(range(len(lengths))))
        gaps = data.draw(st.sampled_from([[1], [0, 2], [0, 0, 1]]))
        starts, at = np.zeros(len(lengths), np.int64), 0
        for place, number in enumerate(order):
            starts[number] = at
            at += lengths[number] + gaps[place % len(gaps)]
        sides.append(starts)
    runs = Runs(sides[0], sides[1], np.array(lengths, np.int64))
    source = torch.arange(100, 200)
    expected, got = torch.zeros(100, dtype=torch.int64), torch.zeros(100, dtype=torch.int64)
    for start, to, length in zip(runs.source, runs.destination, runs.length, strict=True):
        expected[to : to + length] = source[start : start + length]
    copy_runs(source, got, runs)
    assert torch.equal(got, expected)
    parts = list(progressions(runs))
    assert [number for first, last in parts for number in range(first, last)] == list(range(len(lengths)))
    cut = sorted(data.draw(st.tuples(*[st.integers(0, sum(lengths))] * 3)))
    pieces = torch.zeros(100, dtype=torch.int64)
    for first, last in itertools.pairwise([0, *cut, sum(lengths)]):
        part = portion(runs, first, last)
        assert part.num_elements == last - first
        copy_runs(source, pieces, part)
    assert torch.equal(pieces, expected)


def test_rows_of_a_box_are_one_copy() -> None:
    whole, columns = Box((0, 0), (4096, 512)), Box((0, 128), (4096, 64))
    tensors = [TensorShards("float32", (4096, 512), (Shard(region, (0,)),)) for region in (whole, columns)]
    runs = intersect(whole, tensors[0].form, columns, tensors[1].form)
    assert len(runs.length) == 4096
    assert list(progressions(runs)) == [(0, 4096)]


def _storages(side: ShardMap, rank: int, state: Mapping[str, torch.Tensor], fill: float | None = None) -> Storages:
    found: Storages = {}
    for name, regions in side.of_rank(rank).items():
        form = side.tensors[name].form
        stored = [local_storage(region, form, state[name]) for region in regions]
        found[name] = stored if fill is None else [torch.full_like(tensor, fill) for tensor in stored]
    return found


def _values(side: ShardMap, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randint(1, 100, tensor.shape, generator=generator) % 3).to(getattr(torch, tensor.dtype))
        for name, tensor in side.tensors.items()
    }


def _move_anything(rank: int, ranks: int) -> int:
    """Any pair of maps on real ranks; all of them draw the same ones. Returns how many."""
    communicator = Communicator(torch.distributed.group.WORLD)
    cases = 0

    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        nonlocal cases
        source, target = data.draw(map_pairs(ranks))
        state = _values(source, cases)
        held, wanted = _storages(source, rank, state), _storages(target, rank, state, fill=1)
        expected = _storages(target, rank, state)
        release, staged = data.draw(st.booleans()), data.draw(st.sampled_from([64, 256, 1 << 20]))
        carrier = Carrier(communicator, most_staged_bytes=staged)
        records: list[CollectiveRecord] = []
        with communicator.listen(records.append):
            moved = relayout(
                Holding(source, held), Holding(target, wanted), carrier, release=held.pop if release else None
            )
        assert moved.received_bytes == least_bytes(source, target, ranks)
        sent = [record for record in records if record.operation == "send"]
        assert sum(record.num_bytes for record in sent) == moved.sent_bytes[rank]
        assert {record.call_site for record in sent} <= {"relayout"}
        for name, tensors in wanted.items():
            form = target.tensors[name].form
            for region, tensor, should in zip(target.of_rank(rank)[name], tensors, expected[name], strict=True):
                is_padding = torch.from_numpy(storage(region, form) < 0).view(tensor.shape)
                assert torch.equal(tensor, torch.where(is_padding, torch.ones_like(tensor), should)), (name, region)
        assert not release or not held
        cases += 1

    check()
    return cases


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.parity)])
def test_any_map_moves_into_any_other_on_real_ranks(ranks: int) -> None:
    assert set(run_ranks(ranks, _move_anything)) == {60}


def _move_states(rank: int, ranks: int, directory: str, before: int, after: int) -> Moved:
    """From the first ``before`` ranks to the first ``after``, by memory and by disk."""
    communicator = Communicator(torch.distributed.group.WORLD)
    state = logical_state(7)
    source, target = shard_map(before), shard_map(after)
    held = held_by(rank, before, state) if rank < before else {}
    wanted = _storages(target, rank, state, fill=0)
    carrier = Carrier(communicator, most_staged_bytes=100_000)
    moved = relayout(Holding(source, held), Holding(target, wanted), carrier)
    path = save(Path(directory), 7, source, held, {}, communicator=communicator)
    loaded = _storages(target, rank, state, fill=0)
    load(path, wanted_regions(target, rank, loaded), shard_map=target)
    for name, tensors in loaded.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, wanted[name], strict=True)), name
    return moved


@pytest.mark.parametrize(("before", "after"), [(4, 2), (1, 4), (3, 4)])
def test_what_moves_is_what_a_checkpoint_would_load_also_when_a_job_grows_or_shrinks(
    before: int, after: int, tmp_path: Path
) -> None:
    moves = run_ranks(4, _move_states, str(tmp_path), before, after)
    assert moves[0].received_bytes == least_bytes(shard_map(before), shard_map(after), 4)
    assert len({move[:2] for move in moves}) == 1


def test_replicas_are_given_by_all_their_holders() -> None:
    """Four ranks hold all, four others want a quarter each of every tensor."""
    tensors = {
        f"w{number}": (
            TensorShards("float32", (64, 16), (Shard(Box((0, 0), (64, 16)), (0, 1, 2, 3)),)),
            TensorShards("float32", (64, 16), tuple(Shard(Box((16 * r, 0), (16, 16)), (4 + r,)) for r in range(4))),
        )
        for number in range(5)
    }
    source, target = (ShardMap({name: sides[i] for name, sides in tensors.items()}) for i in range(2))
    plan = make_plan(source, target, 0, [0] * 8, 1 << 20)
    assert plan.sent_bytes == (5 * 16 * 16 * 4,) * 4 + (0,) * 4


def _refuse(rank: int, ranks: int) -> list[str]:
    communicator = Communicator(torch.distributed.group.WORLD)
    state = logical_state(1)
    whole = shard_map(ranks)
    without = ShardMap({name: tensor for name, tensor in whole.tensors.items() if name != "model.norm"})
    held = held_by(rank, ranks, state)
    fewer = {name: tensors for name, tensors in held.items() if rank != 1 or name != "model.norm"}
    wanted = _storages(whole, rank, state, fill=0)
    refused = []
    for source, tensors in ((without, held), (whole, fewer), (whole if rank else shard_map(1), held)):
        with pytest.raises(ShardMapInvalid) as error:
            relayout(Holding(source, tensors), Holding(whole, wanted), Carrier(communicator))
        refused.append(str(error.value))
        assert not any(tensor.any() for stored in wanted.values() for tensor in stored), "something was moved"
    return refused


def test_what_does_not_fit_is_refused_by_all_before_anything_moves() -> None:
    for refused in run_ranks(2, _refuse):
        assert "model.norm is in one of them only" in refused[0]
        assert "rank 1" in refused[1]
        assert "model.norm has 0 tensors for 1 regions" in refused[1]
        assert "nothing was moved" in refused[2]


def _peak(rank: int, ranks: int, release: bool) -> int:
    """Bytes at the peak over what was held before, where 16 tensors of 16 MiB go from rows to columns."""
    size, share = 2048, 2048 // ranks
    rows = [Box((share * r, 0), (share, size)) for r in range(ranks)]
    columns = [Box((0, share * r), (size, share)) for r in range(ranks)]
    source, target = (
        ShardMap({f"w{number:02}": TensorShards("float32", (size, size), shards) for number in range(16)})
        for shards in (tuple(Shard(box, (r,)) for r, box in enumerate(boxes)) for boxes in (rows, columns))
    )
    wanted: Any = {name: torch.ones(size * share) for name in target.tensors}
    carrier = Carrier(Communicator(torch.distributed.group.WORLD), most_staged_bytes=4 << 20)
    for measured in (False, True):  # the first time, connections get their buffers
        held: Any = {name: torch.full((size * share,), float(rank + 1)) for name in source.tensors}
        with peak_memory() as peak:
            relayout(
                Holding(source, held),
                Holding(target, wanted),
                carrier,
                release=held.pop if measured and release else None,
            )
    for tensor in wanted.values():
        assert torch.equal(tensor.view(size, share)[::share, 0], torch.arange(1.0, ranks + 1))
    assert bool(held) != release
    return peak.num_bytes


@pytest.mark.parametrize("release", [False, True])
def test_a_move_needs_little_memory_beyond_its_staging(release: bool) -> None:
    for peak_bytes in run_ranks(2, _peak, release):
        print(f"peak {peak_bytes / 1e6:.1f} MB over 268 MB, 4 MiB staged")
        assert peak_bytes <= 32 << 20
