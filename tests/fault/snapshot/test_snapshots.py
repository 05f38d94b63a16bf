"""Snapshots of real ranks: what they hold is what was saved, on every layout, whatever was killed and when."""

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evermesh.checkpoint import CheckpointCorrupt, load, wanted_regions
from evermesh.checkpoint.file_plan import parts_within
from evermesh.fault.errors import KeeperRefused
from evermesh.fault.snapshot.choosing import Version, common_versions
from evermesh.fault.snapshot.keeper.area import area_of
from evermesh.fault.snapshot.keeper.process import KeeperProcess
from evermesh.fault.snapshot.keeper.slots import SlotFiles, held_by
from evermesh.fault.snapshot.parts import LocalPart, Said
from evermesh.fault.snapshot.snapshots import Keeping, Snapshots
from evermesh.fault.snapshot.source import slot_with, source_of_node, versions_of
from evermesh.parallelism.collectives import Communicator
from tests.checkpoint import states
from tests.cluster import RankFailed, run_ranks
from tests.fault.snapshot.keepers import keeper_of, kill_keeper

NODES = ((0, 0, 0), (0, 0, 1, 1), (0, 1))


def _communicator(nodes: Sequence[int]) -> Communicator:
    return Communicator(torch.distributed.group.WORLD, nodes=tuple(nodes))


def _area(folder: str, node: int) -> Path:
    return area_of(Path(folder), f"node-{node}")


def _agree(snapshots: Snapshots, communicator: Communicator, *, due: bool = False) -> tuple[str | None, bool]:
    """One step of training, as far as snapshots see it."""
    votes = torch.tensor([snapshots.vote(is_due=due)], dtype=torch.float64)
    communicator.all_reduce(votes, "scalars")
    return snapshots.count(float(votes))


def _until_over(snapshots: Snapshots, communicator: Communicator) -> str:
    while True:
        outcome, _ = _agree(snapshots, communicator)
        if outcome is not None:
            return outcome
        time.sleep(0.002)


def _fill(tensors: Mapping[str, Sequence[torch.Tensor]], rank: int, world: int, step: int) -> None:
    of_step = states.held_by(rank, world, states.logical_state(step))
    for name, regions in tensors.items():
        for region, values in zip(regions, of_step[name], strict=True):
            region.copy_(values)


def _take(rank: int, world: int, folder: str, nodes: Sequence[int], steps: Sequence[int], generation: int) -> Any:
    """Snapshots of ``steps``, one after the other, each of them committed."""
    communicator = _communicator(nodes)
    tensors = states.held_by(rank, world, states.logical_state(0))
    keeping = Keeping(_area(folder, nodes[rank]), generation)
    snapshots = Snapshots(keeping, states.shard_map(world), tensors, communicator)
    for step in steps:
        _fill(tensors, rank, world, step)
        assert snapshots.begin(step, {"step": step}, {"model": "small"})
        _fill(tensors, rank, world, 999)  # training goes on
        assert _until_over(snapshots, communicator) == "committed"
    snapshots.close()
    return snapshots.counts


def _restored(folder: str, nodes: Sequence[int], rank: int, version: Version) -> dict[str, Any]:
    """What a rank gets out of the memory of its own node, compared bit for bit."""
    shard_map = states.shard_map(len(nodes))
    area, mates = _area(folder, nodes[rank]), [one for one in range(len(nodes)) if nodes[one] == nodes[rank]]
    source = source_of_node(area, mates, version, shard_map, len(nodes))
    expected = states.held_by(rank, len(nodes), states.logical_state(version.step))
    empty = {name: [torch.full_like(region, 0) for region in regions] for name, regions in expected.items()}
    result = load(source, wanted_regions(shard_map, rank, empty), shard_map=shard_map)
    for name, regions in expected.items():
        form = shard_map.tensors[name].form
        if form.padding is None:
            assert all(map(torch.equal, empty[name], regions)), name
    assert result.step == version.step
    return result.objects


def _restore_all(folder: str, nodes: Sequence[int], step: int) -> list[int]:
    """Every rank asks its own node only, after all that trained have ended; by rank the snapshots that it has."""
    counts = []
    for rank, node in enumerate(nodes):
        found = versions_of(_area(folder, node), rank)
        version = next(version for version in found if version.step == step)
        assert _restored(folder, nodes, rank, version) == {"step": step}
        counts.append(len(found))
    return counts


@contextmanager
def _keepers(folder: Path, nodes: Sequence[int]) -> Iterator[dict[int, KeeperProcess]]:
    with ExitStack() as stack:
        yield {node: stack.enter_context(keeper_of(folder, f"node-{node}")) for node in sorted(set(nodes))}


@pytest.mark.parametrize("nodes", NODES)
def test_f26_every_rank_restores_all_it_holds_from_its_own_node_alone(nodes: tuple[int, ...], tmp_path: Path) -> None:
    with _keepers(tmp_path, nodes):
        counts = run_ranks(len(nodes), _take, str(tmp_path), nodes, (4, 9, 12), 1)
        assert [(one.committed, one.lost, one.skipped) for one in counts] == [(3, 0, 0)] * len(nodes)
        for step in (9, 12):
            assert _restore_all(str(tmp_path), nodes, step) == [2] * len(nodes)
        for node in set(nodes):  # every box once on every node
            stored = sum(
                held.record.data_bytes
                for rank in range(len(nodes))
                for held in held_by(_area(str(tmp_path), node), rank)
                if held.record.step == 12
            )
            assert stored == pytest.approx(_bytes_of_node(nodes, node), abs=2048 * len(nodes))  # and heads of files


def _bytes_of_node(nodes: Sequence[int], node: int) -> int:
    shard_map = states.shard_map(len(nodes))
    regions = {
        (name, region): region.num_elements * getattr(torch, shard_map.tensors[name].dtype).itemsize
        for rank in range(len(nodes))
        if nodes[rank] == node
        for name, held in shard_map.of_rank(rank).items()
        for region in held
    }
    return sum(regions.values())


@given(st.integers(1, 9), st.data())
def test_what_ranks_hold_is_written_once_among_any_of_them(world: int, data: st.DataObject) -> None:
    within = sorted(data.draw(st.sets(st.integers(0, world - 1), min_size=1)))
    shard_map = states.shard_map(world)
    written: dict[tuple[str, Any], list[tuple[int, int]]] = {}
    for rank in within:
        for part in parts_within(shard_map, rank, within):
            assert shard_map.of_rank(rank)[part.name][part.held] == part.region
            written.setdefault((part.name, part.region), []).append((part.start, part.stop))
    wanted = {
        (name, region)
        for rank in within
        for name, regions in shard_map.of_rank(rank).items()
        for region in regions
        if region.num_elements
    }
    assert written.keys() == wanted
    for (_, region), spans in written.items():
        spans.sort()
        assert [0, *(stop for _, stop in spans)] == [*(start for start, _ in spans), region.num_elements]


def test_another_layout_on_the_node_loads_the_snapshot_too(tmp_path: Path) -> None:
    with _keepers(tmp_path, (0,)):
        run_ranks(3, _take, str(tmp_path), (0, 0, 0), (5,), 1)
        (version,) = versions_of(_area(str(tmp_path), 0), 0)
        source = source_of_node(_area(str(tmp_path), 0), (0, 1, 2), version, states.shard_map(3), 3)
        for rank in range(2):
            expected = states.held_by(rank, 2, states.logical_state(5))
            got = {name: [torch.zeros_like(region) for region in regions] for name, regions in expected.items()}
            load(source, wanted_regions(states.shard_map(2), rank, got), shard_map=states.shard_map(2))
            for name, regions in expected.items():
                assert all(map(torch.equal, got[name], regions)), name


def test_f19_a_flipped_byte_is_found_when_it_is_loaded_and_the_older_slot_is_whole(tmp_path: Path) -> None:
    with _keepers(tmp_path, (0, 0)):
        run_ranks(2, _take, str(tmp_path), (0, 0), (5, 6), 1)
        area = _area(str(tmp_path), 0)
        newest = max(held_by(area, 1), key=lambda held: held.record.step)
        files = SlotFiles.of(area, 1, newest.number)
        for file in (files.data, files.index, files.objects):
            whole = file.read_bytes()
            for place in (0, len(whole) // 2, len(whole) - 1):
                damaged = bytearray(whole)
                damaged[place] ^= 1
                file.write_bytes(damaged)
                with pytest.raises(CheckpointCorrupt):
                    _restored_by_both(str(tmp_path), Version(1, 6, newest.record.shard_map))
            file.write_bytes(whole[:-1])
            with pytest.raises(CheckpointCorrupt):
                _restored_by_both(str(tmp_path), Version(1, 6, newest.record.shard_map))
            file.write_bytes(whole)
        for step in (5, 6):
            assert _restore_all(str(tmp_path), (0, 0), step) == [2, 2]


def _restored_by_both(folder: str, version: Version) -> None:
    for rank in range(2):
        area = _area(folder, 0)
        (held,) = (one for one in held_by(area, rank) if one.number == slot_with(area, rank, version))
        assert Said(LocalPart(area, held)).values
        _restored(folder, (0, 0), rank, version)


def _lose_the_keeper(rank: int, world: int, folder: str, nodes: Sequence[int]) -> list[str]:
    communicator = _communicator(nodes)
    tensors = states.held_by(rank, world, states.logical_state(1))
    snapshots = Snapshots(Keeping(_area(folder, nodes[rank]), 1), states.shard_map(world), tensors, communicator)
    told = []
    snapshots.begin(1, {"step": 1}, {})
    told.append(_until_over(snapshots, communicator))
    communicator.barrier("test")
    if rank == 1:
        kill_keeper(_area(folder, 1))
    communicator.barrier("test")
    snapshots.begin(2, {"step": 2}, {})
    assert not snapshots.begin(3, {}, {}), "one is under way"
    told.append(_until_over(snapshots, communicator))
    if rank == 1:
        (Path(folder) / "killed").touch()
    until = time.monotonic() + 60
    while told[-1] == "lost" and time.monotonic() < until:
        _fill(tensors, rank, world, 4)
        snapshots.begin(4, {"step": 4}, {})
        told.append(_until_over(snapshots, communicator))
        time.sleep(0.02)
    snapshots.close()
    return told


def _start_again(keeper: KeeperProcess) -> None:
    """What an agent does about one that was killed: it looks now and then, for a dying process may still be there."""
    until = time.monotonic() + 10
    while keeper.look():
        assert time.monotonic() < until, "the keeper was not killed"
        time.sleep(0.01)


def test_f6_training_goes_on_without_a_keeper_and_the_next_one_finds_what_it_left(tmp_path: Path) -> None:
    nodes = (0, 1)
    with _keepers(tmp_path, nodes) as keepers, ThreadPoolExecutor(1) as pool:
        ranks = pool.submit(run_ranks, 2, _lose_the_keeper, str(tmp_path), nodes)
        until = time.monotonic() + 60
        while not (tmp_path / "killed").exists() and time.monotonic() < until and not ranks.done():
            time.sleep(0.01)
        assert [held.record.step for held in held_by(_area(str(tmp_path), 1), 1)] == [1], "its memory is there"
        _start_again(keepers[1])
        told = ranks.result()
        assert told[0] == told[1]
        assert told[0][:2] == ["committed", "lost"]
        assert told[0][-1] == "committed"
        assert _restore_all(str(tmp_path), nodes, 4) == [2, 2]


def _lose_the_memory(rank: int, world: int, folder: str) -> list[str]:
    """The keeper of rank 1 dies, and somebody sweeps what it left."""
    communicator, area = _communicator((0, 1)), _area(folder, rank)
    tensors = states.held_by(rank, world, states.logical_state(1))
    snapshots = Snapshots(Keeping(area, 1), states.shard_map(world), tensors, communicator)
    snapshots.begin(1, {"step": 1}, {})
    told = [_until_over(snapshots, communicator)]
    if rank == 1:
        kill_keeper(area)
        shutil.rmtree(area / "rank-00001")
        (Path(folder) / "killed").touch()
    until = time.monotonic() + 60
    while (len(told) < 2 or told[-1] == "lost") and time.monotonic() < until:
        _fill(tensors, rank, world, 4)
        snapshots.begin(4, {"step": 4}, {})
        told.append(_until_over(snapshots, communicator))
        time.sleep(0.02)
    return told


def test_f6_memory_that_went_with_a_keeper_is_made_anew_while_training_goes_on(tmp_path: Path) -> None:
    with _keepers(tmp_path, (0, 1)) as keepers, ThreadPoolExecutor(1) as pool:
        ranks = pool.submit(run_ranks, 2, _lose_the_memory, str(tmp_path))
        until = time.monotonic() + 60
        while not (tmp_path / "killed").exists() and time.monotonic() < until and not ranks.done():
            time.sleep(0.01)
        _start_again(keepers[1])
        told = ranks.result()
        assert told[0] == told[1]
        assert told[0][-1] == "committed"
        assert _restore_all(str(tmp_path), (0, 1), 4) == [2, 1]


def _without_memory(rank: int, world: int, folder: str) -> str:
    keeping = Keeping(area_of(Path(folder), f"node-{rank}"), 1)
    tensors = states.held_by(rank, world, states.logical_state(1))
    with pytest.raises(KeeperRefused) as caught:
        Snapshots(keeping, states.shard_map(world), tensors, _communicator((0, 1)))
    return str(caught.value)


def test_f18_one_rank_without_memory_is_told_by_all(tmp_path: Path) -> None:
    with _keepers(tmp_path, (0, 1)) as keepers:
        (keepers[1].area / "rank-00001").write_text("no folder can be made here")
        for told in run_ranks(2, _without_memory, str(tmp_path)):
            assert "rank 1 has no memory for snapshots" in told
            assert "train.snapshot" in told


def test_a_part_of_another_attempt_or_layout_is_never_mixed_in() -> None:
    one, two = Version(1, 8, "a"), Version(2, 8, "a")
    assert common_versions({0: [one, two], 1: [one]}, 2) == [one]
    assert common_versions({0: [two], 1: [one]}, 2) == []
    assert common_versions({0: [one, Version(1, 6, "a")], 1: [Version(1, 6, "a"), one]}, 2) == [one, Version(1, 6, "a")]
    assert common_versions({0: [Version(1, 9, "a"), Version(2, 4, "a")]}, 1)[0] == Version(2, 4, "a")
    assert common_versions({0: [one]}, 2) == []
    assert common_versions({0: [one], 1: [one._replace(shard_map="b")]}, 2) == []


def _train_until_killed(rank: int, world: int, folder: str, seed: int) -> None:
    """Snapshots again and again; once one is complete, a rank ends at a random moment, inside a copy perhaps."""
    chance = random.Random(seed)
    victim, moment_s = chance.randrange(world), chance.uniform(0.0, 0.05)
    communicator = _communicator((0,) * world)
    tensors = states.held_by(rank, world, states.logical_state(0))
    snapshots = Snapshots(Keeping(_area(folder, 0), 1), states.shard_map(world), tensors, communicator)
    with open(f"{folder}/told-{rank}", "w+b", buffering=0) as told:
        step = 0
        while True:
            _fill(tensors, rank, world, step % 8)
            os.pwrite(told.fileno(), step.to_bytes(8, "little"), 0)
            snapshots.begin(step, {"step": step}, {})
            assert _until_over(snapshots, communicator) == "committed"
            os.pwrite(told.fileno(), step.to_bytes(8, "little"), 8)
            if step == 1 and rank == victim:
                threading.Timer(moment_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
            step += 1


def _survives_a_kill(folder: Path, seed: int) -> None:
    with pytest.raises(RankFailed, match=r"ended without an answer|Connection closed|reset by peer"):
        run_ranks(2, _train_until_killed, str(folder), seed)
    told = [(folder / f"told-{rank}").read_bytes() for rank in range(2)]
    begun, committed = (max(int.from_bytes(of_rank[at : at + 8], "little") for of_rank in told) for at in (0, 8))
    area = _area(str(folder), 0)
    found = common_versions({rank: versions_of(area, rank) for rank in range(2)}, 2)
    assert found, f"seed {seed}: nothing is left of steps {committed} and {begun}"
    assert committed <= found[0].step <= begun
    assert begun - found[0].step <= 1
    for rank in range(2):
        version = found[0]
        shard_map = states.shard_map(2)
        source = source_of_node(area, (0, 1), version, shard_map, 2)
        expected = states.held_by(rank, 2, states.logical_state(version.step % 8))
        got = {name: [torch.zeros_like(region) for region in regions] for name, regions in expected.items()}
        load(source, wanted_regions(shard_map, rank, got), shard_map=shard_map)
        assert all(all(map(torch.equal, got[name], regions)) for name, regions in expected.items()), seed
        assert source.objects == {"step": version.step}


@pytest.mark.parametrize("seed", range(3))
def test_f2_a_rank_killed_at_any_moment_leaves_a_whole_snapshot(seed: int, tmp_path: Path) -> None:
    with _keepers(tmp_path, (0,)):
        _survives_a_kill(tmp_path, seed)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_f2_of_many_kills_each_leaves_a_whole_snapshot_that_is_at_most_one_interval_old(tmp_path: Path) -> None:
    for seed in range(int(os.environ.get("KILLS", "1000"))):
        folder = tmp_path / str(seed)
        folder.mkdir()
        with _keepers(folder, (0,)):
            _survives_a_kill(folder, seed)
