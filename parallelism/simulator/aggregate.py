"""Replays a batch plan against a cost model: when every rank runs which micro-batch, and when the last one is done.

``simulate`` is for ranks that hold the whole model; plans for pipelines are replayed by ``simulate_pipeline``. Nothing is
slow or lost here: that is ``simulator.events``, which says the same when nothing is.
"""

from collections.abc import Sequence

from evermesh.parallelism.batch_plan import BatchPlan, MicroBatch, Piece
from evermesh.parallelism.cost import CostModel, Sharing, Work
from evermesh.parallelism.errors import PlanInvalid
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.simulator.timeline import Span, Timeline


def simulate(plan: BatchPlan, cost_model: CostModel) -> Timeline:
    """Replay ``plan``: ranks run their micro-batches in order, the members of a ring start and end together.

    Raises:
        PlanInvalid: the ranks wait for each other in a circle.
    """
    labels = tuple(f"rank {rank}" for rank in range(len(plan.ranks)))
    return Timeline(tuple(_replay(plan.ranks, plan.lengths, cost_model)), labels)


def makespan_s(ranks: Sequence[Sequence[MicroBatch]], lengths: Sequence[int], cost_model: CostModel) -> float:
    """When the last rank is done, seconds."""
    return max((span.stop_s for span in _replay(ranks, lengths, cost_model)), default=0.0)


def micro_batch_s(
    micro_batch: MicroBatch, lengths: Sequence[int], cost_model: CostModel, pool: Pool | None = None
) -> float:
    """Seconds of one micro-batch on a rank of speed 1, without waiting; without a ``pool`` no ring crosses nodes."""
    recomputed = micro_batch.recompute == "block"
    pieces = (
        cost_model.shared_s(lengths[piece.sequence], sharing_of(piece, pool), recomputed=recomputed)
        for piece in micro_batch.pieces
    )
    return cost_model.micro_batch_s + sum(pieces) + offload_s(micro_batch, lengths, cost_model)


def offload_s(micro_batch: MicroBatch, lengths: Sequence[int], cost_model: CostModel) -> float:
    """Seconds that offloading adds to one micro-batch on a rank of speed 1; below zero where it saves more."""
    if micro_batch.recompute == "none" or not cost_model.offloads:
        return 0.0
    return cost_model.offload_s(work_of(micro_batch, lengths, cost_model), micro_batch.offload)


def work_of(micro_batch: MicroBatch, lengths: Sequence[int], cost_model: CostModel) -> Work:
    """What one rank computes of a micro-batch."""
    return cost_model.together(
        cost_model.work(lengths[piece.sequence], Sharing(len(piece.ring), piece.heads)) for piece in micro_batch.pieces
    )


def sharing_of(piece: Piece, pool: Pool | None) -> Sharing:
    """How the ring of ``piece`` shares its sequence."""
    crosses_nodes = pool is not None and len(piece.ring) > 1 and pool.crosses_nodes(piece.ring)
    return Sharing(len(piece.ring), piece.heads, piece.gathers, crosses_nodes)


def _replay(ranks: Sequence[Sequence[MicroBatch]], lengths: Sequence[int], cost_model: CostModel) -> list[Span]:
    free_at = [0.0] * len(ranks)
    position = [0] * len(ranks)
    spans: list[list[Span]] = [[] for _ in ranks]
    ready = list(range(len(ranks)))
    while ready:
        rank = ready.pop()
        if position[rank] == len(ranks[rank]):
            continue
        gang = _gang(rank, ranks, position)
        if gang is None:
            continue  # a member is not there yet; it looks again when it arrives
        start = max(free_at[member] for member in gang)
        current = {member: ranks[member][position[member]] for member in gang}
        stop = start + max(micro_batch_s(micro_batch, lengths, cost_model) for micro_batch in current.values())
        for member, micro_batch in current.items():
            spans[member].append(_span(member, position[member], start, stop, micro_batch))
            free_at[member] = stop
            position[member] += 1
            ready.append(member)
    stuck = [rank for rank in range(len(ranks)) if position[rank] < len(ranks[rank])]
    if stuck:
        raise PlanInvalid(f"ranks {stuck} wait for each other in a circle; the plan cannot run.")
    return [span for rank_spans in spans for span in rank_spans]


def _gang(rank: int, ranks: Sequence[Sequence[MicroBatch]], position: Sequence[int]) -> set[int] | None:
    """All ranks that run together with the next micro-batch of ``rank``; None when one of them is not there yet."""
    gang, to_visit = {rank}, [rank]
    while to_visit:
        member = to_visit.pop()
        for piece in ranks[member][position[member]].pieces:
            for other in piece.ring:
                if position[other] == len(ranks[other]):
                    return None
                upcoming = ranks[other][position[other]]
                if all(mine.sequence != piece.sequence for mine in upcoming.pieces):
                    return None
                if other not in gang:
                    gang.add(other)
                    to_visit.append(other)
    return gang


def _span(rank: int, index: int, start: float, stop: float, micro_batch: MicroBatch) -> Span:
    return Span(
        rank=rank,
        micro_batch=index,
        start_s=start,
        stop_s=stop,
        sequences=tuple(piece.sequence for piece in micro_batch.pieces),
        ring_size=max((len(piece.ring) for piece in micro_batch.pieces), default=1),
        num_tokens=micro_batch.num_tokens,
    )
