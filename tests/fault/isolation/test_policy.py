"""What is decided about nodes: properties of every decision, the table of cases, and costs in simulated clusters."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evermesh.fault.cluster.identity import NodeIdentity
from evermesh.fault.cluster.records import Evidence
from evermesh.fault.detectors import kinds
from evermesh.fault.isolation import meanings
from evermesh.fault.isolation.config import IsolationConfig
from evermesh.fault.isolation.costs import JobCosts, Performance, costs_of
from evermesh.fault.isolation.deciding import Choice, Observed, Spent, decide
from evermesh.fault.isolation.meanings import MEANINGS, MOST
from evermesh.fault.isolation.suspicion import suspicion_of

NOW_S = 1_000_000.0
HOUR_S = 3600.0
CONFIG = IsolationConfig(mode="act")
JOB = JobCosts(regroup_s=20, restart_s=40, lost_work_s=60, nodes=64, spares=2, can_shrink_by=0, horizon_s=24 * HOUR_S)
SEVERITY = ("nothing", "watch", "degrade", "drain", "replace")
LATE = [kind for kind, meaning in MEANINGS.items() if meaning.source == "lateness"]
PROGRAM = [kind for kind, meaning in MEANINGS.items() if meaning.source == "program"]


def seen(kind: str, ago_s: float = 0.0, **changes: float) -> Evidence:
    return Evidence(time_s=NOW_S - ago_s, node=NodeIdentity(name="a/b"), kind=kind, **changes)


def choose(
    *evidence: Evidence, job: JobCosts = JOB, now_s: float = NOW_S, spent: Spent | None = None, **performance: object
) -> Choice:
    observed = Observed("node-7", evidence, Performance(**performance))  # type: ignore[arg-type]
    (choice,) = decide([observed], job, CONFIG, spent or Spent(nodes=66), now_s)
    return choice


KINDS = st.sampled_from([*MEANINGS, "a kind of tomorrow"])
EVIDENCE = st.lists(
    st.builds(
        seen,
        KINDS,
        st.floats(0, 40 * 86400.0),
        weight=st.floats(0, 1),
        confidence=st.floats(0, 1),
    ),
    max_size=12,
)
JOBS = st.builds(
    JobCosts,
    regroup_s=st.floats(0, 600),
    restart_s=st.floats(0, 600),
    lost_work_s=st.floats(0, 3600),
    nodes=st.integers(2, 2000),
    spares=st.integers(0, 3),
    can_shrink_by=st.integers(0, 3),
    horizon_s=st.none() | st.floats(1, 30 * 86400.0),
)
MEASURED = st.builds(
    Performance,
    slowdown=st.floats(1, 5),
    residual=st.floats(1, 2),
    degraded_s=st.none() | st.floats(0, 7200),
    is_used=st.booleans(),
    stands_still=st.booleans(),
)


@settings(deadline=None)
@given(EVIDENCE, KINDS, st.floats(0, 1))
def test_more_evidence_never_says_less(evidence: list[Evidence], kind: str, confidence: float) -> None:
    before, after = (suspicion_of(found, NOW_S) for found in (evidence, [*evidence, seen(kind, confidence=confidence)]))
    assert after.probability >= before.probability - 1e-12
    assert after.failures_per_h >= before.failures_per_h
    assert 0 <= before.probability < 1


@settings(deadline=None)
@given(EVIDENCE, st.floats(0, 400 * 86400.0))
def test_all_evidence_fades(evidence: list[Evidence], later_s: float) -> None:
    now, later, never = (suspicion_of(evidence, NOW_S + after_s) for after_s in (0.0, later_s, 1e9))
    assert later.probability <= now.probability + 1e-12
    assert later.failures_per_h <= now.failures_per_h
    assert never.probability < 1e-3
    assert suspicion_of([], NOW_S).probability == 0.0


def test_probabilities_are_those_of_the_formula() -> None:
    died = MEANINGS[meanings.PROCESS_DIED]
    twice = [seen(meanings.PROCESS_DIED), seen(meanings.PROCESS_DIED, died.half_life_s)]
    expected = 1 - (1 - died.precision) * math.sqrt(1 - died.precision)
    assert suspicion_of(twice, NOW_S).probability == pytest.approx(expected)
    both = suspicion_of([*twice, seen(kinds.SLOW_LINK, weight=0.5, confidence=0.8)], NOW_S)
    assert both.probability == pytest.approx(1 - (1 - expected) * (1 - 0.25 * 0.5 * 0.8))
    assert suspicion_of([seen(kinds.SLOW_RANK)] * 500, NOW_S).probability == pytest.approx(MOST["lateness"])


@settings(deadline=None)
@given(EVIDENCE, KINDS, JOBS, MEASURED)
def test_more_evidence_never_leads_to_less(
    evidence: list[Evidence], kind: str, job: JobCosts, measured: Performance
) -> None:
    def severity(*found: Evidence) -> int:
        (choice,) = decide([Observed("n", found, measured)], job, CONFIG, Spent(nodes=100), NOW_S)
        return SEVERITY.index(choice.action)

    assert severity(*evidence, seen(kind)) >= severity(*evidence)


@settings(deadline=None)
@given(st.lists(st.sampled_from([*LATE, *PROGRAM]), max_size=200), JOBS, MEASURED, st.floats(0, 2 * HOUR_S))
def test_nobody_is_set_aside_for_lateness_or_for_what_his_program_does(
    found: list[str], job: JobCosts, measured: Performance, ago_s: float
) -> None:
    """Unless the job was measured to be slowed down by the node after that had less to do for long."""
    evidence = tuple(seen(kind, ago_s * number / 200) for number, kind in enumerate(found))
    innocent = replace(measured, degraded_s=None)
    assert not decide([Observed("n", evidence, innocent)], job, CONFIG, Spent(nodes=100), NOW_S)[0].is_eviction
    shortly = replace(measured, degraded_s=CONFIG.persist_s / 2)
    assert not decide([Observed("n", evidence, shortly)], job, CONFIG, Spent(nodes=100), NOW_S)[0].is_eviction
    without = replace(measured, degraded_s=HOUR_S, residual=1.0, stands_still=False)
    for few in (job, replace(job, nodes=2, spares=1, regroup_s=0)):
        assert not decide([Observed("n", evidence, without)], few, CONFIG, Spent(nodes=100), NOW_S)[0].is_eviction


NODES = st.lists(st.tuples(EVIDENCE, MEASURED), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0, 1800), NODES), min_size=1, max_size=6),
    JOBS,
    st.integers(0, 3),
    st.sampled_from((0.0, 0.02, 0.5)),
    st.integers(1, 300),
)
def test_the_budget_is_never_exceeded(
    rounds: list[tuple[float, list[tuple[list[Evidence], Performance]]]],
    job: JobCosts,
    per_hour: int,
    share: float,
    nodes: int,
) -> None:
    config, now_s, times_s = IsolationConfig(per_hour=per_hour, share=share), NOW_S, list[float]()
    for after_s, observed in rounds:
        now_s += after_s
        spent = Spent(tuple(times_s), len(times_s), nodes)
        named = [Observed(f"n{number}", tuple(found), how) for number, (found, how) in enumerate(observed)]
        choices = decide(named, job, config, spent, now_s)
        left = sum(choice.is_eviction for choice in choices)
        assert left <= job.spares + job.can_shrink_by, "no more than the job can do without"
        times_s += [now_s] * left
        assert all(sum(0 <= end - time_s < HOUR_S for time_s in times_s) <= per_hour for end in times_s)
        assert len(times_s) <= max(1, int(share * nodes))


@settings(deadline=None)
@given(EVIDENCE, JOBS, MEASURED)
def test_what_is_done_is_the_cheapest_of_what_is_permitted(
    evidence: list[Evidence], job: JobCosts, measured: Performance
) -> None:
    """Against every action: none that is cheaper is permitted by the rules as the docstring has them."""
    (choice,) = decide([Observed("n", tuple(evidence), measured)], job, CONFIG, Spent(nodes=100), NOW_S)
    found = suspicion_of(evidence, NOW_S)
    if choice.action == "nothing":
        assert found.probability < 0.02
        return
    lateness, beside = found.by_source.get("lateness", 0.0), found.beside_lateness
    persists = lateness >= 0.05 and found.late_for_s >= CONFIG.persist_s
    others = any(value >= 0.05 for source, value in found.by_source.items() if source != "lateness")
    horizon_s = CONFIG.horizon_s if job.horizon_s is None else min(job.horizon_s, CONFIG.horizon_s)
    measured_gain = (
        persists
        and measured.degraded_s is not None
        and measured.degraded_s >= CONFIG.persist_s
        and found.probability * (measured.residual - 1) * horizon_s > 3 * choice.costs["drain"]
    )
    may_leave = (beside >= 0.5 or (persists and others) or measured_gain) and job.spares + job.can_shrink_by > 0
    may_be_slow = measured.is_used or measured.degraded_s is not None
    is_slow = may_be_slow and lateness >= 0.05 and measured.slowdown >= 1.1
    permitted = {
        "watch": not (measured.degraded_s is not None and is_slow),
        "degrade": is_slow,
        "drain": may_leave and not measured.stands_still,
        "replace": may_leave and (measured.stands_still or found.spoiled >= 0.5),
    }
    assert permitted[choice.action]
    for action, is_permitted in permitted.items():
        assert not is_permitted or choice.costs[choice.action] <= choice.costs[action]  # type: ignore[index]


SLOW = [seen(kinds.SLOW_RANK, ago_s) for ago_s in (0, 300, 700)]


@pytest.mark.parametrize(
    ("evidence", "performance", "action"),
    [
        ((), {}, "nothing"),
        ((seen(kinds.DEADLOCK),), {}, "nothing"),
        ((seen(meanings.PROCESS_DIED),), {}, "watch"),
        ((seen(kinds.SLOW_RANK),), {"slowdown": 1.05}, "watch"),
        ((seen(kinds.SLOW_RANK),), {"slowdown": 1.3}, "degrade"),
        ((*SLOW, seen(meanings.HEALTH_WARN)), {"slowdown": 1.3}, "drain"),
        (SLOW, {"slowdown": 1.3, "degraded_s": 900.0, "residual": 1.0}, "degrade"),
        (SLOW, {"slowdown": 1.3, "degraded_s": 900.0, "residual": 1.2}, "drain"),
        ((seen(kinds.SLOW_RANK),), {"slowdown": 1.3, "degraded_s": 900.0, "residual": 2.0}, "degrade"),
        ((seen(meanings.HEALTH_BAD),), {}, "drain"),
        ((seen("silent corruption"),), {}, "replace"),
        ((seen(kinds.HANG), seen(kinds.HANG, 60), seen(meanings.NODE_LOST)), {"stands_still": True}, "replace"),
        ((seen(kinds.HANG),), {"stands_still": True}, "watch"),
        ((seen(meanings.NODE_LOST, 60), seen(meanings.NODE_LOST, 7200)), {}, "drain"),
        ((seen(meanings.NODE_LOST, 60), seen(meanings.NODE_LOST, 60 * 86400)), {}, "watch"),
    ],
)
def test_cases(evidence: tuple[Evidence, ...], performance: dict[str, Any], action: str) -> None:
    choice = choose(*evidence, **performance)
    assert choice.action == action, choice.reason
    assert "node-7" in choice.reason
    if action not in ("nothing", "watch"):
        assert f"should cost {choice.costs[choice.action]:,.0f} s" in choice.reason


def test_what_is_held_back_is_told_with_the_numbers() -> None:
    bad = seen(meanings.HEALTH_BAD)
    spent = choose(bad, spent=Spent((NOW_S - 10, NOW_S - 20), 0, 200))
    assert (spent.action, spent.held_back) == (
        "watch",
        "drain is held back: 2 of 2 nodes that may be within an hour (per_hour) were set aside",
    )
    assert choose(bad, spent=Spent((), 4, 200)).held_back.endswith(
        "4 of 4 nodes that may be at a time (2% of 200) are set aside"
    )
    full = choose(bad, job=replace(JOB, spares=0, restart_s=3000))
    assert full.held_back == "drain is held back: no spare is left, and the job cannot go on with fewer nodes"


def test_missing_a_node_counts_where_no_spare_takes_its_place() -> None:
    few = replace(JOB, nodes=2, spares=0, can_shrink_by=1)
    twice = [seen(meanings.NODE_LOST, 60), seen(meanings.NODE_LOST, 4 * HOUR_S)]
    assert choose(*twice, job=few).action == "watch", "half of the job for hours is more than some restarts"
    assert choose(*twice, job=replace(few, spares=1)).action == "drain"
    with_spare, without = (
        costs_of(suspicion_of(twice, NOW_S), Performance(), replace(few, spares=spares), CONFIG)["drain"]
        for spares in (1, 0)
    )
    assert without - with_spare == pytest.approx(CONFIG.replacement_s)
