"""How fast and how right findings are.

Scale: 12,288 ranks (``DP``=192 x tp 8 x pp 8) with some 2,000 records each, of which one hangs and one is slow, on one core;
processor seconds, and the memory that was in use at most, records included. Streaming: the same in windows of 500 records per
rank and second, agents and controller together. Precision and recall: ``SEEDS`` (30) drawn jobs of every kind of fault and of
what only looks like one. Delay matrix: 64 nodes, 4 rings, 20 samples of every edge, 25 % jitter, 10 % heterogeneity for good.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evermesh.fault.detectors import diagnose
from evermesh.fault.detectors.delays import blame
from evermesh.fault.detectors.streaming import JobWatch
from evermesh.fault.detectors.summaries import RankSummary, RankWatch
from evermesh.fault.recorder.trace import RankTrace
from evermesh.fault.synthetic import JobShape, generate
from evermesh.fault.synthetic.faults import Hang, SlowRank
from tests.benchmarks.harness import Row, exact_row
from tests.fault.detectors.matrices import drawn, rings
from tests.fault.detectors.suite import FAULTS, INNOCENTS, draw, judge

_DP = int(os.environ.get("DP", "192"))
_SEEDS = int(os.environ.get("SEEDS", "30"))
_TRIALS = int(os.environ.get("TRIALS", "400"))
_HUNG, _SLOW = 300, 77
_PER_SECOND = 500


def run() -> list[Row]:
    """All of it."""
    shape = JobShape(dp=_DP, tp=8, pp=8, steps=33, micro_batches=5, layers=4)
    diagnose(generate(JobShape(dp=4, tp=2, pp=2)).traces)  # compiles
    traces = generate(shape, [SlowRank(_SLOW, 1.2), Hang(_HUNG, 33)]).traces
    return [*_scale(traces), *_streaming(traces), *_suite(), *_matrix()]


def _scale(traces: tuple[RankTrace, ...]) -> Iterator[Row]:
    count = sum(len(trace.records) for trace in traces)
    what = f"{len(traces):,} ranks, {count / 1e6:.1f} M records"
    Path("/proc/self/clear_refs").write_text("5")
    found, seconds = _measured(lambda: diagnose(traces))
    assert {finding.rank for finding in found.findings} == {_HUNG, _SLOW}, found.findings
    yield exact_row(f"diagnosis of {what}", seconds, "s of one core", goal=3.0)
    yield exact_row("most memory, records included", _peak_gb(), "GB", goal=2.5)


def _streaming(traces: tuple[RankTrace, ...]) -> Iterator[Row]:
    watches, job = [RankWatch() for _ in traces], JobWatch()
    of_agents, of_controller, count = [], [], 0
    for window in range(1, 4):
        of_window = [replace(trace, records=trace.records[: window * _PER_SECOND]) for trace in traces]
        summaries, agents_s = _measured(partial(_summaries, watches, of_window))
        _, controller_s = _measured(partial(job.join, summaries))
        of_agents.append(agents_s)
        of_controller.append(controller_s)
        count = sum(one.num_records for one in summaries)
    what = f"a second of {count / 1e6:.1f} M records"
    yield exact_row(f"{what}: all agents", min(of_agents[1:]), "s of one core")
    yield exact_row(f"{what}: controller", min(of_controller[1:]), "s of one core")
    both = min(of_agents[1:]) + min(of_controller[1:])
    yield exact_row(f"{what}: both", both, "cores", goal=2.0)


def _summaries(watches: list[RankWatch], traces: list[RankTrace]) -> list[RankSummary]:
    return [watch.summarise(trace) for watch, trace in zip(watches, traces, strict=True)]


def _suite() -> Iterator[Row]:
    found = wrong = 0
    for kind in FAULTS:
        judged = [judge(draw(kind, 10_000 + seed), 10_000 + seed) for seed in range(_SEEDS)]
        found += sum(one.found for one in judged)
        wrong += sum(len(one.wrong) for one in judged)
    blamed = sum(
        bool(judge(draw(kind, 10_000 + seed), 10_000 + seed).wrong) for kind in INNOCENTS for seed in range(_SEEDS)
    )
    jobs = len(FAULTS) * _SEEDS
    yield exact_row(f"recall, {len(FAULTS)} kinds of faults in {jobs} jobs", found / jobs, "share", goal=0.95)
    yield exact_row("precision of what is said of them", found / max(found + wrong, 1), "share", goal=0.99)
    yield exact_row(f"innocents blamed, of {len(INNOCENTS) * _SEEDS}", float(blamed), "jobs", goal=0.0)


def _matrix() -> Iterator[Row]:
    random = np.random.default_rng(0)
    cases = (
        ("source", 1.5, False, 0.95),
        ("destination", 1.5, False, 0.95),
        ("link", 2.0, False, 0.9),
        ("link", 2.0, True, 0.9),
    )
    for what, factor, with_history, goal in cases:
        right = 0
        for _ in range(_TRIALS):
            delays, (source, target), _ = drawn(random, rings(random, 64, 4), what, factor, with_history=with_history)
            blamed = blame(delays)
            is_named = blamed is not None and blamed.what == what and blamed.source == source
            right += is_named and (what != "link" or (blamed is not None and blamed.target == target))
        how = ", next to its history" if with_history else ""
        yield exact_row(f"{what} {factor} times as slow named{how}", right / _TRIALS, "share", goal=goal)
    for with_history in (False, True):
        matrices = (
            drawn(random, rings(random, 64, 4), "nothing", 1.0, with_history=with_history)[0]
            for _ in range(10 * _TRIALS)
        )
        alarms = sum(blame(matrix) is not None for matrix in matrices)
        how = ", next to its history" if with_history else ""
        yield exact_row(f"false alarms{how}", alarms / (10 * _TRIALS), "share", goal=0.001)


def _measured(work: Callable[[], Any]) -> tuple[Any, float]:
    started_s = time.process_time()
    return work(), time.process_time() - started_s


def _peak_gb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e6 * 1.024 for line in lines if line.startswith("VmHWM"))
