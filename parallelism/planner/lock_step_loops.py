"""Searches the waves of ranks that keep step: which block runs which wave, and how long every wave may take.

Numbers, NumPy arrays and tuples only (``compiling``); what bins, waves and blocks are is said in ``lock_step_filling``.
"""

from typing import NamedTuple

import numpy as np

from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.lock_step_filling import (
    CANDIDATES,
    NEVER,
    Bins,
    Integers,
    Problem,
    best_limit,
    fill,
    fits,
    last_limit,
)

_SMALLEST = 6
"""Degrees tried as the smallest, each at least twice the last."""
_MULTIPLIER, _INCREMENT, _MODULUS = 1_103_515_245, 12_345, 2**31  # random numbers that are the same everywhere


class Waves(NamedTuple):
    """Where everything runs; arrays as long as there are sequences."""

    bin_of: Integers
    """Of every sequence."""
    wave_of: Integers
    """Of every bin."""
    degree_of: Integers
    """Of every bin."""
    slow_of: Integers
    """Of every bin, the slow rank that runs it; -1: any of the others."""
    starts: Integers
    """First rank of the block of every wave."""
    sizes: Integers
    """Ranks of the block of every wave."""
    durations: Integers
    """Ticks that were allowed to every wave: what the search changes."""
    counts: Integers
    """How many bins and waves there are."""


@compiled
def no_waves(number: int, slow: int) -> Waves:
    """Room for the waves of so many sequences; a wave has bins for all slow ranks, also where these stay empty."""
    bins = number * (1 + slow)
    return Waves(
        np.zeros(number, np.int64),
        np.zeros(bins, np.int64),
        np.zeros(bins, np.int64),
        np.zeros(bins, np.int64),
        np.zeros(number, np.int64),
        np.zeros(number, np.int64),
        np.zeros(number, np.int64),
        np.zeros(2, np.int64),
    )


@compiled
def build(problem: Problem, target: int, wanted: Integers, waves: Waves) -> int:
    """Put every sequence into waves that end within ``target`` ticks; returns when they end, ``NEVER`` where it fails.

    Levels from wide to narrow: a block runs waves as long as the longest sequence left does not fit the next smaller block
    within the target, always the block that is free first. Waves take the limits ``wanted``, as far as these go, then the
    best of some.
    """
    n = len(problem.lengths)
    group = problem.blocks[len(problem.blocks) - 1]
    loads = np.zeros(problem.blocks[0] // group, np.int64)
    taken = np.zeros(n, np.int64)
    bins = Bins(
        np.zeros(problem.blocks[0], np.int64),
        np.zeros(problem.blocks[0], np.int64),
        np.zeros(problem.blocks[0], np.int64),
        np.zeros(problem.blocks[0], np.int64),
        np.zeros(problem.blocks[0], np.int64),
        np.zeros(problem.nodes.max() + 1, np.int64),
        np.zeros(n, np.int64),
        np.zeros(n, np.int64),
    )
    limits = np.zeros(CANDIDATES, np.int64)
    num_bins, num_waves, first, remaining, level = 0, 0, 0, n, 0
    tokens_left, area_left = problem.lengths.sum(), problem.areas.sum()
    while remaining > 0:
        while taken[first]:
            first += 1
        ranks = problem.blocks[level]
        is_last_level = level + 1 == len(problem.blocks)
        if not is_last_level and fits(problem, first, problem.blocks[level + 1], target - problem.fixed):
            level += 1
            continue
        per_block = ranks // group
        free, load = 0, NEVER
        for b in range(len(loads) // per_block):
            latest = loads[b * per_block : (b + 1) * per_block].max()
            if latest < load:
                free, load = b, latest
        block = (free * ranks, ranks)
        budget = target - load - problem.fixed
        limit = -1
        if per_block == len(loads) and tokens_left <= ranks * problem.capacity:
            limit = last_limit(problem, taken, first, block, budget, remaining, bins, area_left)
        if limit < 0 and num_waves < len(wanted):
            limit = min(wanted[num_waves], budget)
        if limit < 0:
            limit = best_limit(problem, taken, first, block, budget, bins, limits)
        number, used, height, area = fill(problem, taken, first, block, limit, False, bins)
        if limit < 0 or number == 0:
            return NEVER
        for j in range(number):
            i = bins.placed[j]
            taken[i] = 1
            tokens_left -= problem.lengths[i]
            waves.bin_of[i] = num_bins + bins.where[j]
        for b in range(used):
            waves.wave_of[num_bins + b] = num_waves
            waves.degree_of[num_bins + b] = problem.degrees[bins.degrees[b]]
            waves.slow_of[num_bins + b] = bins.slow[b]
        waves.starts[num_waves] = free * ranks
        waves.sizes[num_waves] = ranks
        waves.durations[num_waves] = limit
        loads[free * per_block : (free + 1) * per_block] = load + height + problem.fixed
        num_bins, num_waves = num_bins + used, num_waves + 1
        remaining -= number
        area_left -= area
    waves.counts[0] = num_bins
    waves.counts[1] = num_waves
    return loads.max()


@compiled
def _keep(best: Waves, found: Waves) -> None:
    best.bin_of[:] = found.bin_of
    best.wave_of[:] = found.wave_of
    best.degree_of[:] = found.degree_of
    best.slow_of[:] = found.slow_of
    best.starts[:] = found.starts
    best.sizes[:] = found.sizes
    best.durations[:] = found.durations
    best.counts[:] = found.counts


@compiled
def _with_smallest(problem: Problem, smallest: int) -> Problem:
    return Problem(
        problem.lengths,
        problem.degrees,
        problem.ticks_NK,
        problem.crossing_NK,
        problem.areas,
        problem.capacity,
        problem.fixed,
        problem.blocks,
        smallest,
        problem.nodes,
        problem.speeds,
    )


@compiled
def _lower_target(problem: Problem, bound: int, best_end: int, best: Waves, found: Waves) -> int:
    """Let the target fall by bisection between the bound and what was found; returns when ``best`` ends then."""
    nothing = np.zeros(0, np.int64)
    first = NEVER
    for target in (bound + bound // 16, bound + bound // 4, 2 * bound, 8 * bound, NEVER // 4):
        first = build(problem, target, nothing, found)
        if first < NEVER:
            break
    if first < best_end:
        best_end = first
        _keep(best, found)
    low = bound
    for _ in range(6):
        target = (low + min(best_end, 3 * low)) // 2
        if best_end - low <= bound // 200 or first >= NEVER:
            break
        end = build(problem, target, nothing, found)
        if end < best_end:
            best_end = end
            _keep(best, found)
        if end > target:
            low = target
    return best_end


@compiled
def search(problem: Problem, bound: int, effort: int) -> tuple[int, Waves]:
    """Waves that end early, and when they do, in ticks; ``NEVER`` where none were found.

    First the target falls, with rings as small as can be, then with somewhat larger ones, which are easier to fill. Then the
    durations of the waves found are changed at random, ``effort`` times, and what ends earlier is kept.
    """
    n = len(problem.lengths)
    slow = (problem.speeds < 1024).sum()
    best, found = no_waves(n, slow), no_waves(n, slow)
    best_end, chosen = NEVER, problem
    tries, last = 0, 0
    for smallest in range(len(problem.degrees)):
        if problem.degrees[smallest] < 2 * last:
            continue
        if tries == min(_SMALLEST, 1 + effort // 10) or best_end - bound <= bound // 128:
            break
        tries, last = tries + 1, problem.degrees[smallest]
        tried = _with_smallest(problem, smallest)
        end = _lower_target(tried, bound, best_end, best, found)
        if end < best_end:
            best_end, chosen = end, tried
    state = 1
    for _ in range(effort):
        if best_end - bound <= bound // 1000 or best_end >= NEVER:
            break
        count = best.counts[1]
        wanted = best.durations[:count].copy()
        for _ in range(2):
            state = (state * _MULTIPLIER + _INCREMENT) % _MODULUS
            wave = (state >> 8) % count
            state = (state * _MULTIPLIER + _INCREMENT) % _MODULUS
            widest = 200 if (state >> 20) % 2 else 700  # thousandths
            wanted[wave] += wanted[wave] // 1000 * ((state >> 8) % (2 * widest + 1) - widest)
        end = build(chosen, best_end - 1, wanted, found)
        if end < best_end:
            best_end = end
            _keep(best, found)
    return best_end, best


__all__ = ["Waves", "build", "search"]
