"""Rings: what is written is read, whatever else happens at the time."""

import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from evermesh.checkpoint.background.memory import FOLDER, RoomMissing
from evermesh.fault.recorder import ring_format as form
from evermesh.fault.recorder.area import RingArea, rings_in, rings_of, sweep_rings
from evermesh.fault.recorder.errors import RingUnreadable
from evermesh.fault.recorder.names import group_line, parse_names, site_line
from evermesh.fault.recorder.reader import read_records, read_ring
from evermesh.fault.recorder.record import DTYPES, OPERATIONS, RECORD, Group
from evermesh.fault.recorder.ring import Ring, RingSpec
from tests.fault.recorder.recording import empty_ring, recording, rings, spec_in

_CONTEXT = multiprocessing.get_context("forkserver")


@pytest.fixture
def folder() -> Iterator[Path]:
    with rings() as made:
        yield made


def test_an_empty_ring_says_whose_it_is(folder: Path) -> None:
    ring = empty_ring(folder)
    ring.note_moment(7, "evaluate")
    trace, state = read_ring(ring.path)
    assert (trace.rank, trace.node, trace.pid, len(trace.records)) == (0, "node-0", os.getpid(), 0)
    assert (trace.step, trace.phase) == (7, "evaluate")
    assert abs(trace.read_ns + trace.wall_offset_ns - time.time_ns()) < 1e9
    assert state.is_of_this_boot
    assert (state.owner, state.tier) == (str(folder), "none")
    assert ring.path.stat().st_blocks * 512 >= form.RING_BYTES, "not all of it is allocated: a write may end the rank"


def test_what_the_constants_say_is_what_the_record_is() -> None:
    fields = RECORD.fields
    assert fields is not None
    assert RECORD.itemsize == form.RECORD_BYTES
    places = {"enqueued_ns": form.ENQUEUED_WORD * 8, "ended_ns": form.ENDED_WORD * 8, "flags": form.FLAGS_BYTE}
    assert {name: fields[name][1] for name in places} == places
    assert form.PROGRESS_OF_GROUPS_AT + form.NUM_PROGRESS_GROUPS * form.WORDS_PER_GROUP <= form.HEADER_BYTES // 8


@pytest.mark.parametrize(
    "ranks", [(), (3,), tuple(range(12_288)), (0, 8, 16, 24), (5, 3, 1), (0, 1, 2, 10, 20, 30, 7), (4, 4)]
)
def test_ranks_of_a_group_are_named_in_their_order(ranks: tuple[int, ...]) -> None:
    line = group_line(3, 'a "name"', ranks, "hdp")
    assert parse_names(line).groups == {3: Group('a "name"', ranks, "hdp")}
    assert len(line) < 160


def test_names_that_are_cut_off_are_left_out_and_later_ones_count() -> None:
    lines = group_line(1, "old", (), "") + site_line(1, "gradients") + group_line(1, "new", (0, 1), "tp")
    names = parse_names(lines + b'{"site":2,"text":"cut')
    assert names.groups == {1: Group("new", (0, 1), "tp")}
    assert names.sites == {1: "gradients"}


def test_names_without_room_are_counted(folder: Path) -> None:
    ring = empty_ring(folder)
    while ring.append_name(site_line(1, "x" * 1000)):
        pass
    ring.append_name(site_line(1, "y" * 1000))
    assert read_ring(ring.path)[1].names_lost == 2


def test_a_ring_without_room_is_refused_with_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evermesh.checkpoint.background.memory.available_bytes", lambda: (1 << 20, 1 << 34))
    with pytest.raises(
        RoomMissing, match=rf"{form.RING_BYTES:,} bytes of shared memory are needed, 1,048,576 are free"
    ):
        empty_ring(folder)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("content", [b"", b"x" * 100, bytes(form.RING_BYTES)])
def test_a_file_that_is_no_ring_is_refused(content: bytes, folder: Path) -> None:
    file = folder / "0-0.ring"
    file.write_bytes(content)
    with pytest.raises(RingUnreadable, match="is being made"):
        read_ring(file)


def _slots(sequences: list[int]) -> np.ndarray:
    slots = np.zeros(len(sequences), RECORD)
    slots["sequence"] = sequences
    return slots


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        ([0] * 8, []),
        ([1, 2, 3, 0, 0, 0, 0, 0], [1, 2, 3]),
        ([9, 10, 11, 4, 5, 6, 7, 8], [4, 5, 6, 7, 8, 9, 10, 11]),
        ([9, 10, 0, 4, 5, 6, 7, 8], [4, 5, 6, 7, 8, 9, 10]),  # 11 is being written over 3
        ([9, 10, 0, 0, 5, 6, 7, 8], [5, 6, 7, 8, 9, 10]),
        ([1, 0, 3, 0, 0, 0, 0, 0], [1, -2, 3]),  # a thread is still writing 2
        ([9, 0, 11, 4, 5, 6, 7, 8], [4, 5, 6, 7, 8, 9, -10, 11]),
        ([1, 2], [1, 2]),  # a copy holds what was used alone
    ],
)
def test_records_are_read_in_their_order_without_gaps(slots: list[int], expected: list[int]) -> None:
    array = _slots(slots)
    array["operation"] = np.where(array["sequence"] > 0, 1, 0)
    found = read_records(array, 8)
    told = [
        int(one["sequence"]) if OPERATIONS[one["operation"]] == "all_reduce" else -int(one["sequence"]) for one in found
    ]
    assert told == expected


def _issue(folder: str, wanted: str, operations: int, started: object) -> None:
    """Sums whose size follows from their number, on the fake backend."""
    import torch
    import torch.distributed as dist

    from evermesh.fault.recorder.measuring import start_fake_group

    torch.set_num_threads(1)
    with recording(Path(folder), 0, 2, wanted):  # type: ignore[arg-type]
        start_fake_group()
        tensors = [torch.empty(size + 1, dtype=torch.uint8) for size in range(251)]
        started.set()  # type: ignore[attr-defined]
        for number in range(operations):
            dist.all_reduce(tensors[number % 251])


def _check(records: np.ndarray) -> None:
    """That every record is that of its number."""
    numbers = records["number"].astype(np.int64)
    assert (records["sequence"].astype(np.int64) == numbers + 1).all()
    assert (np.diff(numbers) == 1).all()
    assert (records["num_bytes"].astype(np.int64) == numbers % 251 + 1).all()
    assert (np.diff(records["entered_ns"].astype(np.int64)) > 0).all()
    enqueued = records["enqueued_ns"][:-2]  # the last ones may be under way
    assert (enqueued >= records["entered_ns"][:-2]).all()
    assert set(records["operation"]) <= {OPERATIONS.index("all_reduce")}
    assert set(records["dtype"]) <= {DTYPES.index("uint8")}


@pytest.mark.parametrize("wanted", ["python", "native"])
def test_no_record_is_torn_when_it_is_read_while_the_ring_is_written_around(
    wanted: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    if wanted == "native":
        request.getfixturevalue("native_tap")
    operations, started = 3 * form.NUM_SLOTS, _CONTEXT.Event()
    writer = _CONTEXT.Process(target=_issue, args=(str(folder), wanted, operations, started), daemon=True)
    writer.start()
    try:
        assert started.wait(60)
        reads, last = 0, 0
        while writer.is_alive():
            trace, _ = read_ring(folder / "0-0.ring")
            if len(trace.records):
                _check(trace.records)
                reads, last = reads + 1, int(trace.records["sequence"][-1])
        writer.join()
        assert reads > 20, f"read {reads} times only"
        trace, _ = read_ring(folder / "0-0.ring")
        _check(trace.records)
        assert last <= int(trace.records["sequence"][-1]) == operations
        assert len(trace.records) == form.NUM_SLOTS
        assert trace.num_overwritten == operations - form.NUM_SLOTS
    finally:
        writer.kill()
        writer.join()


def _ring_of(area: RingArea, generation: int, rank: int) -> Ring:
    return Ring.make(area.spec(generation, rank, 2))


def test_an_area_keeps_its_rings_and_leaves_no_memory(tmp_path: Path) -> None:
    area = RingArea(tmp_path, "node-0")
    try:
        _ring_of(area, 1, 0), _ring_of(area, 1, 1)
        assert [(ring.generation, ring.rank) for ring in rings_of(tmp_path)] == [(1, 0), (1, 1)]
        assert sweep_rings() == [], "it is held"
        area.keep()
        area.clear()
        ring = _ring_of(area, 2, 0)
        words = itertools.count(1)
        slots = np.frombuffer(ring.memory, RECORD, offset=form.RECORDS_AT)
        slots["sequence"][:3] = [next(words) for _ in range(3)]
        assert [(found.generation, found.rank) for found in rings_of(tmp_path)] == [(2, 0)]
        del slots
    finally:
        area.close()
    assert not area.path.exists()
    kept = {(ring.generation, ring.rank): ring.path for ring in rings_in(tmp_path / "records")}
    assert set(kept) == {(2, 0), (1, 1)}, "of every rank the newest"
    trace, state = read_ring(kept[2, 0])
    assert (len(trace.records), state.generation, state.world_size) == (3, 2, 2)
    assert kept[2, 0].stat().st_size == form.RECORDS_AT + 3 * form.RECORD_BYTES
    assert [(ring.generation, ring.rank) for ring in rings_of(tmp_path)] == [(2, 0)]


def _hold_area(directory: str, made: object) -> None:
    area = RingArea(Path(directory), "node-0")
    Ring.make(RingSpec(area.path / "4-0.ring", 0, 1, 4, "node-0", directory))
    made.set()  # type: ignore[attr-defined]
    time.sleep(60)


def test_the_area_of_a_killed_owner_is_swept_and_its_rings_are_kept(tmp_path: Path) -> None:
    made = _CONTEXT.Event()
    owner = _CONTEXT.Process(target=_hold_area, args=(str(tmp_path), made), daemon=True)
    owner.start()
    try:
        assert made.wait(60)
        (found,) = rings_of(tmp_path)
        assert found.path.is_relative_to(FOLDER)
    finally:
        owner.kill()
        owner.join()
    assert found.path.is_file(), "it outlives its owner until somebody sweeps"
    sweep_rings()
    assert not found.path.parent.exists()
    assert read_ring(tmp_path / "records" / "4-0.ring")[1].generation == 4


def test_a_ring_is_made_by_one_process_only(folder: Path) -> None:
    empty_ring(folder)
    with pytest.raises(FileExistsError):
        Ring.make(spec_in(folder))
