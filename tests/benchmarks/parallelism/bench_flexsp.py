"""Our lock-step planner under FlexSP's costs and rules against FlexSP's integer program: predicted times and planning times.

64 GPUs, batches of 512 sequences of Wikipedia with at most 192 Ki tokens. EVERMESH_DUEL is the number of batches (3; the
tables in docs/decisions have 40), EVERMESH_DUEL_S the limit of one integer program in seconds (10, as in its code). The
programs of a batch are solved one after the other; its authors solve them at the same time on the CPUs of all nodes. They are
solved twice: as published by SCIP, which starts from a plan with one size of groups; and in FlexSP's favour by HiGHS with
rows that take equal solutions out, and the better of that and the best plan with one size. EVERMESH_DUEL_SCIP=0 leaves SCIP
out.
"""

import os
import statistics
import time
from collections.abc import Sequence

import numpy as np

from evermesh.parallelism.planner.lock_step_filling import NEVER, Integers, Problem
from evermesh.parallelism.planner.lock_step_loops import Waves, search
from tests.benchmarks.harness import Row, exact_row
from tests.benchmarks.parallelism import flexsp
from tests.benchmarks.parallelism.lengths import wikipedia

BATCHES, LIMIT_S = int(os.environ.get("EVERMESH_DUEL", "3")), float(os.environ.get("EVERMESH_DUEL_S", "10"))
SCIP = os.environ.get("EVERMESH_DUEL_SCIP", "1") != "0"
SEQUENCES, CONTEXT, EFFORT = 512, 192 * 1024, 150
_TICKS_PER_MS = 1e6


def run() -> list[Row]:
    """Times of a step over its bound, of all batches, and how ours compare with the others'."""
    source, batches = wikipedia(BATCHES, SEQUENCES, CONTEXT)
    our_plan(batches[0])  # compiles
    ours, seconds = zip(*(_timed(lengths) for lengths in batches), strict=True)
    programs, program_s, solved = zip(*(_program(lengths) for lengths in batches), strict=True)
    adaptive = [_checked_ms(flexsp.adaptive_plan(lengths), lengths) for lengths in batches]
    static = [_checked_ms(flexsp.static_plan(lengths), lengths) for lengths in batches]
    flexsps = [min(both) for both in zip(programs, adaptive, strict=True)]
    bounds = [flexsp.bound_ms(lengths) for lengths in batches]
    published = [_program(lengths, flexsp.by_scip)[0] for lengths in batches] if SCIP else []
    peers = {
        "FlexSP's program or the best single size": flexsps,
        "FlexSP's program, HiGHS": programs,
        "best single size": adaptive,
        "groups of 64": static,
    }
    rows = [
        exact_row(
            f"step over bound, median, {source}, {len(batches)} batches",
            statistics.median(_over(ours, bounds)),
            "",
            peer=peer,
            peer_value=statistics.median(_over(values, bounds)),
        )
        for peer, values in peers.items()
    ]
    if SCIP:
        rows += _of_published(_over(published, ours), _over(published, bounds))
        rows += _of_what_is_possible("SCIP", published, ours, bounds)
    ratios = _over(flexsps, ours)
    rows += _of_what_is_possible("better of both", flexsps, ours, bounds)
    return [
        *rows,
        exact_row("step over bound, worst", max(_over(ours, bounds)), ""),
        exact_row("FlexSP's step over ours, median", statistics.median(ratios), "", goal=1.1),
        exact_row("FlexSP's step over ours, least", min(ratios), "", goal=1.0),
        exact_row("FlexSP's step over its bound, median", statistics.median(_over(flexsps, bounds)), ""),
        exact_row(
            "planning a batch, median",
            statistics.median(seconds),
            "s",
            goal=0.02,
            peer="FlexSP's program, HiGHS",
            peer_value=statistics.median(program_s),
        ),
        exact_row("programs solved per batch", statistics.mean(solved), ""),
    ]


def _of_published(over_ours: Sequence[float], over_bounds: Sequence[float]) -> list[Row]:
    """FlexSP as published, whose program SCIP solves."""
    return [
        exact_row("FlexSP's step, SCIP, over ours, median", statistics.median(over_ours), "", goal=1.1),
        exact_row("FlexSP's step, SCIP, over ours, least", min(over_ours), "", goal=1.0),
        exact_row("FlexSP's step, SCIP, over its bound, median", statistics.median(over_bounds), ""),
    ]


def _of_what_is_possible(
    solver: str, theirs: Sequence[float], ours: Sequence[float], bounds: Sequence[float]
) -> list[Row]:
    """What the best of all plans could win in every batch: FlexSP's step over the bound, which no plan is faster than."""
    possible, won = _over(theirs, bounds), _over(theirs, ours)
    rows = [
        exact_row(
            f"batch {batch}: FlexSP's step, {solver}, over ours, beside over the bound",
            of_ours,
            "",
            peer="any plan, at most",
            peer_value=of_bound,
        )
        for batch, (of_ours, of_bound) in enumerate(zip(won, possible, strict=True))
    ]
    wishes = (
        exact_row(
            f"batches in which a plan may be {percent} % better than FlexSP's, {solver}; ours is in",
            sum(one >= 1 + percent / 100 for one in won),
            f"of {len(won)}",
            peer="any plan, at most",
            peer_value=sum(one >= 1 + percent / 100 for one in possible),
        )
        for percent in (5, 10)
    )
    median = exact_row(
        f"FlexSP's step, {solver}, over ours, median, beside over the bound",
        statistics.median(won),
        "",
        goal=1.1,
        peer="any plan, at most",
        peer_value=statistics.median(possible),
    )
    return [*rows, *wishes, median]


def our_plan(lengths: Sequence[int]) -> list[flexsp.MicroBatch]:
    """What our search makes of FlexSP's costs: a table for groups of a power of two, all GPUs in step."""
    ordered = np.array(sorted(lengths, reverse=True), np.int64)
    found = search(problem := _problem(ordered), int(problem.areas.sum() // flexsp.GPUS), EFFORT)[1]
    return _micro_batches(found, ordered)


def _problem(ordered: Integers) -> Problem:
    degrees = np.array(flexsp.SIZES, np.int64)
    bandwidths = np.array([flexsp.BANDWIDTH_GBS[size] for size in flexsp.SIZES])
    whole_ms = flexsp.PAIR_MS * ordered.astype(float) ** 2 + flexsp.TOKEN_MS * ordered
    ms_NK = (whole_ms[:, None] + flexsp.EXCHANGED_MB * ordered[:, None] / bandwidths) / degrees
    ticks_NK = np.where(
        ordered[:, None] <= flexsp.CAPACITY * degrees, np.rint(ms_NK * _TICKS_PER_MS).astype(np.int64), NEVER
    )
    return Problem(
        lengths=ordered * flexsp.GPUS,  # a member's share is rounded up to a token; here it may be a 64th
        degrees=degrees,
        ticks_NK=ticks_NK,
        crossing_NK=ticks_NK,
        areas=(np.minimum(ticks_NK, NEVER // degrees) * degrees).min(1),
        capacity=flexsp.CAPACITY * flexsp.GPUS,
        fixed=int(flexsp.FIXED_MS * _TICKS_PER_MS),
        blocks=np.array([flexsp.GPUS], np.int64),
        smallest=0,
        nodes=np.zeros(flexsp.GPUS, np.int64),  # costs say what a group takes, wherever it is
        speeds=np.full(flexsp.GPUS, 1024, np.int64),
    )


def _micro_batches(found: Waves, ordered: Integers) -> list[flexsp.MicroBatch]:
    num_bins, num_waves = found.counts.tolist()
    contents: list[list[int]] = [[] for _ in range(num_bins)]
    for length, at in zip(ordered.tolist(), found.bin_of.tolist(), strict=True):
        contents[at].append(length)
    plan: list[flexsp.MicroBatch] = [[] for _ in range(num_waves)]
    for at, of_bin in enumerate(contents):
        plan[found.wave_of[at]].append((int(found.degree_of[at]), of_bin))
    return plan


def _timed(lengths: Sequence[int]) -> tuple[float, float]:
    started = time.thread_time()
    plan = our_plan(lengths)
    seconds = time.thread_time() - started
    return _checked_ms(plan, lengths), seconds


def _program(lengths: Sequence[int], solver: flexsp.Solver = flexsp.by_highs) -> tuple[float, float, int]:
    """Milliseconds of a step, seconds of solving, programs; where none is solved in time, the best single size runs."""
    started = time.monotonic()
    plan, solved = flexsp.flexsp_plan(lengths, LIMIT_S, solver)
    return _checked_ms(plan or flexsp.adaptive_plan(lengths), lengths), time.monotonic() - started, solved


def _checked_ms(plan: list[flexsp.MicroBatch] | None, lengths: Sequence[int]) -> float:
    assert plan is not None, "groups of this size cannot hold the batch"
    flexsp.check(plan, lengths)
    return sum(map(flexsp.micro_batch_ms, plan))


def _over(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [value / other for value, other in zip(values, others, strict=True)]
