"""Every kind of fault is found and nobody else is named; innocents are left alone."""

import pytest

from evermesh.fault.detectors import Context, diagnose
from evermesh.fault.synthetic import JobShape, generate
from evermesh.fault.synthetic.faults import LongSequence, SlowRank, UnbalancedStage
from tests.fault.detectors.suite import FAULTS, INNOCENTS, draw, judge

_QUICK, _MANY = 12, 300


def _judge_all(kind: str, seeds: range) -> None:
    for seed in seeds:
        judged = judge(draw(kind, seed), seed)
        assert not judged.wrong, f"seed {seed}: {judged.wrong[0].text}"
        assert judged.found, f"seed {seed}: nothing was found of {draw(kind, seed)}"


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_found_and_placed(kind: str) -> None:
    _judge_all(kind, range(_QUICK))


@pytest.mark.parametrize("kind", INNOCENTS)
def test_nobody_is_blamed_without_reason(kind: str) -> None:
    _judge_all(kind, range(_QUICK))


@pytest.mark.soak
@pytest.mark.parametrize("kind", [*FAULTS, *INNOCENTS])
def test_many_jobs_of_every_kind(kind: str) -> None:
    _judge_all(kind, range(_QUICK, _MANY))


def test_what_the_plan_explains_is_nobodys_fault() -> None:
    shape = JobShape(dp=8)
    job = generate(shape, [SlowRank(3, 1.5)])
    assert [finding.rank for finding in diagnose(job.traces).findings] == [3]
    planned = {(rank, step): 1.5 if rank == 3 else 1.0 for rank in range(8) for step in range(1, 13)}
    diagnosed = diagnose(job.traces, Context(work_s=planned))
    assert not diagnosed.findings
    assert "rank 3" in diagnosed.exonerated[0]
    assert "plan" in diagnosed.exonerated[0]


def test_an_unbalanced_stage_is_told_and_not_blamed() -> None:
    diagnosed = diagnose(generate(JobShape(dp=2, tp=2, pp=3), [UnbalancedStage(1)]).traces)
    assert not diagnosed.findings
    assert "pipeline stage 1" in diagnosed.exonerated[0]


def test_a_slow_rank_is_found_among_uneven_jobs() -> None:
    job = generate(JobShape(dp=8, pp=2), [SlowRank(5, 1.8), UnbalancedStage(1), LongSequence(2, 6)])
    assert [finding.rank for finding in diagnose(job.traces).findings] == [5]
