"""What a batch plan sends, by formula: the ledger of a run must show exactly this.

Nothing here looks at the code that communicates. Shape of a block: keys and values of some tokens in one layer, so
2 x tokens x KV heads x head size elements.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from evermesh.parallelism.batch_plan import BatchPlan
from evermesh.parallelism.cost import ModelShape
from evermesh.parallelism.ledger import Traffic
from evermesh.parallelism.links import Operation, Tier, tiers_from, wire_bytes
from evermesh.parallelism.pieces import share_of

AXIS = "hdp"


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """The sizes of a model, and of what is trained, that decide the traffic."""

    shape: ModelShape
    num_parameters: int
    bytes_per_element: int
    """Of parameters, gradients and activations; the gradients of a block take at least four bytes."""

    @property
    def block_token_elements(self) -> int:
        """Elements of one token in a block."""
        return 2 * self.shape.kv_heads * self.shape.head_dim


def plan_traffic(
    plan: BatchPlan, model: TrainedModel, nodes: Sequence[int], *, committed: bool = True
) -> list[Traffic]:
    """What all ranks send for the rings, the gradients and the parameters of one step, not yet added up.

    Args:
        plan: the batch plan; one HDP rank per process.
        model: what is trained.
        nodes: index of the node of every rank.
        committed: whether the step ended in an update; without one the parameters are not gathered.
    """
    shard_bytes = -(-model.num_parameters // len(nodes)) * model.bytes_per_element
    parts = [*_rings(plan, model, nodes)]
    parts += collective_traffic("gradients", "all_reduce", AXIS, shard_bytes * len(nodes), nodes)
    if committed:
        parts += collective_traffic("parameters", "all_gather", AXIS, shard_bytes, nodes)
    return parts


def collective_traffic(
    call_site: str, operation: Operation, axis: str, payload_bytes: int, nodes: Sequence[int]
) -> Iterator[Traffic]:
    """What each rank sends in one collective, from rank 0 where it has a source; ``payload_bytes`` of every rank."""
    ranks = len(nodes)
    for rank in range(ranks):
        tier = tiers_from(rank, nodes)[(rank + 1) % ranks]
        sent = wire_bytes(operation, payload_bytes, ranks, rank)
        yield Traffic(call_site, operation, axis, tier, payload_bytes, sent, 1)


def _rings(plan: BatchPlan, model: TrainedModel, nodes: Sequence[int]) -> Iterator[Traffic]:
    rings = {
        (piece.sequence, piece.ring, micro_batch.recompute == "block")
        for micro_batches in plan.ranks
        for micro_batch in micro_batches
        for piece in micro_batch.pieces
        if len(piece.ring) > 1
    }
    for sequence, ring, recomputed in rings:
        yield from _ring(plan.lengths[sequence], ring, model, nodes, forward_passes=1 + recomputed)


def _ring(
    length: int, ring: Sequence[int], model: TrainedModel, nodes: Sequence[int], *, forward_passes: int
) -> Iterator[Traffic]:
    """Messages of all layers for one sequence.

    The block of an owner visits every other member. Members before the owner need all of it, those behind it only its
    head. Its gradient starts at the member before the owner and is handed on until it is home; that of the first owner
    is only ever the head's, because nobody else sees its tail.
    """
    size, layers = len(ring), model.shape.layers
    key_bytes = model.block_token_elements * model.bytes_per_element
    gradient_bytes = model.block_token_elements * max(4, model.bytes_per_element)
    for owner, receiver in itertools.product(range(size), repeat=2):
        share = share_of(length, size, owner)
        sender = ring[(receiver + 1) % size]
        tier = tiers_from(sender, nodes)[ring[receiver]]
        if receiver != owner:
            visible = share.num_tokens if receiver < owner else share.head_tokens
            yield from _messages("ring forward", tier, visible * key_bytes, forward_passes * layers)
            yield from _messages("ring backward", tier, visible * key_bytes, layers)
        if receiver != (owner - 1) % size:
            carried = share.num_tokens if owner else share.head_tokens
            yield from _messages("ring gradients", tier, carried * gradient_bytes, layers)


def _messages(call_site: str, tier: Tier, num_bytes: int, calls: int) -> Iterator[Traffic]:
    if num_bytes:  # empty messages are not sent
        yield Traffic(call_site, "send", AXIS, tier, calls * num_bytes, calls * num_bytes, calls)
