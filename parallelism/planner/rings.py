"""Which sequences are shared by a ring, by how many ranks, and where: rings of any size placed on a pool of ranks.

A sequence gets the smallest ring that holds it and keeps it under a target time (ByteScale's HDP, arXiv 2502.21231,
section 4, with time in place of tokens): a rank-second is never worth more in a larger ring. Rings are placed longest
sequence first, each on neighbouring ranks that are free at nearly the same time; ranks of one node are tried first. A rank
that is free earlier than the others waits, and that gap is filled with whole sequences afterwards.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.costs import Coefficients, best_sharing, is_recomputed, ticks

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
FOREVER = 2**62
"""Ticks later than any."""


class Rings(NamedTuple):
    """The rings of a batch in the order in which they were placed, which every rank keeps. Times in ticks."""

    sequence: Integers
    member: Integers
    """Ranks; those of a ring follow each other, ascending (in ring order where a plan is mended)."""
    first: Integers
    """Where the ranks of every ring begin in ``member``."""
    size: Integers
    start: Integers
    stop: Integers


@compiled
def no_rings() -> Rings:
    """Of a batch without any."""
    none = np.empty(0, np.int64)
    return Rings(none, none, none, none, none, none)


@compiled
def ranks_of(rings: Rings, ring: int) -> Integers:
    """The members of a ring, ascending."""
    return rings.member[rings.first[ring] : rings.first[ring] + rings.size[ring]]


@compiled
def crosses(size: int, node_size: int) -> bool:
    """Whether a ring takes more ranks than a node has."""
    return size > node_size


@compiled
def ring_ticks(costs: Coefficients, length: int, ring: int, node_size: int, crosses_nodes: bool) -> int:
    """A micro-batch with one member's share of a sequence and nothing else."""
    recomputed = is_recomputed(costs, (length + ring - 1) // ring)
    seconds = best_sharing(costs, length, ring, node_size, crosses_nodes, recomputed)[0]
    return ticks(costs, seconds + costs.micro_batch_s)


@compiled
def ring_size(costs: Coefficients, length: int, ranks: int, node_size: int, target: int, least_work: int) -> int:
    """The cheapest of the smallest rings that hold ``length`` and take at most ``target``; the fastest where none does.

    ``least_work`` is a lower bound on the time of all members together.
    """
    smallest = (length + costs.capacity - 1) // costs.capacity
    size = max(smallest, min(ranks, least_work // max(target, 1)))
    best, best_ticks = size, FOREVER
    while size <= ranks:
        found = ring_ticks(costs, length, size, node_size, crosses(size, node_size))
        if found <= target:
            break
        if found < best_ticks:
            best, best_ticks = size, found
        size += 1
    if size > ranks:
        return best
    # a ring that is a little larger may waste less on padded kernels
    cheapest, least = size, size * found
    for other in range(size + 1, min(ranks, size + max(4, size // 16)) + 1):
        found = other * ring_ticks(costs, length, other, node_size, crosses(other, node_size))
        if found < least:
            cheapest, least = other, found
    return cheapest


@compiled
def place_rings(
    costs: Coefficients,
    lengths: Integers,
    shared: Integers,
    work: Integers,
    slowness: Floats,
    node_end: Integers,
    node_size: int,
    target: int,
    tight: bool,
) -> tuple[Rings, Integers, bool]:
    """Rings for the sequences ``shared``, in that order, that all end by ``target``.

    Args:
        costs: of the batch.
        lengths: tokens of every sequence.
        shared: sequences, longest first.
        work: of every sequence, a lower bound on the time of all its ranks together, ticks.
        slowness: of every rank, what its time is multiplied by.
        node_end: of every rank, the first rank behind its node.
        node_size: ranks of the largest node.
        target: ticks.
        tight: of several places without a gap take the one that is free last, not first.

    Returns:
        The rings, when every rank is free after them, and whether they were found; if not, the rest means nothing.
    """
    ranks, count = len(slowness), len(shared)
    first_of, size_of = np.empty(count, np.int64), np.empty(count, np.int64)
    start_of, stop_of = np.empty(count, np.int64), np.empty(count, np.int64)
    load = np.zeros(ranks, np.int64)
    runs = Runs(np.empty(ranks + 2, np.int64), np.empty(ranks + 2, np.int64), np.empty(ranks + 2, np.float64))
    num_runs = 0
    for rank in range(ranks):
        if rank == 0 or slowness[rank] != slowness[rank - 1]:
            runs.begin[num_runs], runs.load[num_runs], runs.slowness[num_runs] = rank, 0, slowness[rank]
            num_runs += 1
    for k in range(count):
        length = lengths[shared[k]]
        size = ring_size(costs, length, ranks, node_size, target, work[shared[k]])
        widths = _widths(size, ranks)
        first, start, stop = -1, 0, FOREVER
        # a larger ring is shorter: it may end in time where the smallest does not, on a run of ranks or else with a gap
        for wider in widths:
            duration = ring_ticks(costs, length, wider, node_size, crosses(wider, node_size))
            found, at = _best_run(runs, num_runs, node_end, wider, duration, target, tight)
            if found >= 0:
                size, first, start = wider, at, runs.load[found]
                stop = start + scaled(duration, runs.slowness[found])
                break
        if first < 0:
            for wider in widths:
                duration = ring_ticks(costs, length, wider, node_size, crosses(wider, node_size))
                at, begin, end = _best_window(load, slowness, node_end, wider, duration, target)
                if end <= target:
                    size, first, start, stop = wider, at, begin, end
                    break
        if first < 0:
            return no_rings(), load, False
        first_of[k], size_of[k], start_of[k], stop_of[k] = first, size, start, stop
        load[first : first + size] = stop
        num_runs = _cover(runs, num_runs, slowness, first, size, stop)
    return Rings(shared, np.arange(ranks), first_of, size_of, start_of, stop_of), load, True


@compiled
def _widths(size: int, ranks: int) -> Integers:
    """Sizes of rings to try in turn: every twelfth up to half as large again, then every sixth up to four times."""
    most, width, count = min(ranks, 4 * size), size, 0
    found = np.empty(32, np.int64)
    while width <= most and count < len(found):
        found[count] = width
        count += 1
        width += 1 + (size // 12 if 2 * width < 3 * size else width // 6)
    return found[:count]


class Runs(NamedTuple):
    """Neighbouring ranks that are free at the same time and equally fast."""

    begin: Integers
    load: Integers
    slowness: Floats


@compiled
def scaled(duration: int, slowness: float) -> int:
    """Ticks on a rank that is slower than nominal by that factor."""
    return duration if slowness == 1.0 else int(duration * slowness + 0.5)


@compiled
def _best_run(
    runs: Runs, num_runs: int, node_end: Integers, size: int, duration: int, target: int, tight: bool
) -> tuple[int, int]:
    """A run with a window of ``size`` ranks that end by ``target``, and the first rank of the window; (-1, -1): none."""
    ranks = len(node_end)
    best, best_first, best_load = -1, -1, FOREVER
    for run in range(num_runs):
        begin = runs.begin[run]
        end = runs.begin[run + 1] if run + 1 < num_runs else ranks
        if end - begin < size:
            continue
        load = runs.load[run]
        if load + scaled(duration, runs.slowness[run]) > target:
            continue
        if best >= 0 and (load <= best_load if tight else load >= best_load):
            continue
        first = _aligned(node_end, begin, end, size)
        if first >= 0:
            best, best_first, best_load = run, first, load
    return best, best_first


@compiled
def _aligned(node_end: Integers, begin: int, end: int, size: int) -> int:
    """The first of ``size`` ranks in [begin, end) inside one node or, where none holds them, at the edge of one; -1: none."""
    if begin + size <= node_end[begin]:
        return begin
    at_edge = begin == 0 or node_end[begin - 1] == begin
    first = begin if at_edge else node_end[begin]
    if first + size <= end:
        return first
    # it may also end at an edge, if it does not fit into the node it begins in
    if node_end[end - 1] == end and end - size >= begin and node_end[end - size] < end:
        return end - size
    return -1


@compiled
def _best_window(
    load: Integers, slowness: Floats, node_end: Integers, size: int, duration: int, target: int
) -> tuple[int, int, int]:
    """Where ``size`` neighbouring ranks best run something: first rank, start and stop.

    Of the windows that end by ``target`` the one whose ranks wait least, then the one that starts last; if there is none, the
    one that ends first. Slides over all windows with the greatest load and slowness at hand (monotone queues).
    """
    ranks = len(load)
    best_first, best_start, best_stop, best_wait, best_fits = -1, FOREVER, FOREVER, FOREVER, False
    loads, loads_head, loads_tail = np.empty(ranks, np.int64), 0, 0
    slows, slows_head, slows_tail = np.empty(ranks, np.int64), 0, 0
    total = 0
    for last in range(ranks):
        while loads_tail > loads_head and load[loads[loads_tail - 1]] <= load[last]:
            loads_tail -= 1
        loads[loads_tail] = last
        loads_tail += 1
        while slows_tail > slows_head and slowness[slows[slows_tail - 1]] <= slowness[last]:
            slows_tail -= 1
        slows[slows_tail] = last
        slows_tail += 1
        total += load[last]
        first = last - size + 1
        if first < 0:
            continue
        if first > 0:
            total -= load[first - 1]
        if loads[loads_head] < first:
            loads_head += 1
        if slows[slows_head] < first:
            slows_head += 1
        in_one = last < node_end[first]
        at_edge = first == 0 or node_end[first - 1] == first or node_end[last] == last + 1
        if not in_one and not at_edge:
            continue
        start = load[loads[loads_head]]
        stop = start + scaled(duration, slowness[slows[slows_head]])
        wait, fits = start * size - total, stop <= target
        if fits != best_fits:
            better = fits
        elif fits:
            better = wait < best_wait or (wait == best_wait and start > best_start)
        else:
            better = stop < best_stop or (stop == best_stop and wait < best_wait)
        if better:
            best_first, best_start, best_stop, best_wait, best_fits = first, start, stop, wait, fits
    return best_first, best_start, best_stop


@compiled
def _cover(runs: Runs, num_runs: int, slowness: Floats, first: int, size: int, stop: int) -> int:
    """Let ``size`` ranks from ``first`` be free at ``stop``; the number of runs then."""
    ranks, last = len(slowness), first + size
    low = int(np.searchsorted(runs.begin[:num_runs], first, side="right")) - 1
    high = int(np.searchsorted(runs.begin[:num_runs], last, side="left")) - 1
    high_end = runs.begin[high + 1] if high + 1 < num_runs else ranks
    new = Runs(np.empty(size + 2, np.int64), np.empty(size + 2, np.int64), np.empty(size + 2, np.float64))
    count = 0
    if runs.begin[low] < first:
        new.begin[count], new.load[count], new.slowness[count] = runs.begin[low], runs.load[low], runs.slowness[low]
        count += 1
    for rank in range(first, last):
        if rank == first or slowness[rank] != slowness[rank - 1]:
            new.begin[count], new.load[count], new.slowness[count] = rank, stop, slowness[rank]
            count += 1
    if last < high_end:
        new.begin[count], new.load[count], new.slowness[count] = last, runs.load[high], runs.slowness[high]
        count += 1
    move = count - (high - low + 1)
    kept = num_runs - (high + 1)
    for field in range(2):
        column, news = (runs.begin, new.begin) if field == 0 else (runs.load, new.load)
        column[high + 1 + move : high + 1 + move + kept] = column[high + 1 : high + 1 + kept].copy()
        column[low : low + count] = news[:count]
    runs.slowness[high + 1 + move : high + 1 + move + kept] = runs.slowness[high + 1 : high + 1 + kept].copy()
    runs.slowness[low : low + count] = new.slowness[:count]
    return num_runs + move
