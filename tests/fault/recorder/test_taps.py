"""What taps see: twenty ways to communicate on two ranks, and exactly what is written about them."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from evermesh.fault.recorder.measuring import start_fake_group
from evermesh.fault.recorder.reader import read_ring
from evermesh.fault.recorder.record import NO_PEER, OPERATIONS, Flags
from evermesh.parallelism.collectives import Communicator, Moment
from tests.cluster import run_ranks
from tests.fault.recorder.call_paths import PATHS
from tests.fault.recorder.recording import recording, rings, spec_in

_CONTEXT = multiprocessing.get_context("forkserver")
_NO_PYTHON = {"distributed_data_parallel", "functional", "distributed_tensor"}
"""What C++ issues by itself: the tap in Python does not see it, the heartbeat counts it."""


def _run_paths(rank: int, world_size: int, folder: str, wanted: str) -> dict[str, tuple[set[str], bool]]:
    """Of every path the operations that left records, and whether the heartbeat has counted any."""
    found = {}
    with recording(Path(folder), rank, world_size, wanted) as recorder:  # type: ignore[arg-type]
        assert recorder.chosen.tier == wanted
        for prepare, _ in PATHS:
            run = prepare(rank)
            before, counted = _seen(recorder.ring.path), _counted(recorder)
            run()
            records = read_ring(recorder.ring.path)[0].records
            operations = {OPERATIONS[one["operation"]] for one in records if one["sequence"] > before}
            found[prepare.__name__] = (operations, _counted(recorder) > counted)
            dist.barrier()
    return found


def _seen(ring: Path) -> int:
    records = read_ring(ring)[0].records
    return int(records["sequence"][-1]) if len(records) else 0


def _counted(recorder: Any) -> int:
    recorder._heartbeat.beat()
    return sum(progress.begun for progress in read_ring(recorder.ring.path)[1].groups.values())


@pytest.mark.parametrize("wanted", ["python", "native"])
def test_of_twenty_ways_to_communicate_all_are_seen(wanted: str, request: pytest.FixtureRequest) -> None:
    if wanted == "native":
        request.getfixturevalue("native_tap")
    with rings() as folder:
        ranks = run_ranks(2, _run_paths, str(folder), wanted)
    missed = []
    for prepare, expected in PATHS:
        name = prepare.__name__
        operations = set.union(*(found[name][0] for found in ranks))
        if wanted == "python" and name in _NO_PYTHON:
            assert operations <= {"all_gather"}, f"{name}: {operations}"
            if not all(found[name][1] for found in ranks):
                missed.append(name)
        elif not operations >= expected:
            missed.append(f"{name}: {operations}")
    assert not missed
    assert len(PATHS) == 20


def _leave_records(rank: int, world_size: int, folder: str, wanted: str) -> None:
    torch.manual_seed(rank)
    with recording(Path(folder), rank, world_size, wanted) as recorder:  # type: ignore[arg-type]
        moment = Moment()
        recorder.follow(moment)
        moment.begin_step(5)
        group = dist.new_group([1, 0], group_desc="mine")
        pair = Communicator(group, name="pair", moment=moment)  # the records say how it is called
        pair.all_reduce(torch.ones(3, dtype=torch.float64), "gradients")
        dist.all_reduce(torch.ones(2, dtype=torch.bfloat16))
        moment.phase = "evaluate"
        pair.all_reduce(torch.ones(1), "losses")
        other = 1 - rank
        works = pair.exchange([(torch.ones(7), pair.rank ^ 1)], [(torch.empty(7), pair.rank ^ 1)], "ring")
        for work in works:
            work.wait()
        dist.broadcast(torch.ones(5, dtype=torch.int64), 1)
        if rank == 0:
            dist.send(torch.ones(1), other)
        else:
            dist.recv(torch.ones(1))
        dist.barrier()


@pytest.mark.parametrize("wanted", ["python", "native"])
def test_a_record_says_what_was_communicated(wanted: str, request: pytest.FixtureRequest) -> None:
    if wanted == "native":
        request.getfixturevalue("native_tap")
    with rings() as folder:
        run_ranks(2, _leave_records, str(folder), wanted)
        for rank in range(2):
            trace, state = read_ring(spec_in(folder, rank).path)
            assert (state.tier, trace.step, trace.phase) == (wanted, 5, "evaluate")
            groups = {group.axis: (index, group) for index, group in trace.groups.items()}
            mine, named = groups["pair"]
            world, default = groups["default_pg"]
            assert (default.ranks, sorted(named.ranks)) == ((0, 1), [0, 1])
            rows = [
                (
                    OPERATIONS[one["operation"]],
                    int(one["group"]),
                    int(one["number"]),
                    int(one["num_bytes"]),
                    int(one["peer"]),
                    trace.sites.get(int(one["site"]), ""),
                    int(one["step"]),
                )
                for one in trace.records
                if OPERATIONS[one["operation"]] != "barrier" or one["num_bytes"]
            ]
            own, other = rank, 1 - rank
            told = "" if wanted == "native" else None
            last = ("send", world, 0, 4, other) if own == 0 else ("receive_any", world, 0, 4, NO_PEER)
            expected = [
                ("all_reduce", mine, 0, 24, NO_PEER, "gradients", 5),
                ("all_reduce", world, 0, 4, NO_PEER, told, 5),
                ("all_reduce", mine, 1, 4, NO_PEER, "losses", 5),
                ("receive", mine, 0, 28, own ^ 1, "ring", 5),
                ("send", mine, 0, 28, own ^ 1, "ring", 5),
                ("broadcast", world, 1, 40, 1, told, 5),
                (*last, told, 5),
            ]
            assert len(rows) == len(expected), rows
            for row, wanted_row in zip(rows, expected, strict=True):
                site = wanted_row[5]
                assert row[:5] == wanted_row[:5], rows
                assert row[5] == site if site is not None else row[5].startswith("recorder/test_taps.py:"), row
                assert row[6] == 5
            flags = {int(one["flags"]) for one in trace.records}
            assert all(flag & Flags.END_SEEN and not flag & (Flags.DEVICE_TIMES | Flags.FAILED) for flag in flags)
            assert (trace.records["ended_ns"] > 0).all(), "everything was waited for"
            assert (trace.records["ended_ns"] >= trace.records["entered_ns"]).all()


def _fail(rank: int, world_size: int, folder: str, wanted: str) -> str:
    with recording(Path(folder), rank, world_size, wanted):  # type: ignore[arg-type]
        try:
            dist.all_reduce(torch.ones(2, dtype=torch.float8_e4m3fn), group=dist.new_group([0]))
        except RuntimeError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("wanted", ["python", "native"])
def test_what_fails_is_told_as_failed_and_raises_as_ever(wanted: str, request: pytest.FixtureRequest) -> None:
    if wanted == "native":
        request.getfixturevalue("native_tap")
    with rings() as folder:
        (said,) = run_ranks(1, _fail, str(folder), wanted)
        records = read_ring(spec_in(folder).path)[0].records
    assert "Invalid scalar type" in said
    assert Flags(int(records[-1]["flags"])) & (Flags.FAILED | Flags.END_SEEN) == Flags.FAILED | Flags.END_SEEN


def _methods() -> dict[str, Any]:
    from torch._C._distributed_c10d import ProcessGroup, Work

    return {f"{owner.__name__}.{name}": value for owner in (ProcessGroup, Work) for name, value in vars(owner).items()}


def _restore(rank: int, world_size: int, folder: str, wanted: str) -> None:
    import torch.distributed.distributed_c10d as module

    before, kernels = _methods(), torch._C._dispatch_dump("c10d::allreduce_")
    with recording(Path(folder), rank, world_size, wanted) as recorder:  # type: ignore[arg-type]
        assert (_methods() != before) or wanted == "native"
        assert (torch._C._dispatch_dump("c10d::allreduce_") != kernels) == (wanted == "native")
        dist.all_reduce(torch.ones(1))
    assert _methods() == before
    assert torch._C._dispatch_dump("c10d::allreduce_") == kernels
    assert type(module._pg_group_ranks) is dict
    seen = _seen(recorder.ring.path)
    dist.all_reduce(torch.ones(1))
    dist.new_group([0])
    assert _seen(recorder.ring.path) == seen == 1


@pytest.mark.parametrize("wanted", ["python", "native"])
def test_afterwards_torch_is_as_it_was(wanted: str, request: pytest.FixtureRequest) -> None:
    if wanted == "native":
        request.getfixturevalue("native_tap")
    with rings() as folder:
        run_ranks(1, _restore, str(folder), wanted)


def _fork(folder: str, wanted: str) -> None:
    with recording(Path(folder), 0, 2, wanted) as recorder:  # type: ignore[arg-type]
        start_fake_group()
        world = Communicator(dist.group.WORLD)
        world.all_reduce(torch.ones(1), "before")
        child = os.fork()
        if child == 0:
            world.all_reduce(torch.ones(1), "in the child")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert _seen(recorder.ring.path) == 1
        world.all_reduce(torch.ones(1), "after")
        assert _seen(recorder.ring.path) == 2
    assert set(read_ring(recorder.ring.path)[0].sites.values()) == {"before", "after"}


@pytest.mark.parametrize("wanted", ["python", "native"])
def test_a_forked_child_leaves_the_ring_alone(wanted: str, request: pytest.FixtureRequest) -> None:
    if wanted == "native":
        request.getfixturevalue("native_tap")
    with rings() as folder:
        child = _CONTEXT.Process(target=_fork, args=(str(folder), wanted), daemon=True)
        child.start()
        child.join(60)
        assert child.exitcode == 0
