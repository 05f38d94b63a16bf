"""A batch as even as can be, to know what a layout's groups send each other before any data is seen."""

from evermesh.parallelism.batch_plan import BatchPlan, Certificate
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.rank_work import MicroBatch, Piece

_PLANNER = "even"


def even_plan(layout: Layout, context: int, batch_tokens: int) -> BatchPlan:
    """Sequences of ``context`` tokens, dealt out in turns: packed into micro-batches, or one for each ring where they are
    longer than a micro-batch. Rings are consecutive ranks, as few as can hold the sequence."""
    members = min(layout.hdp, -(-context // layout.capacity))
    rings = [tuple(range(first, first + members)) for first in range(0, layout.hdp - members + 1, members)]
    number = max(len(rings), batch_tokens // context)
    together = max(1, layout.capacity // context)
    ranks: list[list[list[Piece]]] = [[] for _ in range(layout.hdp)]
    for sequence in range(number):
        turn, ring = divmod(sequence, len(rings))
        for position, rank in enumerate(rings[ring]):
            if turn % together == 0:
                ranks[rank].append([])
            ranges = ((0, context),) if members == 1 else share_of(context, members, position).ranges()
            ranks[rank][-1].append(Piece(sequence, ranges, rings[ring]))
    return BatchPlan(
        lengths=(context,) * number,
        capacity=layout.capacity,
        ranks=tuple(tuple(MicroBatch(tuple(pieces)) for pieces in of_rank) for of_rank in ranks),
        certificate=Certificate(0.0, 0.0, "nothing"),
        planner=_PLANNER,
        cost_version=0,
        speeds_version=0,
    )


__all__ = ["even_plan"]
