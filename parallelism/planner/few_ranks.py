"""Plans for few ranks, near the optimum: a search over the sizes of rings and the order in which they are placed.

On few ranks a ring may have any members, so that a gap is rarely needed; and there is time to try thousands of plans. The
search is simulated annealing (Kirkpatrick et al., Science 1983) with a fixed sequence of pseudo-random numbers.
"""

import numpy as np

from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.costs import best_sharing, is_recomputed, ticks
from evermesh.parallelism.planner.filling import Filling, Slots, fill, level, slots_between
from evermesh.parallelism.planner.problem import Problem
from evermesh.parallelism.planner.rings import FOREVER, Integers, Rings, ring_ticks, scaled

MOST_RANKS = 16
"""Pools of more ranks are planned by runs of neighbours alone."""
_HEAT, _ROUNDS = 6, 4
"""Percent of the bound by which a plan may be worse than the one before, at the beginning of the search; and how often it
cools down, each time from the best plan so far and from half of the heat."""
_EARLY_HEAT, _EARLY_ROUNDS = 24, 6
"""The same where all sequences are placed one by one."""
EFFORT = 2_000_000
"""Of all searches together: plans tried, times what one takes; some 50 ms."""
_MOST_PLACED = 32
"""Sequences up to which whole ones may be placed one by one."""
_LEVELLING = 2_000
"""Comparisons to spend on exchanges for each plan tried."""


@compiled
def search(
    problem: Problem, alone: Integers, bound: int, pack: int, sizes: Integers, one_by_one: bool, effort: int
) -> tuple[Rings, Slots, Filling, int]:
    """The best plan found from rings of these ``sizes`` (of every sequence; 1: whole): rings, slots, filling, and its end.

    With ``one_by_one`` few whole sequences are placed like rings, each in a micro-batch of its own; else they are packed.
    """
    ranks, count = len(problem.slowness), len(problem.lengths)
    smallest = (problem.lengths + problem.costs.capacity - 1) // problem.costs.capacity
    order, sizes = np.arange(count), sizes.copy()
    best_order, best_sizes = order, sizes
    end = attempt(problem, alone, bound, pack, sizes, order, one_by_one)[3]
    best = end
    durations, speed = _durations(problem, smallest), (1.0 / problem.slowness).sum()
    areas = durations * np.arange(ranks + 1)
    areas[:, 1] = np.minimum(areas[:, 1], alone)
    # where nothing is packed, the end is known without the plan, so that many more can be tried
    early = one_by_one and _places_all(problem)
    time, busy = np.empty(count + 2, np.int64), np.empty(count + 2, np.int64)
    heat, rounds = (_EARLY_HEAT, _EARLY_ROUNDS) if early else (_HEAT, _ROUNDS)
    one_try = 3 * count if early else 6 * count + 8 * ranks + 60
    spent, state, before = 0, 12345, 0
    while spent < effort and best * 2000 > bound * 2001:
        # the margin for worse plans shrinks from some percent to nothing, in every round
        cooled = spent * rounds * 1024 // effort
        if cooled // 1024 > before:
            before, end, order, sizes = cooled // 1024, best, best_order, best_sizes
        new_order, new_sizes = order.copy(), sizes.copy()
        state = _change(new_order, new_sizes, smallest, ranks, state)
        left = 1024 - cooled % 1024
        state = _next(state)
        most = end + (bound * (heat >> cooled // 1024) // 100) * left // 1024 * left // 1024 * (state % 1024) // 1024
        spent += count + 10
        area = np.int64(0)
        for sequence in range(count):
            area += areas[sequence, new_sizes[sequence]]
        if area > speed * most:
            continue  # even without a gap these sizes end later
        spent += one_try
        if early:
            found = _early_end(durations, new_order, new_sizes, time, busy)
        else:
            found = attempt(problem, alone, bound, pack, new_sizes, new_order, one_by_one)[3]
        if found <= most:
            end, order, sizes = found, new_order, new_sizes
            if found < best:
                best, best_order, best_sizes = found, order, sizes
    return attempt(problem, alone, bound, pack, best_sizes, best_order, one_by_one)


@compiled
def _places_all(problem: Problem) -> bool:
    """Whether whole sequences may be placed one by one: there are few, and ranks are all alike."""
    alike = problem.slowness.min() == problem.slowness.max() and problem.node_of[0] == problem.node_of[-1]
    return alike and len(problem.lengths) <= _MOST_PLACED


@compiled
def _durations(problem: Problem, smallest: Integers) -> Integers:
    """The time of every sequence on a ring of each size of ranks that are alike, with its micro-batch, [N, R + 1]."""
    ranks, count = len(problem.slowness), len(problem.lengths)
    durations = np.zeros((count, ranks + 1), np.int64)
    for sequence in range(count):
        length = problem.lengths[sequence]
        for size in range(smallest[sequence], ranks + 1):
            duration = ring_ticks(problem.costs, length, size, problem.node_size, False)
            durations[sequence, size] = scaled(duration, problem.slowness.min())
    return durations


@compiled
def _early_end(durations: Integers, order: Integers, sizes: Integers, time: Integers, busy: Integers) -> int:
    """When ``_place_early`` lets the last ring end.

    Keeps so many ranks ``busy`` from each ``time`` to the next; behind the last one all are free. Both are scratch.
    """
    ranks, count, last = durations.shape[1] - 1, 1, np.int64(0)
    time[0], busy[0] = 0, 0
    for sequence in order:
        size = sizes[sequence]
        duration = durations[sequence, size]
        first, after = 0, 0
        while True:
            while busy[first] + size > ranks:
                first += 1
            stop, after = time[first] + duration, first + 1
            while after < count and time[after] < stop and busy[after] + size <= ranks:
                after += 1
            if after == count or time[after] >= stop:
                break
            first = after
        if after == count or time[after] > stop:
            for k in range(count, after, -1):
                time[k], busy[k] = time[k - 1], busy[k - 1]
            time[after], busy[after] = stop, busy[after - 1]
            count += 1
        busy[first:after] += size
        last = max(last, stop)
    return int(last)


@compiled
def _change(order: Integers, sizes: Integers, smallest: Integers, ranks: int, state: int) -> int:
    """Let two sequences change places in the order, or sizes, or give one another size; returns the new random state.

    Sizes are exchanged because a plan in which one more or one less is shared is mostly much worse than either.
    """
    count = len(order)
    state = _next(state)
    kind = state % 4
    state = _next(state)
    i = state % count
    state = _next(state)
    j = state % count
    state = _next(state)
    if kind == 0:
        order[i], order[j] = order[j], order[i]
    elif kind == 1:
        sizes[i], sizes[j] = max(sizes[j], smallest[i]), max(sizes[i], smallest[j])
    else:
        # long sequences are changed more often
        i = i * i // count if kind == 2 else i
        drawn = state >> 4
        if drawn % 2 == 0:
            sizes[i] = smallest[i] + (drawn >> 2) % (ranks - smallest[i] + 1)
        else:
            sizes[i] = min(max(sizes[i] + (1 if drawn % 4 == 1 else -1), smallest[i]), ranks)
    return state


@compiled
def _next(state: int) -> int:
    """The next state of a multiplicative congruential generator (Park and Miller, CACM 1988; multiplier of 1993)."""
    return state * 48271 % 2147483647


@compiled
def attempt(
    problem: Problem, alone: Integers, bound: int, pack: int, sizes: Integers, order: Integers, one_by_one: bool
) -> tuple[Rings, Slots, Filling, int]:
    """Rings of these sizes placed in this order, each where it ends first; then whole sequences in the same order."""
    costs, lengths = problem.costs, problem.lengths
    ranks = len(problem.slowness)
    alike = problem.slowness.min() == problem.slowness.max() and problem.node_of[0] == problem.node_of[ranks - 1]
    places_all = one_by_one and _places_all(problem)
    fixed = ticks(costs, costs.micro_batch_s)
    least = 0 if places_all else 1
    shared, whole = order[sizes[order] > least], order[sizes[order] <= least]
    count = len(shared)
    rings = Rings(
        shared,
        np.empty(int(sizes[shared].sum()), np.int64),
        np.empty(count, np.int64),
        sizes[shared],
        np.empty(count, np.int64),
        np.empty(count, np.int64),
    )
    load = np.zeros(ranks, np.int64)
    if alike:
        _place_early(problem, rings, load)
    else:
        _place_in_order(problem, rings, load)
    slots = slots_between(rings, load, max(bound, load.max()))
    filling = fill(slots, lengths, whole, alone, problem.slowness, pack, fixed)
    end = level(filling, load, lengths, alone, problem.slowness, pack, fixed, max(bound, load.max()), _LEVELLING)
    return rings, slots, filling, end


@compiled
def _place_in_order(problem: Problem, rings: Rings, load: Integers) -> None:
    """Place rings one behind the other; ``load`` becomes when every rank is free."""
    first = 0
    for k in range(len(rings.sequence)):
        size = rings.size[k]
        chosen, start, stop = _members(problem, load, problem.lengths[rings.sequence[k]], size)
        rings.first[k], rings.start[k], rings.stop[k] = first, start, stop
        rings.member[first : first + size] = chosen
        for rank in chosen:
            load[rank] = stop
        first += size


@compiled
def _place_early(problem: Problem, rings: Rings, load: Integers) -> None:
    """Place rings as early as they fit, also before others that were placed, on ranks that are all alike.

    This is the serial schedule of resource-constrained projects (Kolisch, EJOR 1996): some order gives an optimum. Rings
    end up in the order of their starts.
    """
    count, ranks, costs = len(rings.sequence), len(load), problem.costs
    begin, end = np.empty(count, np.int64), np.empty(count, np.int64)
    for k in range(count):
        length, size = problem.lengths[rings.sequence[k]], rings.size[k]
        duration = scaled(ring_ticks(costs, length, size, problem.node_size, False), problem.slowness[0])
        start = FOREVER
        for other in range(-1, k):
            time = 0 if other < 0 else int(end[other])
            if time < start and _fits(begin, end, rings.size, k, time, duration, ranks):
                start = time
        begin[k], end[k] = start, start + duration
    order = np.argsort(begin, kind="mergesort")
    rings.sequence[:], rings.size[:] = rings.sequence[order], rings.size[order]
    rings.start[:], rings.stop[:] = begin[order], end[order]
    first = 0
    for k in range(count):
        size = rings.size[k]
        # of the ranks that are free, those that have just become so
        by_load = np.argsort(load, kind="mergesort")
        free = np.searchsorted(load[by_load], rings.start[k], side="right")
        chosen = np.sort(by_load[free - size : free])
        rings.first[k] = first
        rings.member[first : first + size] = chosen
        for rank in chosen:
            load[rank] = rings.stop[k]
        first += size


@compiled
def _fits(begin: Integers, end: Integers, sizes: Integers, count: int, time: int, duration: int, ranks: int) -> bool:
    """Whether a ring that is the next of ``sizes`` can run from ``time`` beside the first ``count``."""
    for point in range(-1, count):
        at = time if point < 0 else begin[point]
        if at < time or at >= time + duration:
            continue
        used = sizes[count]
        for other in range(count):
            if begin[other] <= at < end[other]:
                used += sizes[other]
        if used > ranks:
            return False
    return True


@compiled
def _members(problem: Problem, load: Integers, length: int, size: int) -> tuple[Integers, int, int]:
    """The ranks with which a ring ends first, ascending, its start and its stop: those of one node, or any.

    Of the ranks that are free when the ring can start, those that have just become so.
    """
    ranks, costs = len(load), problem.costs
    again = is_recomputed(costs, (length + size - 1) // size)
    best, best_start, best_stop = np.empty(0, np.int64), FOREVER, FOREVER
    by_load = np.argsort(load, kind="mergesort")
    nodes = problem.node_of[ranks - 1] + 1
    for node in range(nodes + 1 if nodes > 1 else 1):
        # the last round takes ranks of any node
        anywhere = node == nodes or nodes == 1
        mine = by_load if anywhere else by_load[problem.node_of[by_load] == node]
        if len(mine) < size:
            continue
        start = load[mine[size - 1]]
        free = size
        while free < len(mine) and load[mine[free]] == start:
            free += 1
        chosen = np.sort(mine[free - size : free])
        crosses_nodes = problem.node_of[chosen[0]] != problem.node_of[chosen[-1]]
        seconds = best_sharing(costs, length, size, problem.node_size, crosses_nodes, again)[0]
        stop = start + scaled(ticks(costs, seconds + costs.micro_batch_s), problem.slowness[chosen].max())
        if stop < best_stop:
            best, best_start, best_stop = chosen, start, stop
    return best, best_start, best_stop
