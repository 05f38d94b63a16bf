"""Proves that a batch plan is right, sharing no code with the planner.

What is proved:
- every token of every sequence is held exactly once, so that the weights 1/tokens sum to one;
- all members of a ring know it and each other, in the same order, and each holds one piece;
- the members of a ring differ by at most 2 tokens and L (query, key) pairs;
- no micro-batch exceeds the capacity; members of a ring agree on recomputation;
- HDP ranks that communicate in every micro-batch (they share experts, or gather parameters block by block) have equally many
  of them, numbered as lock-steps, with one choice of recomputation at each number; nobody else has lock-steps;
- with a pipeline or lock-steps, a ring is the micro-batch of the same index on all its members;
- the joint order of all ranks' actions (forward, recomputation, backward of every ring and lock-step, layer by layer,
  with blocking exchanges, in every pipeline stage, and the messages between stages) has no cycle, so nobody waits for
  ever;
- the certificate does not promise less than its own lower bound.
"""

from collections import defaultdict
from collections.abc import Sequence

from evermesh.parallelism.batch_plan import BatchPlan, Piece
from evermesh.parallelism.errors import PlanInvalid
from evermesh.parallelism.joint_order import check_order
from evermesh.parallelism.layout import Layout


def verify_plan(plan: BatchPlan, lengths: Sequence[int], layout: Layout) -> None:
    """Raise ``PlanInvalid`` unless ``plan`` is a right plan of ``lengths`` on the ranks of ``layout``.

    The order of a pipeline rank is that of ``layout.schedule``, which the executor follows whatever the plan says.
    """
    if plan.lengths != tuple(lengths):
        raise PlanInvalid(
            f"the plan is for {len(plan.lengths)} sequences of other lengths than the {len(lengths)} given."
        )
    if len(plan.ranks) != layout.hdp:
        raise PlanInvalid(f"the plan is for {len(plan.ranks)} ranks, but the layout has {layout.hdp}.")
    holders = _holders(plan)
    for sequence, length in enumerate(lengths):
        _check_tokens(sequence, length, holders.get(sequence, {}))
        _check_ring(sequence, length, holders[sequence])
    _check_micro_batches(plan, layout)
    _check_lock_steps(plan, layout)
    if layout.runs_in_waves:
        _check_waves(plan)
    check_order(plan, layout)
    if plan.certificate.makespan_s < plan.certificate.lower_bound_s * (1 - 1e-9):
        raise PlanInvalid(
            f"the certificate promises {plan.certificate.makespan_s:.6g} s, less than its lower bound "
            f"{plan.certificate.lower_bound_s:.6g} s."
        )


def _holders(plan: BatchPlan) -> dict[int, dict[int, Piece]]:
    """The piece of every rank, by sequence."""
    holders: dict[int, dict[int, Piece]] = defaultdict(dict)
    for rank, micro_batches in enumerate(plan.ranks):
        for piece in (piece for micro_batch in micro_batches for piece in micro_batch.pieces):
            if not 0 <= piece.sequence < len(plan.lengths):
                raise PlanInvalid(f"rank {rank} holds sequence {piece.sequence}, which the batch does not have.")
            if rank in holders[piece.sequence]:
                raise PlanInvalid(f"rank {rank} holds two pieces of sequence {piece.sequence}.")
            holders[piece.sequence][rank] = piece
    return holders


def _check_tokens(sequence: int, length: int, pieces: dict[int, Piece]) -> None:
    ranges = sorted((start, stop, rank) for rank, piece in pieces.items() for start, stop in piece.ranges)
    expected = 0
    for start, stop, rank in ranges:
        if start >= stop:
            raise PlanInvalid(f"rank {rank} holds the empty range [{start}, {stop}) of sequence {sequence}.")
        if start != expected:
            fault = "nobody holds" if start > expected else "two ranks hold"
            raise PlanInvalid(
                f"{fault} tokens from {min(start, expected)} to {max(start, expected)} of sequence {sequence}."
            )
        expected = stop
    if expected != length:
        raise PlanInvalid(f"sequence {sequence} has {length} tokens, but the plan holds {expected} of them.")


def _check_ring(sequence: int, length: int, pieces: dict[int, Piece]) -> None:
    rings = {piece.ring for piece in pieces.values()}
    if len(rings) != 1:
        raise PlanInvalid(
            f"the ranks {sorted(pieces)} disagree about the ring of sequence {sequence}: {sorted(rings)}."
        )
    ring = rings.pop()
    if len(set(ring)) != len(ring) or set(ring) != set(pieces):
        raise PlanInvalid(f"sequence {sequence} names the ring {ring}, but ranks {sorted(pieces)} hold its pieces.")
    tokens = [piece.num_tokens for piece in pieces.values()]
    pairs = [
        sum(_pairs_before(stop) - _pairs_before(start) for start, stop in piece.ranges) for piece in pieces.values()
    ]
    if max(tokens) - min(tokens) > 2 or max(pairs) - min(pairs) > length:
        raise PlanInvalid(
            f"the ring of sequence {sequence} is unbalanced: tokens {tokens}, (query, key) pairs {pairs}."
        )


def _pairs_before(position: int) -> int:
    """(query, key) pairs of a causal mask for the queries before ``position``."""
    return position * (position + 1) // 2


def _check_micro_batches(plan: BatchPlan, layout: Layout) -> None:
    most = 1.0 if "offload" in layout.activation_policies else 0.0
    choice: dict[int, str] = {}
    for rank, micro_batches in enumerate(plan.ranks):
        for index, micro_batch in enumerate(micro_batches):
            if micro_batch.num_tokens > layout.capacity:
                raise PlanInvalid(
                    f"micro-batch {index} of rank {rank} has {micro_batch.num_tokens} tokens; the capacity is "
                    f"{layout.capacity}."
                )
            if not 0.0 <= micro_batch.offload <= most:
                raise PlanInvalid(
                    f"micro-batch {index} of rank {rank} offloads {micro_batch.offload} of its tokens; the layout allows 0 "
                    f"to {most}."
                )
            for piece in micro_batch.pieces:
                if choice.setdefault(piece.sequence, micro_batch.recompute) != micro_batch.recompute:
                    raise PlanInvalid(f"the ring of sequence {piece.sequence} disagrees about recomputation.")


def _check_lock_steps(plan: BatchPlan, layout: Layout) -> None:
    group_of = {rank: group for group in layout.lock_step_groups for rank in group}
    for rank, micro_batches in enumerate(plan.ranks):
        steps = [micro_batch.lock_step for micro_batch in micro_batches]
        if rank not in group_of:
            if any(step is not None for step in steps):
                raise PlanInvalid(
                    f"rank {rank} joins the lock-step collectives {steps}, but it keeps step with nobody."
                )
            continue
        longest = max(len(plan.ranks[member]) for member in group_of[rank])
        if steps != list(range(longest)):
            raise PlanInvalid(
                f"rank {rank} joins the lock-step collectives {steps}; the HDP ranks {group_of[rank]}, which keep "
                f"step, join 0 to {longest - 1}."
            )
    for group in layout.lock_step_groups:
        for index, together in enumerate(zip(*(plan.ranks[rank] for rank in group), strict=True)):
            choices = {micro_batch.recompute for micro_batch in together}
            if len(choices) > 1:
                raise PlanInvalid(f"the HDP ranks {group} disagree about recomputation in lock-step {index}.")


def _check_waves(plan: BatchPlan) -> None:
    index_of: dict[int, int] = {}
    for rank, micro_batches in enumerate(plan.ranks):
        for index, micro_batch in enumerate(micro_batches):
            for piece in micro_batch.pieces:
                if index_of.setdefault(piece.sequence, index) != index:
                    raise PlanInvalid(
                        f"sequence {piece.sequence} is in micro-batch {index} of rank {rank}, but in micro-batch "
                        f"{index_of[piece.sequence]} of another member of its ring."
                    )
