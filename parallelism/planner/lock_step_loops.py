"""The loops of the lock-step planner: waves of bins, found by a search over the durations of waves.

Numbers, NumPy arrays and tuples only (``compiling``). A *bin* is a ring of some degree with the sequences that one
micro-batch of it holds. A *wave* is what the ranks of a block run at once. A *block* is one group of ranks that keep step,
or several neighbouring groups that rings join.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from evermesh.parallelism.planner.compiling import compiled

Integers = npt.NDArray[np.int64]
NEVER = 2**60
"""Ticks of what is not allowed."""
_CANDIDATES = 16
_SMALLEST = 6
"""Degrees tried as the smallest, each at least twice the last."""
_MULTIPLIER, _INCREMENT, _MODULUS = 1_103_515_245, 12_345, 2**31  # random numbers that are the same everywhere


class Problem(NamedTuple):
    """Of n sequences from long to short, and K degrees that rings may have, ascending."""

    lengths: Integers
    degrees: Integers
    ticks_NK: Integers
    """Of every member of a ring, without the fixed ticks of a micro-batch; ``NEVER``: not allowed."""
    crossing_NK: Integers
    """The same for a ring that is in several nodes though one could hold it."""
    areas: Integers
    """Least ticks of all members together."""
    capacity: int
    """Tokens of a member in a micro-batch."""
    fixed: int
    """Ticks of a micro-batch."""
    blocks: Integers
    """Ranks of a block at every level, falling: from all ranks to one group. Each divides the one before."""
    smallest: int
    """Index of the smallest degree that new rings get, where it does."""
    nodes: Integers
    """Of every rank, from 0."""
    speeds: Integers
    """Of every rank, in 1024ths; those below are in no rings and get micro-batches of their own that end in time."""


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


class _Bins(NamedTuple):
    """The bins of one wave that is tried: degrees as indices, ticks left, tokens left; and which sequence is where."""

    degrees: Integers
    ticks: Integers
    room: Integers
    slow: Integers
    crosses: Integers
    free_in: Integers
    """Ranks by node that are in no bin."""
    placed: Integers
    where: Integers


@compiled
def _open(bins: _Bins, at: int, degree: int, ticks: int, room: int, slow: int, crosses: int) -> None:
    bins.degrees[at] = degree
    bins.crosses[at] = crosses
    bins.ticks[at] = ticks
    bins.room[at] = room
    bins.slow[at] = slow


@compiled
def _fits(problem: Problem, sequence: int, ranks: int, limit: int) -> bool:
    """Whether a ring of at most so many ranks ends within the limit of ticks."""
    fits = False
    for k in range(len(problem.degrees)):
        fits = fits or (problem.degrees[k] <= ranks and problem.ticks_NK[sequence, k] <= limit)
    return fits


@compiled
def _node_for(members: int, free_in: Integers) -> int:
    """The fullest node with so many free ranks; -1: none."""
    best = -1
    for node in range(len(free_in)):
        if free_in[node] == members:
            return node
        if free_in[node] > members and (best < 0 or free_in[node] < free_in[best]):
            best = node
    return best


@compiled
def _open_ring(problem: Problem, sequence: int, free: int, limit: int, most: int, at: int, bins: _Bins) -> int:
    """Open the smallest ring within the limit of ticks, from the node that it fills best; returns its size, 0 if none can be.

    A ring takes ranks of one node if one of them, with at most ``most`` free ranks, has enough, else of the emptiest nodes.
    ``lock_step_places`` takes the same.
    """
    number = len(problem.degrees)
    for step in range(number):
        k = (problem.smallest + step) % number
        degree = problem.degrees[k]
        if degree > free and problem.smallest == 0:
            break  # all others are larger
        if degree > free:
            continue
        crosses = 1 if degree > most else 0
        ticks = problem.crossing_NK[sequence, k] if crosses else problem.ticks_NK[sequence, k]
        if ticks > limit:
            continue
        if crosses:
            while degree > 0:
                node = bins.free_in.argmax()
                taken = min(degree, bins.free_in[node])
                bins.free_in[node] -= taken
                degree -= taken
        else:
            bins.free_in[_node_for(degree, bins.free_in)] -= degree
        _open(bins, at, k, limit, problem.capacity, -1, crosses)
        return problem.degrees[k]
    return 0


@compiled
def _free_ranks(problem: Problem, block: tuple[int, int], limit: int, bins: _Bins) -> tuple[int, int]:
    """Count the ranks by node, and give slow ones bins of their own; returns how many of both there are."""
    used, free = 0, 0
    bins.free_in[:] = 0
    for rank in range(block[0], block[0] + block[1]):
        if problem.speeds[rank] < 1024:
            left = (limit + problem.fixed) * problem.speeds[rank] // 1024 - problem.fixed
            _open(bins, used, 0, left, problem.capacity, rank, 0)
            used += 1
        else:
            bins.free_in[problem.nodes[rank]] += 1
            free += 1
    return used, free


@compiled
def _fill(
    problem: Problem, taken: Integers, first: int, block: tuple[int, int], limit: int, everything: bool, bins: _Bins
) -> tuple[int, int, int, int]:
    """Fill a wave, longest first: a new ring as small as the limit of ticks allows, else where there is room.

    The smallest rings, which are the last to be opened, take turns; in larger ones a sequence goes where it costs the least
    area. Where much does not fit, some of what comes next is passed over; with ``everything``, the first that does not fit
    is the end. ``block`` is its first rank and how many it has. Returns how many sequences and bins the wave has, the ticks
    of its longest ring, and the area of its sequences.
    """
    lengths, degrees = problem.lengths, problem.degrees
    number, least_left, area, turn, step = 0, limit, 0, 0, 1
    used, free = _free_ranks(problem, block, limit, bins)
    most = bins.free_in.max()
    i = first - 1
    while i + step < len(lengths):
        i += step
        if taken[i]:
            step = 1
            continue
        best, opened = -1, 0
        if free > 0:
            opened = _open_ring(problem, i, free, limit, most, used, bins)
        if opened > 0:
            best, free, used = used, free - opened, used + 1
            most = bins.free_in.max() if opened > 1 or most > 1 else min(most, free)
        elif used > 0:
            best_area, smallest = NEVER, bins.degrees[used - 1]
            b = turn if turn < used else 0
            for _ in range(used):
                b = b - 1 if b > 0 else used - 1
                k = bins.degrees[b]
                ticks = problem.crossing_NK[i, k] if bins.crosses[b] else problem.ticks_NK[i, k]
                if ticks > bins.ticks[b] or (lengths[i] - 1) // degrees[k] >= bins.room[b]:
                    continue
                if degrees[k] * ticks < best_area:
                    best, best_area = b, degrees[k] * ticks
                if k == smallest:
                    best = turn = b
                    break
        if best < 0:
            if everything:
                break
            step += 1 + step // 8
            continue
        step = 1
        k = bins.degrees[best]
        bins.ticks[best] -= problem.crossing_NK[i, k] if bins.crosses[best] else problem.ticks_NK[i, k]
        bins.room[best] -= (lengths[i] + degrees[k] - 1) // degrees[k]
        bins.placed[number] = i
        bins.where[number] = best
        number += 1
        area += problem.areas[i]
        least_left = min(least_left, bins.ticks[best]) if bins.slow[best] < 0 else 0
    return number, used, limit - least_left, area


@compiled
def _candidates(problem: Problem, first: int, ranks: int, budget: int, found: Integers) -> int:
    """Limits of ticks worth trying for a wave whose longest sequence is ``first``; returns how many."""
    number = 0
    ticks, degrees = problem.ticks_NK[first], problem.degrees
    low, high, least = -1, -1, NEVER
    for k in range(len(degrees)):
        if degrees[k] <= ranks and ticks[k] < least:
            low = k if low < 0 else low
            high, least = k, ticks[k]
    if low >= 0:
        steps = min(6, high - low)
        for step in range(steps + 1):
            limit = ticks[low + (high - low) * step // max(1, steps)]
            if limit <= budget:
                found[number] = limit
                number += 1
    full = problem.areas[first] * problem.capacity // problem.lengths[first]
    for limit in (full, full * 3 // 4, budget, (budget - problem.fixed) // 2, (budget - 2 * problem.fixed) // 3):
        if least <= limit <= budget:
            found[number] = limit
            number += 1
    return number


@compiled
def _best_limit(
    problem: Problem, taken: Integers, first: int, block: tuple[int, int], budget: int, bins: _Bins, limits: Integers
) -> int:
    """The limit whose wave does most of the work that is necessary, per rank and tick."""
    best, best_rate = -1, -1.0
    for c in range(_candidates(problem, first, block[1], budget, limits)):
        _, _, height, area = _fill(problem, taken, first, block, limits[c], False, bins)
        rate = area / (block[1] * (height + problem.fixed))
        if rate > best_rate:
            best, best_rate = limits[c], rate
    return best


@compiled
def _last_limit(
    problem: Problem,
    taken: Integers,
    first: int,
    block: tuple[int, int],
    budget: int,
    remaining: int,
    bins: _Bins,
    area: int,
) -> int:
    """The least limit, to a 256th, with which everything that remains fits one wave; -1 where it exceeds the budget."""
    low, high, best, least = area // block[1], budget, -1, NEVER
    number, _, height, _ = _fill(problem, taken, first, block, high, True, bins)
    if number < remaining:
        return -1
    best, least, high = high, height, min(high, height)
    while high - low > (high >> 8) + 1:
        middle = (low + high) // 2
        number, _, height, _ = _fill(problem, taken, first, block, middle, True, bins)
        if number < remaining:
            low = middle
            continue
        high = min(middle, height)
        if height < least:
            best, least = middle, height
    return best


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
    bins = _Bins(
        np.zeros(problem.blocks[0], np.int64),
        np.zeros(problem.blocks[0], np.int64),
        np.zeros(problem.blocks[0], np.int64),
        np.zeros(problem.blocks[0], np.int64),
        np.zeros(problem.blocks[0], np.int64),
        np.zeros(problem.nodes.max() + 1, np.int64),
        np.zeros(n, np.int64),
        np.zeros(n, np.int64),
    )
    limits = np.zeros(_CANDIDATES, np.int64)
    num_bins, num_waves, first, remaining, level = 0, 0, 0, n, 0
    tokens_left, area_left = problem.lengths.sum(), problem.areas.sum()
    while remaining > 0:
        while taken[first]:
            first += 1
        ranks = problem.blocks[level]
        is_last_level = level + 1 == len(problem.blocks)
        if not is_last_level and _fits(problem, first, problem.blocks[level + 1], target - problem.fixed):
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
            limit = _last_limit(problem, taken, first, block, budget, remaining, bins, area_left)
        if limit < 0 and num_waves < len(wanted):
            limit = min(wanted[num_waves], budget)
        if limit < 0:
            limit = _best_limit(problem, taken, first, block, budget, bins, limits)
        number, used, height, area = _fill(problem, taken, first, block, limit, False, bins)
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


__all__ = ["NEVER", "Integers", "Problem", "Waves", "search"]
