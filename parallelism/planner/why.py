"""Says why a sequence got the ring that it has, in sentences with numbers."""

import itertools
from typing import NamedTuple

from evermesh.parallelism.batch_plan import BatchPlan, MicroBatch, Piece
from evermesh.parallelism.cost import CostModel, Sharing
from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.pool import Pool


class _Choice(NamedTuple):
    """A ring of some size for one sequence; seconds without waiting."""

    ring: int
    seconds: float

    @property
    def together_s(self) -> float:
        """Of all members."""
        return self.ring * self.seconds


def why_this_ring(plan: BatchPlan, sequence: int, layout: Layout, cost: CostModel, pool: Pool) -> list[str]:
    """One sentence a line: what memory asks for, what the ring takes of the step, and what other sizes would take.

    Raises:
        LayoutDoesNotFit: the batch has no such sequence.
    """
    if not 0 <= sequence < len(plan.lengths):
        raise LayoutDoesNotFit(f"there is no sequence {sequence}; the batch has 0 to {len(plan.lengths) - 1}.")
    length, (rank, micro_batch, piece) = plan.lengths[sequence], _holder(plan, sequence)
    smallest, own = -(-length // layout.capacity), _choice(piece, length, cost, pool, micro_batch)
    step_s = plan.certificate.makespan_s
    lines = [
        f"sequence {sequence} has {length:,} tokens; ranks hold {layout.capacity:,} at a time, so it needs at least "
        f"{_ranks(smallest)}. It has {_ranks(own.ring)}{_members(piece)}."
    ]
    if own.ring == 1:
        others = len(micro_batch.pieces) - 1
        lines.append(
            f"It is whole on rank {rank}, packed with {others} other{'' if others == 1 else 's'}: it takes "
            f"{_share(own.seconds, step_s)}."
        )
    else:
        lines.append(
            f"Each of them holds {piece.num_tokens:,} tokens, give or take two, and works {_share(own.seconds, step_s)}."
        )
    sizes = sorted({smallest, own.ring - 1, own.ring + 1, 2 * own.ring} - {own.ring})
    possible = [ring for ring in sizes if smallest <= ring <= len(pool)]
    lines += [_other(ring, length, own, step_s, layout, cost, pool) for ring in possible]
    if own.ring > smallest:
        lines.append(
            "The planner takes the cheapest of the smallest rings that end with the step, or a larger one where only that "
            "one finds its ranks free in time."
        )
    return lines


def _holder(plan: BatchPlan, sequence: int) -> tuple[int, MicroBatch, Piece]:
    for rank, micro_batches in enumerate(plan.ranks):
        for micro_batch, piece in itertools.chain(*(((mb, piece) for piece in mb.pieces) for mb in micro_batches)):
            if piece.sequence == sequence:
                return rank, micro_batch, piece
    raise LayoutDoesNotFit(f"the plan leaves sequence {sequence} out.")


def _choice(piece: Piece, length: int, cost: CostModel, pool: Pool, micro_batch: MicroBatch) -> _Choice:
    sharing = Sharing(len(piece.ring), piece.heads, piece.gathers, pool.crosses_nodes(piece.ring))
    recomputed = micro_batch.recompute == "block"
    seconds = cost.shared_s(length, sharing, recomputed=recomputed)
    if recomputed:  # as if it hid its copies behind its own work alone
        seconds += cost.offload_s(cost.work(length, sharing), micro_batch.offload)
    return _Choice(len(piece.ring), seconds)


def _other(ring: int, length: int, own: _Choice, step_s: float, layout: Layout, cost: CostModel, pool: Pool) -> str:
    keep = layout.capacity if layout.recompute == "none" else layout.keep_capacity or 0
    sharing = Sharing(ring, crosses_nodes=ring > pool.largest_node)
    recomputed, work = -(-length // ring) > keep, cost.work(length, sharing)
    seconds = cost.shared_s(length, sharing, recomputed=recomputed)
    if recomputed:
        seconds += cost.offload_s(work, cost.best_offload(work) if layout.offload == "auto" else layout.offload)
    other = _Choice(ring, seconds)
    if other.seconds > step_s:
        verdict = f"longer than the step by {other.seconds / step_s - 1.0:.1%}"
    else:
        verdict = f"{other.together_s / own.together_s - 1.0:+.1%} of rank-seconds"
    return f"On {_ranks(ring)} it would take {_share(other.seconds, step_s)}: {verdict}."


def _ranks(number: int) -> str:
    return f"{number:,} rank" if number == 1 else f"{number:,} ranks"


def _members(piece: Piece) -> str:
    ring = sorted(piece.ring)
    if len(ring) == 1:
        return f", {ring[0]}"
    return f", {ring[0]} to {ring[-1]}" if ring[-1] - ring[0] + 1 == len(ring) else f", {', '.join(map(str, ring))}"


def _share(seconds: float, step_s: float) -> str:
    return f"{seconds:.4g} s of the step's {step_s:.4g} s ({seconds / step_s:.1%})"
