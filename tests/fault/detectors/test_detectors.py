"""What single detectors say, and when they say nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from evermesh.fault.detectors import Context, Offset, diagnose, kinds, planned_work
from evermesh.fault.events import Finding
from evermesh.fault.process_state import ProcessState
from evermesh.fault.recorder.record import NO_PEER, OPERATIONS, PHASES, RECORD, Flags, Group
from evermesh.fault.recorder.trace import RankTrace
from evermesh.fault.synthetic import Clock, JobShape, generate
from evermesh.fault.synthetic.faults import CommunicationHang, Hang, Pauses, Skip, SlowInput, SlowJob, SlowRank
from evermesh.fault.synthetic.shape import AXES
from evermesh.parallelism.collectives import Phase
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.planner import plan_batch
from evermesh.parallelism.simulator import micro_batch_s

_COST = CostModel(token_s=1e-5, pair_s=1e-9, ring_token_s=1e-6)


def _only(findings: Sequence[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def test_the_sentence_of_a_hang() -> None:
    job = generate(JobShape(dp=4), [Hang(3, 6)], wait_s=4.2)
    finding = _only(diagnose(job.traces).findings)
    assert finding.text == (
        "rank 3 (node node0) never entered all_reduce #11 of group world in step 6; ranks 0, 1, 2 wait for it since 4.2 s"
    )
    assert (finding.node, finding.group, finding.step) == ("node0", "world", 6)


@pytest.mark.parametrize(
    ("process", "text"),
    [
        (None, "its process does not run"),
        (ProcessState("T", 7, False), "its process is stopped"),
        (ProcessState("D", 7, False), "its process waits for a disk"),
    ],
)
def test_the_state_of_a_process_is_told(process: ProcessState | None, text: str) -> None:
    job = generate(JobShape(dp=4), [Hang(3, 6)])
    finding = _only(diagnose(job.traces, Context(processes={3: process})).findings)
    assert text in finding.text
    assert finding.confidence > 0.95


@pytest.mark.parametrize(("phase", "found"), [("checkpoint", 0), ("compile", 0), ("data", 1), ("train", 1)])
def test_a_declared_phase_may_last(phase: Phase, found: int) -> None:
    job = generate(JobShape(dp=4), [Hang(3, 6, phase=phase)], wait_s=60)
    assert len(diagnose(job.traces).findings) == found


def test_a_dead_process_is_told_in_every_phase() -> None:
    job = generate(JobShape(dp=4), [Hang(3, 6, phase="checkpoint")])
    assert _only(diagnose(job.traces, Context(processes={3: None})).findings).rank == 3


@pytest.mark.parametrize("process", [None, ProcessState("T", 7, False)])
def test_a_process_that_ended_inside_a_collective_is_told(process: ProcessState | None) -> None:
    job = generate(JobShape(dp=4), [CommunicationHang(2, 6)])
    assert _only(diagnose(job.traces).findings).kind == kinds.COMMUNICATION_HANG
    finding = _only(diagnose(job.traces, Context(processes={2: process, 1: ProcessState("S", 7, False)})).findings)
    assert (finding.kind, finding.rank) == (kinds.HANG, 2)


def test_a_rank_that_was_stopped_inside_of_what_the_other_side_has_finished_is_told() -> None:
    world, seconds = Group("world", (0, 1)), 1_000_000_000
    operations = {
        0: [("send", 0, 1), ("receive", 0, 1), ("receive", 1, 0)],
        1: [("send", 0, 1), ("receive", 0, 0)],
    }
    traces = []
    for rank, of_rank in operations.items():
        records = np.zeros(len(of_rank), RECORD)
        for row, (operation, number, is_over) in enumerate(of_rank):
            records[row]["sequence"], records[row]["number"], records[row]["step"] = row + 1, number, 1
            records[row]["operation"], records[row]["peer"] = OPERATIONS.index(operation), 1 - rank
            records[row]["entered_ns"] = (row + 1) * seconds
            records[row]["ended_ns"] = (row + 1) * seconds + 5 if is_over else 0
            records[row]["phase"], records[row]["flags"] = PHASES.index("train"), Flags.END_SEEN
        named = {1: world}
        records["group"] = 1
        traces.append(RankTrace(rank, "node0", 7 + rank, records, named, {}, 1, "train", 200 * seconds, 0))
    states = {0: ProcessState("S", 7, False), 1: ProcessState("T", 7, False)}
    finding = _only(diagnose(traces, Context(processes=states)).findings)
    assert (finding.kind, finding.rank) == (kinds.HANG, 1)
    assert "its process is stopped" in finding.text


def test_the_first_step_may_take_long() -> None:
    for wait_s, found in ((20.0, 0), (100.0, 1)):
        job = generate(JobShape(dp=4), [Hang(3, 1)], wait_s=wait_s)
        assert len(diagnose(job.traces).findings) == found


def test_detection_takes_longer_where_steps_do() -> None:
    for wait_s, layer_s, found in ((1.0, 1e-3, 1), (1.0, 0.2, 0), (8.0, 0.2, 1)):
        job = generate(JobShape(dp=4, layer_s=layer_s), [Hang(3, 9)], wait_s=wait_s)
        assert len(diagnose(job.traces).findings) == found, (wait_s, layer_s)


@pytest.mark.parametrize(
    ("wait_s", "apart_s", "on_one", "on_two"), [(0.6, 0.0, 1, 0), (0.4, 0.2, 0, 0), (0.8, 0.0, 1, 1)]
)
def test_when_rings_of_one_node_were_read_is_known_and_of_two_it_is_not(
    wait_s: float, apart_s: float, on_one: int, on_two: int
) -> None:
    for ranks_per_node, found in ((4, on_one), (2, on_two)):
        traces = generate(JobShape(dp=4, ranks_per_node=ranks_per_node), [Hang(3, 9)], wait_s=wait_s).traces
        read = [replace(one, read_ns=one.read_ns + round(apart_s * 1e9) * (one.rank == 0)) for one in traces]
        assert len(diagnose(read).findings) == found, ranks_per_node


@pytest.mark.parametrize("lost", [1, 3])
def test_ranks_without_records_are_told(lost: int) -> None:
    job = generate(JobShape(dp=4), [Hang(lost, 6)])
    finding = _only(diagnose([trace for trace in job.traces if trace.rank != lost]).findings)
    assert (finding.rank, finding.confidence) == (lost, 0.5)


def test_two_hung_ranks_are_two_findings() -> None:
    job = generate(JobShape(dp=8), [Hang(3, 6), Hang(5, 6)])
    assert {finding.rank for finding in diagnose(job.traces).findings} == {3, 5}


def test_many_groups_that_stand_still_are_one_finding() -> None:
    faults = [CommunicationHang(rank, 6) for rank in range(8)]
    finding = _only(diagnose(generate(JobShape(dp=2, tp=8), faults).traces).findings)
    assert finding.kind == kinds.COMMUNICATION_HANG
    assert "8 groups" in finding.text


def test_one_rank_that_waits_for_all_others_does_not_make_them_guilty() -> None:
    traces = list(generate(JobShape(dp=6), [Hang(rank, 9) for rank in range(5)]).traces)
    finding = _only(diagnose(traces).findings)
    assert (finding.kind, finding.rank) == (kinds.HANG, None)
    assert "only rank 5 is in" in finding.text


def _equal_collectives(counts: Mapping[int, Sequence[int]]) -> list[RankTrace]:
    """Ranks that do nothing but equal sums, so many in each step: nothing fails where somebody leaves one out."""
    size = len(counts)
    group = Group("dp0", tuple(range(size)), "dp")
    traces = []
    for rank, of_steps in counts.items():
        records = np.zeros(sum(of_steps), RECORD)
        number = np.arange(len(records))
        records["sequence"], records["number"] = number + 1, number
        records["entered_ns"] = 10**9 + number * 10**6 + rank
        records["ended_ns"] = 10**9 + number * 10**6 + 5 * 10**5
        records["num_bytes"], records["peer"] = 64, NO_PEER
        records["step"] = np.repeat(np.arange(len(of_steps)) + 1, of_steps)
        records["operation"], records["phase"] = OPERATIONS.index("all_reduce"), PHASES.index("train")
        records["flags"] = int(Flags.END_SEEN | Flags.BLOCKING)
        last = int(records["ended_ns"][-1])
        traces.append(RankTrace(rank, "a", rank, records, {0: group}, {0: ""}, len(of_steps), "train", last, 0))
    return traces


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize(("change", "kind"), [(-1, kinds.SKIPPED), (1, kinds.EXTRA)])
def test_an_unnoticed_collective_too_few_or_too_many_is_found_by_its_step(size: int, change: int, kind: str) -> None:
    counts = {rank: [4] * 8 for rank in range(size)}
    assert not diagnose(_equal_collectives(counts)).findings
    counts[1] = [4, 4, 4, 4 + change, 4, 4, 4, 4]
    finding = _only(diagnose(_equal_collectives(counts)).findings)
    assert (finding.kind, finding.rank, finding.step) == (kind, 1, 4)


def test_tags_that_race_blame_nobody() -> None:
    counts = {0: [4] * 8, 1: [4, 3, 5, 4, 4, 3, 5, 4], 2: [4] * 8, 3: [4, 4, 4, 3, 5, 4, 4, 4]}
    assert not diagnose(_equal_collectives(counts)).findings


@pytest.mark.parametrize(
    ("fault", "cause"),
    [(SlowRank(5, 1.5), "computes"), (SlowInput(5, 0.01), "input"), (Pauses(5, 0.03), "pauses")],
)
def test_causes_of_slowness_are_told_apart(fault: SlowRank | SlowInput | Pauses, cause: str) -> None:
    finding = _only(diagnose(generate(JobShape(dp=8), [fault]).traces).findings)
    assert (finding.kind, finding.rank, finding.evidence["cause"]) == (kinds.SLOW_RANK, 5, cause)


def _nameless(traces: Sequence[RankTrace]) -> list[RankTrace]:
    """As of a script, which gives no group a name."""
    return [
        replace(trace, groups={index: replace(group, axis="") for index, group in trace.groups.items()})
        for trace in traces
    ]


@pytest.mark.parametrize("fault", [SlowRank(5, 1.5), Pauses(5, 0.03), None])
def test_ranks_of_scripts_that_name_no_axis_are_compared_too(fault: SlowRank | Pauses | None) -> None:
    shape = JobShape(dp=4, tp=2, pp=2)
    found = diagnose(_nameless(generate(shape, [fault] if fault else []).traces)).findings
    assert [(one.kind, one.rank) for one in found] == ([(kinds.SLOW_RANK, 5)] if fault else [])


def test_a_node_all_of_whose_ranks_are_slow_is_one_finding() -> None:
    job = generate(JobShape(dp=16, ranks_per_node=4), [SlowRank(rank, 1.6) for rank in range(4, 8)])
    finding = _only(diagnose(job.traces).findings)
    assert (finding.kind, finding.node, finding.rank) == (kinds.SLOW_RANK, "node1", None)


def test_a_slower_job_blames_nobody() -> None:
    finding = _only(diagnose(generate(JobShape(dp=4), [SlowJob(1.6, 7)]).traces).findings)
    assert (finding.kind, finding.rank, finding.node, finding.link) == (kinds.SLOW_JOB, None, None, None)


def _without_ends(traces: Sequence[RankTrace]) -> list[RankTrace]:
    """As if only arrivals had been recorded."""
    changed = []
    for trace in traces:
        records = trace.records.copy()
        records["ended_ns"], records["flags"] = 0, 0
        changed.append(replace(trace, records=records))
    return changed


def test_lateness_is_all_that_arrivals_show_and_has_an_error() -> None:
    traces = _without_ends(generate(JobShape(dp=4, tp=2), [SlowRank(3, 2.0)]).traces)
    finding = _only(diagnose(traces).findings)
    assert (finding.kind, finding.rank, finding.evidence["cause"]) == (kinds.SLOW_RANK, 3, "late")
    assert "+-" in finding.text
    assert not diagnose(_without_ends(generate(JobShape(dp=4, tp=2)).traces)).findings


def test_lateness_within_the_error_of_the_clocks_blames_nobody() -> None:
    clocks = tuple(Clock(offset) for offset in (0, 3_000_000, -4_000_000, 1_000_000))
    shape = JobShape(dp=4, ranks_per_node=1, clocks=clocks)
    traces = _without_ends(generate(shape, [SlowRank(3, 2.0)]).traces)
    nodes = [f"node{node}" for node in range(4)]
    assert not diagnose(traces).findings  # nobody knows the clocks
    true = {node: Offset(clock.offset_ns, 10_000) for node, clock in zip(nodes, clocks, strict=True)}
    assert _only(diagnose(traces, Context(offsets=true)).findings).rank == 3
    vague = {node: Offset(offset.offset_ns, 20_000_000) for node, offset in true.items()}
    assert not diagnose(traces, Context(offsets=vague)).findings


def test_what_a_batch_plan_gave_a_rank_is_work_of_all_its_ranks() -> None:
    lengths = (4000, 400, 400, 400)
    layout = Layout(hdp=4, capacity=4096)
    plan = plan_batch(lengths, layout, _COST)
    work_s = planned_work(plan, _COST, 7, {hdp: (2 * hdp, 2 * hdp + 1) for hdp in range(4)})
    for hdp, micro_batches in enumerate(plan.ranks):
        seconds = sum(micro_batch_s(one, lengths, _COST) for one in micro_batches)
        assert work_s.get((2 * hdp, 7), 0) == work_s.get((2 * hdp + 1, 7), 0) == seconds


def test_clocks_that_differ_change_nothing() -> None:
    random = np.random.default_rng(0)
    clocks = tuple(Clock(int(random.integers(-(10**9), 10**9)), float(random.uniform(-200, 200))) for _ in range(4))
    for fault in (Hang(3, 6), Skip(3, 6), SlowRank(3, 1.6)):
        shape = JobShape(dp=4, tp=2, pp=2, ranks_per_node=4)
        here = diagnose(generate(shape, [fault], 3).traces).findings
        apart = diagnose(generate(replace(shape, clocks=clocks), [fault], 3).traces).findings
        assert [(one.kind, one.rank) for one in here] == [(one.kind, one.rank) for one in apart]


def test_a_process_that_was_stopped_behind_the_begin_of_a_message_is_the_one_that_is_waited_for() -> None:
    """Both have entered what the other side waits for, as in a ring whose messages move while the ranks compute."""
    group = Group("ring", (0, 1))
    traces = []
    for rank in range(2):
        records = np.zeros(2, RECORD)
        records["sequence"], records["entered_ns"] = (1, 2), 10**9
        records["operation"] = OPERATIONS.index("receive"), OPERATIONS.index("send")
        records["phase"], records["step"], records["peer"] = PHASES.index("train"), 7, 1 - rank
        records["flags"] = Flags.END_SEEN, 0
        traces.append(RankTrace(rank, "a", 7, records, {0: group}, {}, 7, "train", 90 * 10**9, 0))
    states = {0: ProcessState("S", 7, False), 1: ProcessState("T", 7, False)}
    finding = _only(diagnose(traces, Context(processes=states)).findings)
    assert (finding.kind, finding.rank) == (kinds.HANG, 1)
    assert "its process is stopped; rank 0 waits for it since 89.0 s" in finding.text
    alive = {rank: ProcessState("S", 7, False) for rank in range(2)}
    assert all(one.rank is None for one in diagnose(traces, Context(processes=alive)).findings)


def test_a_slow_group_of_two_ranks_is_the_link_between_them() -> None:
    job = generate(JobShape(dp=2, tp=4, steps=24, ranks_per_node=4))
    for trace in job.traces:
        if trace.rank % 4 == 1:
            of_group = trace.records["group"] == AXES.index("dp")
            trace.records["ended_ns"][of_group] += np.uint64(10**7)
    [found] = diagnose(job.traces).findings
    assert (found.kind, found.link, found.rank, found.node) == (kinds.SLOW_LINK, (1, 5), None, None)
    assert "all that passes in it is between ranks 1 and 5" in found.text
