"""What is known of ranks besides their records: processes that ended, processors, connections, clocks."""

import os
import shutil
import socket
from collections.abc import Sequence
from dataclasses import replace

from evermesh.fault.connections import Connection, connections_of
from evermesh.fault.detectors import Context, diagnose, kinds
from evermesh.fault.detectors.clock_jumps import ClockWatch
from evermesh.fault.detectors.links import LinkWatch
from evermesh.fault.process_state import ProcessState
from evermesh.fault.processors import QueueWatch
from evermesh.fault.recorder.record import Flags
from evermesh.fault.recorder.trace import RankTrace
from evermesh.fault.synthetic import JobShape, generate
from evermesh.fault.synthetic.faults import Hang, SlowRank

_RUNS = ProcessState("R", 0, False)
_SHAPE = JobShape(dp=4, ranks_per_node=2)


def _failed(trace: RankTrace) -> RankTrace:
    records = trace.records.copy()
    records["flags"][-1] |= int(Flags.FAILED | Flags.END_SEEN)
    records["ended_ns"][-1] = trace.read_ns
    return replace(trace, records=records)


def test_of_ranks_that_end_together_the_one_is_named_to_which_nothing_had_happened() -> None:
    waiting = generate(_SHAPE, [Hang(2, 6)]).traces
    traces = [trace if trace.rank == 2 else _failed(trace) for trace in waiting]
    findings = diagnose(traces, Context(processes=dict.fromkeys(range(4)))).findings
    assert [(one.kind, one.rank) for one in findings] == [(kinds.HANG, 2)]
    assert "does not run" in findings[0].text


def test_ranks_that_end_behind_their_last_step_are_no_finding() -> None:
    traces = generate(_SHAPE).traces
    assert not diagnose(traces, Context(processes=dict.fromkeys(range(4)))).findings
    running = {rank: _RUNS if rank else None for rank in range(4)}
    assert not diagnose(traces, Context(processes=running)).findings


def test_a_rank_without_a_processor_is_no_hang_yet_and_not_slow() -> None:
    hanging = generate(_SHAPE, [Hang(2, 6)]).traces
    starved = Context(starved={rank: 0.9 if rank == 2 else 0.0 for rank in range(4)})
    [found] = diagnose(hanging).findings
    waited_s = float(str(found.evidence["waited_s"]))
    soon = [replace(one, read_ns=one.read_ns - round((waited_s - 1.2) * 1e9)) for one in hanging]
    assert [one.rank for one in diagnose(soon).findings] == [2]
    diagnosed = diagnose(soon, starved)
    assert not diagnosed.findings
    assert "rank 2" in diagnosed.exonerated[0]
    assert [one.rank for one in diagnose(hanging, starved).findings] == [2], "but it is none for ever"
    slow = generate(_SHAPE, [SlowRank(2, 1.5)]).traces
    assert [one.rank for one in diagnose(slow).findings] == [2]
    assert not diagnose(slow, starved).findings


def test_a_declared_checkpoint_is_waited_for_and_told() -> None:
    traces = generate(_SHAPE, [Hang(2, 6)]).traces
    saving = [replace(trace, phase="checkpoint") if trace.rank == 2 else trace for trace in traces]
    diagnosed = diagnose(saving)
    assert not diagnosed.findings
    assert "rank 2 (node node1) is in phase checkpoint" in diagnosed.exonerated[0]


def _ring(size: int, held: Sequence[tuple[int, int]], resent: int = 0) -> dict[int, list[Connection]]:
    """Connections of all ranks with all others; on ``held`` something waits."""
    found: dict[int, list[Connection]] = {rank: [] for rank in range(size)}
    for one in range(size):
        for other in range(size):
            if one != other:
                waits = (one, other) in held
                ends = f"{one}:{other}", f"{other}:{one}"
                found[one].append(Connection(*ends, 100_000 if waits else 0, resent if waits else 0, 1448))
    return found


def test_a_way_that_holds_something_most_of_the_time_is_slow() -> None:
    watch, traces = LinkWatch(), generate(_SHAPE).traces
    for look in range(20):
        watch.look(_ring(4, [(1, 3)] if look % 2 else [(0, 2)] if look == 4 else []))
    [found] = watch.find_slow(traces)
    assert (found.kind, found.link) == (kinds.SLOW_LINK, (1, 3))
    assert not watch.cut


def test_ways_that_are_alike_and_a_way_without_others_blame_nobody() -> None:
    for size, held in ((4, [(0, 1), (2, 3)]), (2, [(0, 1)])):
        watch = LinkWatch()
        for _ in range(20):
            watch.look(_ring(size, held))
        assert not watch.find_slow(generate(_SHAPE).traces)


def test_a_way_on_which_the_same_is_sent_again_is_cut_until_it_arrives() -> None:
    watch = LinkWatch()
    watch.look(_ring(4, [(2, 0)], resent=3))
    assert watch.cut == {(2, 0)}
    for _ in range(20):
        watch.look(_ring(4, [(2, 0)], resent=3))
    assert not watch.find_slow(generate(_SHAPE).traces), "what is cut is not slow"
    watch.look(_ring(4, []))
    assert not watch.cut


def test_connections_of_a_process_are_seen_with_what_waits_in_them() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as near:
        far, _ = server.accept()
        with far:
            near.sendall(b"x" * 1000)
            found = {one.local: one for one in connections_of([os.getpid()]).get(os.getpid(), ())}
            if shutil.which("ss") is None:
                assert not found
                return
            ends = [":".join(map(str, end.getsockname())) for end in (near, far)]
            assert found[ends[0]].remote == ends[1]
            assert found[ends[1]].remote == ends[0]
            assert found[ends[0]].segment_bytes > 0


def test_only_a_clock_that_most_ranks_of_a_node_see_set_is_told() -> None:
    watch, traces = ClockWatch(), generate(JobShape(dp=6, ranks_per_node=3)).traces
    assert not list(watch.look(traces))

    def ahead(ranks: Sequence[int], seconds: float) -> list[RankTrace]:
        more_ns = round(seconds * 1e9)
        return [
            replace(one, wall_offset_ns=one.wall_offset_ns + more_ns) if one.rank in ranks else one for one in traces
        ]

    assert not list(watch.look(ahead([0], 5.0))), "one was interrupted between two readings"
    [found] = watch.look(ahead([3, 4, 5], -2.5))
    assert (found.kind, found.node) == (kinds.CLOCK_JUMP, "node1")
    assert "back by 2.50 s" in found.text


def test_time_in_the_queue_of_a_processor_is_a_share() -> None:
    watch = QueueWatch()
    assert watch.look(os.getpid()) == 0.0, "nobody knows yet"
    assert 0.0 <= watch.look(os.getpid()) <= 1.0
    assert watch.look(2**22 + 1) == 0.0
