"""Fills one wave of ranks that keep step, and says which durations of a wave are worth trying.

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
CANDIDATES = 16
"""At most so many durations of a wave are tried."""


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


class Bins(NamedTuple):
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
def _open(bins: Bins, at: int, degree: int, ticks: int, room: int, slow: int, crosses: int) -> None:
    bins.degrees[at] = degree
    bins.crosses[at] = crosses
    bins.ticks[at] = ticks
    bins.room[at] = room
    bins.slow[at] = slow


@compiled
def fits(problem: Problem, sequence: int, ranks: int, limit: int) -> bool:
    """Whether a ring of at most so many ranks ends within the limit of ticks."""
    found = False
    for k in range(len(problem.degrees)):
        found = found or (problem.degrees[k] <= ranks and problem.ticks_NK[sequence, k] <= limit)
    return found


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
def _open_ring(problem: Problem, sequence: int, free: int, limit: int, most: int, at: int, bins: Bins) -> int:
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
def _free_ranks(problem: Problem, block: tuple[int, int], limit: int, bins: Bins) -> tuple[int, int]:
    """Count the ranks by node, and give slow ones bins of their own; returns how many of both there are."""
    used, free = 0, 0
    bins.free_in[:] = 0
    for rank in range(block[0], block[0] + block[1]):
        if problem.speeds[rank] < 1024:
            # the limit may be almost for ever: divided first, it does not overflow
            left = (limit + problem.fixed) // 1024 * problem.speeds[rank] - problem.fixed
            _open(bins, used, 0, left, problem.capacity, rank, 0)
            used += 1
        else:
            bins.free_in[problem.nodes[rank]] += 1
            free += 1
    return used, free


@compiled
def fill(
    problem: Problem, taken: Integers, first: int, block: tuple[int, int], limit: int, everything: bool, bins: Bins
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
def best_limit(
    problem: Problem, taken: Integers, first: int, block: tuple[int, int], budget: int, bins: Bins, limits: Integers
) -> int:
    """The limit whose wave does most of the work that is necessary, per rank and tick."""
    best, best_rate = -1, -1.0
    for c in range(_candidates(problem, first, block[1], budget, limits)):
        _, _, height, area = fill(problem, taken, first, block, limits[c], False, bins)
        rate = area / (block[1] * max(1, height + problem.fixed))
        if rate > best_rate:
            best, best_rate = limits[c], rate
    return best


@compiled
def last_limit(
    problem: Problem,
    taken: Integers,
    first: int,
    block: tuple[int, int],
    budget: int,
    remaining: int,
    bins: Bins,
    area: int,
) -> int:
    """The least limit, to a 256th, with which everything that remains fits one wave; -1 where it exceeds the budget."""
    low, high, best, least = area // block[1], budget, -1, NEVER
    number, _, height, _ = fill(problem, taken, first, block, high, True, bins)
    if number < remaining:
        return -1
    best, least, high = high, height, min(high, height)
    while high - low > (high >> 8) + 1:
        middle = (low + high) // 2
        number, _, height, _ = fill(problem, taken, first, block, middle, True, bins)
        if number < remaining:
            low = middle
            continue
        high = min(middle, height)
        if height < least:
            best, least = middle, height
    return best


__all__ = ["CANDIDATES", "NEVER", "Bins", "Integers", "Problem", "best_limit", "fill", "fits", "last_limit"]
