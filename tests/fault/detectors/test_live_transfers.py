"""What is slow is found in windows as in whole rings, by a few records of some steps; innocents are left alone."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from evermesh.fault.detectors import Context, diagnose, kernels, kinds
from evermesh.fault.detectors.joining import Survey
from evermesh.fault.detectors.pacing import PaceWatch
from evermesh.fault.detectors.sampled import Samples
from evermesh.fault.detectors.sampling import Sampler
from evermesh.fault.detectors.streaming import Seen
from evermesh.fault.detectors.summaries import RankSummary
from evermesh.fault.events import Finding
from evermesh.fault.recorder.record import OPERATIONS
from evermesh.fault.synthetic import JobShape, generate
from evermesh.fault.synthetic.faults import Fault, SlowJob, SlowRank, SlowTransfer, UnevenSequences
from evermesh.launcher.watching.packing import Unpacker, pack_summary
from tests.fault.detectors.suite import INNOCENTS, draw
from tests.fault.detectors.windows import watched

_NETWORK = JobShape(dp=4, tp=8, pp=2, ranks_per_node=2, gradient_bytes=1 << 24)
_PIPELINE = JobShape(dp=4, pp=4, ranks_per_node=16, activation_bytes=1 << 20)
_SMALL = JobShape(dp=4, tp=2)


def _slow(findings: Sequence[Finding]) -> set[tuple[object, ...]]:
    found = (one for one in findings if one.kind in kinds.SLOWNESS)
    return {(one.kind, one.rank, one.node, one.link, one.group) for one in found}


def _ever(seen: Sequence[Seen]) -> set[tuple[object, ...]]:
    return set().union(*(_slow(one.findings) for one in seen))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["slow rank", "gradual", "slow network", "slow link", *INNOCENTS])
def test_windows_say_of_slowness_what_whole_rings_say(kind: str, seed: int) -> None:
    case = draw(kind, seed)
    traces = generate(case.shape, case.faults, seed, read_at=case.read_at).traces
    seen = list(watched(traces))
    whole = _slow(diagnose(traces).findings)
    assert _slow(seen[-1].findings) == whole
    assert _ever(seen) <= whole


@pytest.mark.parametrize(
    ("shape", "fault", "kind"),
    [
        (replace(_NETWORK, steps=100), SlowTransfer(3.0, senders=[6, 7]), kinds.SLOW_GROUP),
        (replace(_PIPELINE, steps=120), SlowTransfer(4.0, link=(3, 7)), kinds.SLOW_LINK),
        (replace(_SMALL, steps=30), SlowJob(1.5, 15), kinds.SLOW_JOB),
        (replace(_SMALL, steps=60, ranks_per_node=2), SlowTransfer(12.0, range(8), from_step=30), kinds.SLOW_JOB),
    ],
)
def test_a_few_records_of_some_steps_say_what_all_say(shape: JobShape, fault: Fault, kind: str) -> None:
    traces = generate(shape, [fault]).traces
    unpacker = Unpacker(shape.num_ranks)

    def on_the_wire(summaries: list[RankSummary]) -> list[RankSummary]:
        packed = [pack_summary(one, None, with_groups=True) for one in summaries]
        return [unpacker.summary(one, node_of[one.tail.rank], unpacker.groups(one.groups or ())) for one in packed]

    node_of = {trace.rank: trace.node for trace in traces}
    seen = list(watched(traces, windows=17, told=on_the_wire))
    whole = _slow(diagnose(traces).findings)
    assert {found[0] for found in whole} == {kind}
    assert _slow(seen[-1].findings) == whole
    assert _ever(seen) <= whole


def test_the_delay_matrix_between_nodes_is_what_messages_took() -> None:
    shape = JobShape(dp=4, pp=4, ranks_per_node=4, activation_bytes=1 << 26, steps=60)
    nodes = [f"node{number}" for number in range(4)]
    neighbours = {*pairwise(nodes), *pairwise(reversed(nodes))}
    for slow, ratio in ((None, 1.0), (("node1", "node2"), 4.0)):
        faults = [SlowTransfer(ratio, link=(4 + rank, 8 + rank)) for rank in range(4)] if slow else []
        seen = {(of.source, of.target): of for of in list(watched(generate(shape, faults).traces))[-1].delays}
        assert seen.keys() == neighbours, "stages send to the next and to the one before"
        assert all(of.ratio == pytest.approx(ratio if way == slow else 1.0, rel=0.2) for way, of in seen.items())
        assert min(of.messages for of in seen.values()) >= 24


def test_a_job_that_is_slower_than_it_was_long_ago_is_slow_and_no_other() -> None:
    shape = replace(_SMALL, steps=400)
    slow = generate(shape, [SlowJob(1.5, 200)]).traces
    seen = list(watched(slow, windows=80))
    assert not _slow(diagnose(slow).findings), "its newest steps are alike"
    [finding] = seen[-1].findings
    assert finding.kind == kinds.SLOW_JOB
    assert float(str(finding.evidence["ratio"])) == pytest.approx(1.5, rel=0.1)
    assert "mostly for computation" in finding.text
    assert not _ever(list(watched(generate(shape).traces, windows=80)))


def test_steps_that_plans_made_longer_are_not_slow_and_those_that_they_did_not_are() -> None:
    shape = replace(_SMALL, steps=40)
    uneven = UnevenSequences(0.01)
    slow = generate(shape, [uneven, SlowJob(1.6, 20)]).traces
    alike = dict.fromkeys(range(60), 1.0)
    assert {found[0] for found in _ever(list(watched(slow, Context(planned_s=alike))))} == {kinds.SLOW_JOB}
    longer = {step: 1.6 if step >= 20 else 1.0 for step in range(60)}
    assert not _ever(list(watched(slow, Context(planned_s=longer))))


def test_nothing_is_said_of_transfers_while_ranks_wait_for_processors() -> None:
    traces = generate(_NETWORK, [SlowTransfer(3.0, senders=[6, 7])]).traces
    assert _ever(list(watched(traces)))
    assert not _ever(list(watched(traces, Context(starved={0: 0.3}))))


def test_ranks_choose_the_same_collectives_whatever_windows_they_read_in() -> None:
    traces = generate(replace(_SMALL, steps=100), [SlowRank(1, 1.3)]).traces
    chosen = []
    for trace, windows in zip(traces[:2], (10, 13), strict=True):  # of one tensor-parallel group
        sampler = Sampler()
        parts = [sampler.choose(part) for part in np.array_split(trace.records, windows)]
        assert max(map(len, parts)) <= 64
        records = np.concatenate(parts)
        assert (np.diff(records["sequence"].astype(np.int64)) > 0).all()
        sums = records[(records["group"] == 2) & (records["operation"] == OPERATIONS.index("all_reduce"))]
        chosen.append(set(sums["number"][sums["step"] > 20].tolist()))
    shared = chosen[0] & chosen[1]
    assert len(shared) >= 0.5 * min(map(len, chosen)) > 10


def test_of_every_rank_the_newest_records_are_kept_once() -> None:
    samples = Samples(4)
    trace = generate(replace(_SMALL, steps=500)).traces[0]
    for part in np.array_split(trace.records, 40):
        samples.take(0, part)
        samples.take(0, part)
    assert sum(map(len, samples._of_rank[0])) < 1024
    np.testing.assert_array_equal(samples.of([0])[0], trace.records[-512:])


def test_steps_of_days_take_bounded_memory_and_the_first_are_not_forgotten() -> None:
    pace, random, size = PaceWatch(), np.random.default_rng(5), 64
    signatures = np.zeros((2, size), np.uint64)
    found: list[Finding] = []
    for first in range(1, 40_000, 40):
        of_step = np.ones((2, size, kernels.STEP_COLUMNS), np.int64)
        usual_ns = np.where(np.arange(first, first + size) < 30_000, 1e6, 1.4e6)
        of_step[:, :, kernels.TRAIN_NS] = usual_ns * random.normal(1, 0.02, (2, size))
        slots, queued_s = np.zeros((0, kernels.SLOT_COLUMNS), np.int64), np.zeros((2, size))
        survey = Survey(slots, of_step, signatures, first, np.full(2, -1), queued_s)
        found = pace.look(survey, np.full(size, np.nan), {})
        assert bool(found) == (first + size > 30_020) or 29_900 < first < 30_040
    assert len(pace._blocks.steps) <= 48
    assert float(str(found[0].evidence["ratio"])) == pytest.approx(1.4, abs=0.02)


def test_of_a_step_that_lasts_for_many_windows_the_first_of_every_kind_are_chosen_once() -> None:
    records = generate(replace(_SMALL, steps=3, micro_batches=30)).traces[0].records
    records = records[records["step"] == 2]
    whole = Sampler().choose(records)
    sampler = Sampler()
    parts = np.concatenate([sampler.choose(part) for part in np.array_split(records, 40)])
    np.testing.assert_array_equal(whole, parts)
    kinds_of = np.stack([records[name].astype(np.int64) for name in ("group", "operation", "peer")])
    _, counts = np.unique(kinds_of, axis=1, return_counts=True)
    assert len(whole) == np.minimum(counts, 8).sum() < len(records) / 4
