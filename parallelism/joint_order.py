"""Proves that the ranks of a plan do not wait for each other in a circle.

Every pipeline rank of every HDP rank runs its actions in the order of the schedule. An exchange (a ring, the collectives
of ranks that keep step; in a forward pass, a recomputation, a backward pass; of one layer) goes on when all its members
are there. A message to the next stage is waited for by its receiver only.
"""

import itertools
from collections import defaultdict, deque
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

from evermesh.parallelism.batch_plan import BatchPlan, MicroBatch
from evermesh.parallelism.errors import PlanInvalid
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.pipeline.schedule import Action, Message, PipelineSchedule

_LAYERS = 2
"""Of a stage. Two layers show every order that more layers would: exchanges of one layer against those of the next."""


Graph = tuple[dict[Hashable, list[Hashable]], dict[Hashable, int]]
"""What may run after each node, and how many nodes each waits for."""


def check_order(plan: BatchPlan, layout: Layout) -> None:
    """Raise ``PlanInvalid`` if the ranks would wait for each other for ever.

    Kahn's algorithm on the joint graph: one node per exchange, shared by all members, one chain per rank.
    """
    followers, waiting_for = _joint_graph(plan, layout)
    free = deque(node for node, count in waiting_for.items() if count == 0)
    done = 0
    while free:
        done += 1
        for later in followers[free.popleft()]:
            waiting_for[later] -= 1
            if waiting_for[later] == 0:
                free.append(later)
    if done < len(waiting_for):
        stuck = sorted({str(node) for node, count in waiting_for.items() if count > 0})
        raise PlanInvalid(f"the ranks would wait for each other for ever, first at: {', '.join(stuck[:4])}.")


def _joint_graph(plan: BatchPlan, layout: Layout) -> Graph:
    followers: dict[Hashable, list[Hashable]] = defaultdict(list)
    waiting_for: dict[Hashable, int] = defaultdict(int)
    group_of = {rank: group[0] for group in layout.lock_step_groups for rank in group}
    schedule = layout.pipeline
    for hdp_rank, micro_batches in enumerate(plan.ranks):
        for pipeline_rank in range(schedule.ranks):
            chain = list(_nodes(pipeline_rank, hdp_rank, micro_batches, schedule, group_of.get(hdp_rank)))
            for earlier, later in itertools.pairwise(chain):
                followers[earlier].append(later)
                waiting_for[later] += 1
            for node in chain:
                waiting_for[node] += 0
                if isinstance(node, _Received):
                    followers[node.sent].append(node)
                    waiting_for[node] += 1
    return followers, waiting_for


class _Sent(NamedTuple):
    """A stage hands a message on; does not wait for the receiver."""

    message: Message
    hdp_rank: int


class _Received(NamedTuple):
    """A stage has the message that it needs."""

    sent: _Sent


def _nodes(
    pipeline_rank: int,
    hdp_rank: int,
    micro_batches: Sequence[MicroBatch],
    schedule: PipelineSchedule,
    group: int | None,
) -> Iterator[Hashable]:
    """Where one rank waits for others or lets them go on, in the order in which it gets there."""
    for action in schedule.actions(pipeline_rank, len(micro_batches)):
        received, sent = schedule.received(action), schedule.sent(action)
        if received is not None:
            yield _Received(_Sent(received, hdp_rank))
        yield from _exchanges(micro_batches[action.micro_batch], action, group)
        if sent is not None:
            yield _Sent(sent, hdp_rank)


def _exchanges(micro_batch: MicroBatch, action: Action, group: int | None) -> Iterator[Hashable]:
    """The blocking exchanges of one action in the order in which it reaches them."""
    rings = [piece.sequence for piece in micro_batch.pieces if len(piece.ring) > 1]
    collective = [f"lock-step {micro_batch.lock_step} of the group of {group}"] if group is not None else []
    names = [f"ring of sequence {sequence}" for sequence in rings] + collective
    if action.kind == "forward":
        for layer in range(_LAYERS):
            yield from ((f"forward of {name}", action.stage, layer) for name in names)
    elif action.kind != "backward weight":  # which communicates nothing
        for layer in reversed(range(_LAYERS)):
            if micro_batch.recompute == "block":
                yield from ((f"recomputation of {name}", action.stage, layer) for name in names)
            yield from ((f"backward of {name}", action.stage, layer) for name in names)


__all__ = ["check_order"]
