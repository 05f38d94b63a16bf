"""The common forms of a plan in which nobody waits for ever, recognised without the joint graph of ``joint_order``.

True here means that the joint graph has no cycle; False, that the graph has to be looked at.
"""

from collections.abc import Sequence

import numpy as np

from evermesh.parallelism.layout import Layout
from evermesh.parallelism.pipeline.schedule import Action, Message, PipelineSchedule
from evermesh.parallelism.proof.columns import Columns
from evermesh.parallelism.rank_work import Integers


def free_ranks_go_on(columns: Columns) -> bool:
    """Ranks that hold the whole model, with at most one ring in a micro-batch: the rings have one order on all members.

    A rank runs all of a micro-batch, forward and backward, before the next; so with one ring in each the joint graph has a
    cycle exactly where the order of whole rings has one.
    """
    in_ring = columns.in_ring
    at = columns.micro_batch[in_ring]
    if len(np.unique(at)) < len(at):
        return False
    return _has_one_order(columns.sequence[in_ring], columns.rank[at], len(columns.lengths))


def waves_go_on(columns: Columns, layout: Layout) -> bool:
    """Plans in waves: a ring has one index on all members, the rings of a wave have one order, and the schedule is sound.

    Then every exchange of the joint graph has a place: that of its action in one order of all actions, and inside it by layer
    and by the order of its wave; lock-steps, which all members join behind their rings, come last. Every rank goes through
    exchanges by ascending place, so there is no cycle. Members agree about recomputation, as was proved before.
    """
    in_ring = columns.in_ring
    at, sequence = columns.micro_batch[in_ring], columns.sequence[in_ring]
    index = np.full(len(columns.lengths), -1, np.int64)
    index[sequence] = columns.index[at]
    if (index[sequence] != columns.index[at]).any() or not _has_one_order(sequence, at, len(columns.lengths)):
        return False
    counts = np.unique(np.diff(columns.rank_start)).tolist()
    return layout.pp == 1 or schedule_goes_on(layout.pipeline, counts)


def _has_one_order(rings: Integers, by: Integers, number: int) -> bool:
    """Whether ``rings``, which stand in the order in which each of ``by`` runs them, have one order that fits all."""
    follows = by[1:] == by[:-1]
    edges = np.unique(rings[:-1][follows] * number + rings[1:][follows])
    earlier, later = edges // number, edges % number
    waits_for = np.bincount(later, minlength=number)
    first = np.searchsorted(earlier, np.arange(number + 1)).tolist()
    followers = later.tolist()
    left = waits_for.tolist()
    free = np.unique(rings)[waits_for[np.unique(rings)] == 0].tolist()
    done = 0
    while free:
        ring = free.pop()
        done += 1
        for after in followers[first[ring] : first[ring + 1]]:
            left[after] -= 1
            if left[after] == 0:
                free.append(after)
    return done == len(np.unique(rings))


def schedule_goes_on(schedule: PipelineSchedule, counts: Sequence[int]) -> bool:
    """Whether the longest pipeline ends, and those with fewer micro-batches follow its order.

    Gradients of weights, for which nobody waits, may stand elsewhere.
    """
    most = max(counts, default=0)
    orders = [_communicating(schedule, rank, most) for rank in range(schedule.ranks)]
    for rank, order in enumerate(orders):
        for count in counts:
            if _communicating(schedule, rank, count) != [action for action in order if action.micro_batch < count]:
                return False
    return _ends(schedule, orders)


def _communicating(schedule: PipelineSchedule, rank: int, count: int) -> list[Action]:
    return [action for action in schedule.actions(rank, count) if action.kind != "backward weight"]


def _ends(schedule: PipelineSchedule, orders: Sequence[Sequence[Action]]) -> bool:
    sent: set[Message] = set()
    wakes: dict[Message, int] = {}
    position = [0] * len(orders)
    ready = list(range(len(orders)))
    while ready:
        rank = ready.pop()
        while position[rank] < len(orders[rank]):
            action = orders[rank][position[rank]]
            needed, given = schedule.received(action), schedule.sent(action)
            if needed is not None and needed not in sent:
                wakes[needed] = rank
                break
            position[rank] += 1
            if given is not None:
                sent.add(given)
                if given in wakes:
                    ready.append(wakes.pop(given))
    return all(at == len(order) for at, order in zip(position, orders, strict=True))


__all__ = ["free_ranks_go_on", "schedule_goes_on", "waves_go_on"]
