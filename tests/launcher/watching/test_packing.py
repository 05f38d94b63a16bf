"""What an agent says of its ranks is what the controller understands, and what is no summary is refused."""

import base64
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from evermesh.fault.detectors.streaming import JobWatch
from evermesh.fault.detectors.summaries import RankSummary, RankWatch
from evermesh.fault.process_state import ProcessState
from evermesh.fault.recorder import ring_format as form
from evermesh.fault.recorder.following import RingFollower
from evermesh.fault.recorder.names import group_line
from evermesh.fault.recorder.reader import read_ring
from evermesh.fault.recorder.record import NO_PEER, RECORD
from evermesh.fault.recorder.ring import Ring
from evermesh.fault.synthetic import JobShape, generate
from evermesh.fault.synthetic.faults import Hang
from evermesh.launcher.agent.ring_watch import RingWatch
from evermesh.launcher.messages import FromAgentAdapter
from evermesh.launcher.watching.messages import PackedSummary, ReadRings, RingPart, Window
from evermesh.launcher.watching.packing import SummaryInvalid, Unpacker, pack_summary
from tests.fault.recorder.recording import empty_ring, rings

_SHAPE = JobShape(dp=4, tp=2)
_SUMMARY = TypeAdapter(PackedSummary)


@pytest.fixture
def folder() -> Iterator[Path]:
    with rings() as made:
        yield made


def _told(summaries: list[RankSummary]) -> list[RankSummary]:
    """What is understood of them at the other end."""
    packed = tuple(pack_summary(one, ProcessState("R", 3, False), with_groups=True, starved=0.25) for one in summaries)
    message = FromAgentAdapter.validate_json(Window(generation=1, summaries=packed).model_dump_json())
    assert isinstance(message, Window)
    unpacker = Unpacker(_SHAPE.num_ranks)
    assert all(one.tail.process == ProcessState("R", 3, False) for one in message.summaries)
    assert all(one.starved == 0.25 for one in message.summaries)
    return [unpacker.summary(one, "node0", unpacker.groups(one.groups or ())) for one in message.summaries]


def test_what_is_told_leads_to_the_same_findings() -> None:
    traces = generate(_SHAPE, [Hang(5, 6)]).traces
    summaries = [RankWatch().summarise(trace) for trace in traces]
    told = _told(summaries)
    for before, after in zip(summaries, told, strict=True):
        assert after.tail.groups == before.tail.groups
        for name in ("of_slot", "of_step", "signatures", "digests"):
            np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
        np.testing.assert_array_equal(after.tail.records, before.tail.records)
    found = JobWatch().join(told).findings
    assert [(one.kind, one.rank) for one in found] == [("hang", 5)]
    size = len(_SUMMARY.dump_json(pack_summary(summaries[0], None, with_groups=False)))
    assert size < 8192


def _packed() -> PackedSummary:
    return pack_summary(RankWatch().summarise(generate(_SHAPE).traces[3]), None, with_groups=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"of_slot": b"x" * 7},
        {"of_slot": b""},
        {"of_step": b"", "signatures": b""},
        {"signatures": bytes(8)},
        {"opened": 500},
        {"digests": np.array([[70, 0, 0]]).tobytes()},
        {"digests": np.array([[0, -1, 0]]).tobytes()},
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any]) -> None:
    packed, unpacker = _packed(), Unpacker(_SHAPE.num_ranks)
    groups = unpacker.groups(packed.groups or ())
    unpacker.summary(packed, "node0", groups)
    with pytest.raises(SummaryInvalid):
        unpacker.summary(replace(packed, **changes), "node0", groups)


@pytest.mark.parametrize("ranks", [[[0, 9, 1]], [[0, 8, 1], [0, 8, 1]], [[0, 1 << 60, 1]], [[0, 4, 0]], [[-1, 2, 1]]])
def test_groups_with_ranks_that_the_job_has_not_are_refused(ranks: list[list[int]]) -> None:
    packed = _SUMMARY.dump_python(_packed(), mode="json")
    packed["groups"][0]["ranks"] = ranks
    with pytest.raises(SummaryInvalid, match="ranks that a job of 8 has not"):
        Unpacker(_SHAPE.num_ranks).groups(_SUMMARY.validate_json(json.dumps(packed)).groups or ())


def test_more_than_a_ring_holds_is_refused() -> None:
    packed = _SUMMARY.dump_python(_packed(), mode="json")
    packed["tail"]["records"] = base64.b64encode(bytes(form.NUM_SLOTS * form.RECORD_BYTES + 64)).decode()
    with pytest.raises(ValidationError, match="records"):
        _SUMMARY.validate_json(json.dumps(packed))


def _write(ring: Ring, first: int, last: int, *, open_last: bool = False) -> None:
    slots = np.frombuffer(ring.memory, RECORD, offset=form.RECORDS_AT)
    for sequence in range(first, last + 1):
        record = np.zeros(1, RECORD)
        record["entered_ns"], record["ended_ns"] = sequence * 1000, sequence * 1000 + 500
        record["group"], record["number"], record["step"] = 1, sequence - 1, 1 + sequence // 10
        record["operation"], record["phase"], record["flags"], record["peer"] = 1, 3, 1, NO_PEER
        record["sequence"] = sequence
        if open_last and sequence == last:
            record["ended_ns"] = 0
        slots[(sequence - 1) % form.NUM_SLOTS] = record[0]


def test_a_ring_that_is_followed_says_what_is_new_and_what_was_lost(folder: Path) -> None:
    ring = empty_ring(folder)
    with RingFollower(ring.path) as follower:
        assert len(follower.read().records) == 0
        ring.append_name(group_line(1, "world", (0, 1), "world"))
        _write(ring, 1, 40)
        assert follower.read(38).records["sequence"].tolist() == [38, 39, 40]
        assert follower.read().groups[1].ranks == (0, 1)
        np.testing.assert_array_equal(follower.read().records, read_ring(ring.path)[0].records)
        assert follower.newest(2).records["sequence"].tolist() == [39, 40]
        _write(ring, 41, form.NUM_SLOTS + 100)
        np.testing.assert_array_equal(follower.read().records, read_ring(ring.path)[0].records)
        assert follower.read(form.NUM_SLOTS + 99).records["sequence"].tolist() == [
            form.NUM_SLOTS + 99,
            form.NUM_SLOTS + 100,
        ]


def test_windows_of_a_ring_count_every_record_once_and_rings_are_sent_as_far_as_they_are_asked_for(
    folder: Path,
) -> None:
    ring = empty_ring(folder)
    ring.append_name(group_line(1, "world", (0, 1), "world"))
    watch = RingWatch(7, {0: ring.path, 1: folder / "0-1.ring"})
    told = []
    for first, last in ((1, 30), (31, 31), (32, 200)):
        _write(ring, first, last, open_last=True)
        told.append(watch.window(says_groups=False))
        _write(ring, last, last)
    told.append(watch.window(says_groups=True))
    summaries = [window.summaries[0] for window in told]
    assert [one.num_records for one in summaries] == [29, 1, 169, 1]
    assert [one.opened for one in summaries] == [0, 0, 0, -1]
    assert [one.groups is not None for one in summaries] == [True, False, False, True]
    assert {window.generation for window in told} == {7}
    parts: list[RingPart] = []
    watch.answer(ReadRings(generation=7, ranks=(0, 1), records=50), parts.append)
    watch.answer(ReadRings(generation=6, ranks=(0,), records=50), parts.append)
    (part,) = parts
    assert not watch.stands_still, "it has for very long"
    records = Unpacker(2).trace(part.trace, "node-0", {}).records
    assert records["sequence"].tolist() == list(range(151, 201))
    watch.close()


@pytest.mark.parametrize(("seconds", "stands_still"), [(0.0, False), (0.6, True), (20.0, False)])
def test_a_rank_that_has_just_stopped_to_begin_anything_is_looked_at_more_often(
    folder: Path, seconds: float, *, stands_still: bool
) -> None:
    ring = empty_ring(folder)
    ring.append_name(group_line(1, "world", (0, 1), "world"))
    _write(ring, 1, 3, open_last=True)
    watch = RingWatch(7, {0: ring.path})
    np.frombuffer(ring.memory, RECORD, offset=form.RECORDS_AT)["entered_ns"][2] = time.monotonic_ns() - round(
        seconds * 1e9
    )
    watch.window(says_groups=False)
    assert watch.stands_still is stands_still
    _write(ring, 4, 4)
    np.frombuffer(ring.memory, RECORD, offset=form.RECORDS_AT)["entered_ns"][3] = time.monotonic_ns()
    watch.window(says_groups=False)
    assert not watch.stands_still, "it goes on"
    watch.close()
