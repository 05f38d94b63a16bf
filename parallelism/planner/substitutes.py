"""Who takes the places in rings of ranks that are lost or slow, and when those rings run that nobody has time for.

Most rings stay where they are. In batches whose rings all begin with the step, every rank is in one then; a ring with a
vacant place can still run behind all others of its members, in time that whole sequences had, which move forward on their
ranks.
"""

from typing import NamedTuple

import numpy as np

from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.mending import Flags
from evermesh.parallelism.planner.rings import FOREVER, Floats, Integers, Rings, ranks_of


class Busy(NamedTuple):
    """The rings of every rank as lists, ``head[rank]``, then ``next[entry]`` until -1, and the ticks that they take."""

    head: Integers
    next: Integers
    ring: Integers
    total: Integers


@compiled
def substitute(
    rings: Rings, heads: Integers, leaving: Flags, lost: Flags, slowness: Floats, node_of: Integers, goal: int
) -> bool:
    """Give the places of the ranks that are ``leaving`` to others; False if a place of a ``lost`` one finds nobody.

    A rank that is only slow keeps a place that nobody takes. Nobody gets rings that take longer than ``goal`` together. Of
    those whose rings leave the time free: one in the same node as the others, then one that has other places of the same
    rank, then the one with least in rings. Rings that take longest come first, since those that nobody has time for then
    may still run later, behind all others of their members: rings are no longer in the order in which they start.
    """
    ranks, places = len(slowness), len(rings.member)
    entries = places + int(leaving[rings.member].sum())
    busy = Busy(
        np.full(ranks, -1, np.int64),
        np.full(entries, -1, np.int64),
        np.empty(entries, np.int64),
        np.zeros(ranks, np.int64),
    )
    ring_at = np.empty(places, np.int64)
    entry = 0
    for ring in range(len(rings.first)):
        for place in range(rings.first[ring], rings.first[ring] + rings.size[ring]):
            ring_at[place] = ring
            _engage(busy, entry, rings.member[place], ring, rings.stop[ring] - rings.start[ring])
            entry += 1
    vacant = np.flatnonzero(leaving[rings.member])
    taker = np.full(ranks, -1, np.int64)
    for place in vacant[np.argsort((rings.start - rings.stop)[ring_at[vacant]], kind="mergesort")]:
        ring, rank = ring_at[place], rings.member[place]
        found = _taker(rings, ring, place, heads, busy, leaving, slowness, node_of, goal, taker[rank], -1)
        if found < 0 and lost[rank]:
            members_free = _free_behind(rings, ring, place, busy, lost)
            found = _taker(rings, ring, place, heads, busy, leaving, slowness, node_of, goal, taker[rank], members_free)
            if found < 0:
                return False
            duration = rings.stop[ring] - rings.start[ring]
            rings.start[ring] = max(members_free, _free(rings, busy, found, ring))
            rings.stop[ring] = rings.start[ring] + duration
        if found < 0:
            continue
        taker[rank], rings.member[place] = found, found
        _engage(busy, entry, found, ring, rings.stop[ring] - rings.start[ring])
        entry += 1
    return True


@compiled
def _free(rings: Rings, busy: Busy, rank: int, without: int) -> int:
    """When a rank has no more rings, leaving one of them out."""
    latest, entry = 0, busy.head[rank]
    while entry >= 0:
        if busy.ring[entry] != without:
            latest = max(latest, int(rings.stop[busy.ring[entry]]))
        entry = busy.next[entry]
    return latest


@compiled
def _free_behind(rings: Rings, ring: int, place: int, busy: Busy, lost: Flags) -> int:
    """When all members of a ring but that in ``place`` have no other ring any more."""
    latest = 0
    for other in range(rings.first[ring], rings.first[ring] + rings.size[ring]):
        if other != place and not lost[rings.member[other]]:
            latest = max(latest, _free(rings, busy, rings.member[other], ring))
    return latest


@compiled
def _engage(busy: Busy, entry: int, rank: int, ring: int, duration: int) -> None:
    busy.ring[entry], busy.next[entry] = ring, busy.head[rank]
    busy.head[rank] = entry
    busy.total[rank] += duration


@compiled
def _taker(
    rings: Rings,
    ring: int,
    place: int,
    heads: Integers,
    busy: Busy,
    leaving: Flags,
    slowness: Floats,
    node_of: Integers,
    goal: int,
    usual: int,
    behind: int,
) -> int:
    """Who takes a place in a ring; -1: nobody can.

    The ring runs when it did (``behind`` is -1), or as soon as the rank has no other ring, and not before ``behind``.
    """
    duration = rings.stop[ring] - rings.start[ring]
    least_node, most_node, slowest = FOREVER, -1, 1.0
    first, size, together = rings.first[ring], rings.size[ring], heads[rings.sequence[ring]]
    for other in range(first, first + size):
        if other != place:
            least_node = min(least_node, node_of[rings.member[other]])
            most_node = max(most_node, node_of[rings.member[other]])
            slowest = max(slowest, slowness[rings.member[other]])
    mate = first + (place - first) // together * together
    mate += 1 if mate == place and together > 1 else 0
    best, best_score, best_late = -1, 8, FOREVER
    for rank in range(len(slowness)):
        if leaving[rank] or slowness[rank] > slowest or busy.total[rank] + duration > goal:
            continue
        score = 0 if rank == usual else 1
        if node_of[rank] < least_node or node_of[rank] > most_node:
            score += 2 if least_node == most_node else 0
        if together > 1 and node_of[rank] != node_of[rings.member[mate]]:
            score += 4
        late = busy.total[rank] if behind < 0 else _free(rings, busy, rank, ring)
        if score > best_score or (score == best_score and late >= best_late):
            continue
        if behind < 0:
            can = _is_free(rings, busy, rank, rings.start[ring], rings.stop[ring])
        else:
            can = max(late, behind) + duration <= goal and _is_no_member(rings, ring, rank)
        if can:
            best, best_score, best_late = rank, score, late
    return best


@compiled
def _is_free(rings: Rings, busy: Busy, rank: int, start: int, stop: int) -> bool:
    """Whether a rank has no ring in this stretch of time."""
    entry = busy.head[rank]
    while entry >= 0:
        other = busy.ring[entry]
        if rings.start[other] < stop and start < rings.stop[other]:
            return False
        entry = busy.next[entry]
    return True


@compiled
def _is_no_member(rings: Rings, ring: int, rank: int) -> bool:
    return not (ranks_of(rings, ring) == rank).any()
