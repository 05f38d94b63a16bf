"""Which ring a sequence gets, and where it lies: on neighbouring ranks, inside a node as long as it fits into one."""

import numpy as np

from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.costs import Coefficients, best_sharing, ticks
from evermesh.parallelism.planner.pipelines.problem import Batch, Filling, Integers, Ranks, Waves

_MOST_AREA = 1.25
"""Rings wider than the one with the least time of all members together may take so much more of it."""
_WIDEST_GAP = 6
"""Ranks that share a sequence which one could hold, because nobody has time for it alone."""


@compiled
def ring_ticks(costs: Coefficients, ranks: Ranks, length: int, ring: int, recomputed: bool) -> tuple[int, int, bool]:
    """Ticks of a member of the cheapest sharing of a ring of that size; its heads and whether it gathers."""
    crosses = ring > ranks.node_size
    neighbours = ranks.node_size if ranks.aligned or not crosses else 1
    seconds, heads, gathers = best_sharing(costs, length, ring, neighbours, crosses, recomputed)
    return ticks(costs, seconds), heads, gathers


@compiled
def choose_ring(
    costs: Coefficients, ranks: Ranks, length: int, room: int, recomputed: bool, target: int
) -> tuple[int, int]:
    """The smallest ring within the target and its ticks, else the fastest among those that take little more area.

    Area is the ticks of all members together; 0 and 0 when no ring has room.
    """
    num_ranks = ranks.nodes.size
    fastest, fewest, least_area = 0, 0, 0
    for ring in range((length + room - 1) // room, min(num_ranks, length) + 1):
        needed, _, _ = ring_ticks(costs, ranks, length, ring, recomputed)
        area = needed * ring
        if fastest == 0 or area < least_area:
            least_area = area
        if area > _MOST_AREA * least_area:
            if ring > ranks.node_size:
                break
            continue
        if fastest == 0 or needed < fewest:
            fastest, fewest = ring, needed
        if needed <= target:
            break
    return fastest, fewest


@compiled
def choose_rings(
    costs: Coefficients, ranks: Ranks, batch: Batch, room: int, recomputed: bool, target: int
) -> tuple[Integers, Integers]:
    """The ring of every sequence for waves of ``target`` ticks, and the ticks of its members."""
    count = batch.lengths.size
    rings, needed = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    for index in range(count):
        if index > 0 and batch.lengths[index] == batch.lengths[index - 1]:
            rings[index], needed[index] = rings[index - 1], needed[index - 1]
        elif batch.lengths[index] <= room and batch.whole[int(recomputed), index] <= target:
            rings[index], needed[index] = 1, batch.whole[int(recomputed), index]
        else:
            rings[index], needed[index] = choose_ring(costs, ranks, batch.lengths[index], room, recomputed, target)
    return rings, needed


@compiled
def place_ring(costs: Coefficients, ranks: Ranks, length: int, waves: Waves, filling: Filling) -> tuple[int, int, int]:
    """The wave, first rank and size of a ring; -1 when no wave has room for it.

    Of the waves with room in time and tokens that in which the members together need least; if there is none, the wave
    whose fullest member stays emptiest.
    """
    num_waves = waves.targets.size
    sizes, needed = np.zeros(num_waves, dtype=np.int64), np.zeros(num_waves, dtype=np.int64)
    for wave in range(num_waves):
        known = -1
        for other in range(max(0, wave - 1), wave):
            if waves.targets[other] == waves.targets[wave] and waves.recomputed[other] == waves.recomputed[wave]:
                known = other
        if known >= 0:
            sizes[wave], needed[wave] = sizes[known], needed[known]
        else:
            sizes[wave], needed[wave] = choose_ring(
                costs, ranks, length, waves.room[wave], waves.recomputed[wave], waves.targets[wave]
            )
    chosen, chosen_first, least_area = -1, 0, 0
    for wave in range(num_waves):
        area = sizes[wave] * needed[wave]
        if sizes[wave] == 0 or needed[wave] > waves.targets[wave] or (chosen >= 0 and area >= least_area):
            continue
        first, _ = _find_start(ranks, length, sizes[wave], needed[wave], wave, waves, filling, 1.0)
        if first >= 0:
            chosen, chosen_first, least_area = wave, first, area
    if chosen >= 0:
        return chosen, chosen_first, sizes[chosen]
    least = np.inf
    for wave in range(num_waves):
        if sizes[wave] > 0:
            first, fullness = _find_start(ranks, length, sizes[wave], needed[wave], wave, waves, filling, least)
            if first >= 0 and fullness < least:
                chosen, chosen_first, least = wave, first, fullness
    return chosen, chosen_first, sizes[max(chosen, 0)]


@compiled
def find_gaps(
    costs: Coefficients,
    ranks: Ranks,
    batch: Batch,
    index: int,
    waves: Waves,
    filling: Filling,
) -> tuple[int, int, int]:
    """Neighbours that have room for a sequence together, which none of them has alone: wave, first and number; -1 if none."""
    length = batch.lengths[index]
    for ring in range(2, min(_WIDEST_GAP, ranks.nodes.size, length) + 1):
        for wave in range(waves.targets.size):
            recomputed = waves.recomputed[wave]
            needed, _, _ = ring_ticks(costs, ranks, length, ring, recomputed)
            if needed * ring > _MOST_AREA * batch.whole[int(recomputed), index] or needed > waves.targets[wave]:
                continue
            first, _ = _find_start(ranks, length, ring, needed, wave, waves, filling, 1.0)
            if first >= 0:
                return wave, first, ring
    return -1, 0, 0


@compiled
def _find_start(
    ranks: Ranks,
    length: int,
    ring: int,
    needed: int,
    wave: int,
    waves: Waves,
    filling: Filling,
    most: float,
) -> tuple[int, float]:
    """The first run of ranks on which a ring leaves all within ``most`` of their limits, and how full; -1 if none does.

    With ``most`` above 1, the emptiest such run.
    """
    num_ranks, share = ranks.nodes.size, (length + ring - 1) // ring
    crosses = ring > ranks.node_size
    found, least = -1, most
    first = 0
    while first + ring <= num_ranks:
        if not crosses and ring > 1 and ranks.nodes[first] != ranks.nodes[first + ring - 1]:
            first += 1
            continue
        if crosses and ranks.aligned and ranks.node_size > 1 and first % ranks.node_size:
            first += 1
            continue
        fullest, blocked = 0.0, -1
        for rank in range(first + ring - 1, first - 1, -1):
            fullness = (filling.loads[wave, rank] + needed) / filling.limits[wave, rank]
            fullest = max(fullest, fullness)
            if filling.tokens[wave, rank] + share > waves.room[wave] or fullest > least:
                blocked = rank
                break
        if blocked >= 0:
            first = blocked + 1
            continue
        found, least = first, fullest
        if most <= 1.0:
            break
        first += 1
    return found, least
