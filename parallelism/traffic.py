"""What a batch plan sends, by formula: the ledger of a run must show exactly this.

Nothing here looks at the code that communicates. Shape of a block: keys and values of some tokens in one layer, so
2 x tokens x KV heads of a rank x head size elements.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from evermesh.parallelism.batch_plan import BatchPlan, MicroBatch
from evermesh.parallelism.cost import ModelShape
from evermesh.parallelism.ledger import Traffic
from evermesh.parallelism.links import Operation, Tier, tiers_from, wire_bytes
from evermesh.parallelism.mesh import Mesh
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.pipeline.schedule import PipelineSchedule

AXIS, TENSOR_AXIS, PIPELINE_AXIS = "hdp", "tp", "pp"


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """The sizes of a model, and of what is trained, that decide the traffic."""

    shape: ModelShape
    num_parameters: int
    """Elements that one rank trains: all, or with ``tp`` > 1 its largest part of each parameter."""
    bytes_per_element: int
    """Of parameters, gradients and activations; the gradients of a block, and the loss, take at least four bytes."""
    tp: int = 1
    """Ranks that share a model."""
    num_replicated: int = 0
    """Elements that all of them train."""

    @property
    def block_token_elements(self) -> int:
        """Elements of one token in a block, of the key and value heads of one rank."""
        return 2 * self.shape.kv_heads // self.tp * self.shape.head_dim


def plan_traffic(
    plan: BatchPlan, model: TrainedModel, nodes: Sequence[int], *, committed: bool = True
) -> list[Traffic]:
    """What all ranks send for one step, not yet added up: rings, activations, gradients and parameters.

    Args:
        plan: the batch plan; ``model.tp`` consecutive processes per HDP rank.
        model: what is trained.
        nodes: index of the node of every rank.
        committed: whether the step ended in an update; without one the parameters are not gathered.
    """
    mesh = Mesh(len(nodes) // model.tp, model.tp)
    parts: list[Traffic] = []
    for column in mesh.groups("hdp"):
        parts += _hdp_traffic(plan, model, [nodes[rank] for rank in column], committed=committed)
    for hdp_rank, row in enumerate(mesh.groups("tp")):
        parts += _tp_traffic(plan.ranks[hdp_rank], model, [nodes[rank] for rank in row])
    return parts


def _hdp_traffic(plan: BatchPlan, model: TrainedModel, nodes: Sequence[int], *, committed: bool) -> Iterator[Traffic]:
    """What the HDP ranks that hold the same part of the model send."""
    shard_bytes = -(-model.num_parameters // len(nodes)) * model.bytes_per_element
    yield from _rings(plan, model, nodes)
    yield from collective_traffic("gradients", "all_reduce", AXIS, shard_bytes * len(nodes), nodes)
    if committed:
        yield from collective_traffic("parameters", "all_gather", AXIS, shard_bytes, nodes)


def _tp_traffic(micro_batches: Sequence[MicroBatch], model: TrainedModel, nodes: Sequence[int]) -> Iterator[Traffic]:
    """What the ranks that share one model send."""
    replicated_bytes = model.num_replicated * model.bytes_per_element
    yield from collective_traffic("gradients", "all_reduce", TENSOR_AXIS, replicated_bytes, nodes)
    for micro_batch in micro_batches:
        recomputed = micro_batch.recompute == "block"
        yield from tensor_traffic(micro_batch.num_tokens, model, nodes, recomputed=recomputed)


def tensor_traffic(
    num_tokens: int, model: TrainedModel, nodes: Sequence[int], *, recomputed: bool = False
) -> Iterator[Traffic]:
    """What the ranks that share one model send for one micro-batch, whose tokens are padded to a multiple of them.

    Attention and feed-forward of every layer gather their input and scatter their output, the embedding scatters its
    output and the head gathers its input; backward, each is the other. A block that is computed again leaves out its
    last scatter, which nothing in its backward pass needs.
    """
    if num_tokens == 0:
        return
    layers, own_tokens = model.shape.layers, -(-num_tokens // model.tp)
    counts = {
        ("tensor forward", "all_gather"): 2 * layers * (1 + recomputed) + 1,
        ("tensor forward", "reduce_scatter"): (2 + recomputed) * layers + 1,
        ("tensor backward", "all_gather"): 2 * layers + 1,
        ("tensor backward", "reduce_scatter"): 2 * layers + 1,
    }
    own_bytes = own_tokens * model.shape.hidden * model.bytes_per_element
    operations: tuple[Operation, ...] = ("all_gather", "reduce_scatter")
    for call_site, operation in itertools.product(("tensor forward", "tensor backward"), operations):
        payload_bytes = own_bytes if operation == "all_gather" else own_bytes * model.tp
        for _ in range(counts[call_site, operation]):
            yield from collective_traffic(call_site, operation, TENSOR_AXIS, payload_bytes, nodes)
    for values in (1, 2):  # the largest logit of a token; the sum of its exponentials and the logit of its target
        payload_bytes = values * num_tokens * max(4, model.bytes_per_element)
        yield from collective_traffic("loss", "all_reduce", TENSOR_AXIS, payload_bytes, nodes)


def pipeline_traffic(
    num_tokens: Sequence[int], token_bytes: int, schedule: PipelineSchedule, nodes: Sequence[int]
) -> Iterator[Traffic]:
    """What the ranks of one pipeline send for one step: activations one way and their gradients the other.

    Args:
        num_tokens: tokens of every micro-batch that one rank hands on; with ``tp`` > 1 its part of the padded ones.
        token_bytes: bytes of one token between two stages, hidden size times bytes per element.
        schedule: of the pipeline; says which stage is where.
        nodes: index of the node of every rank of the pipeline.
    """
    for stage in range(schedule.num_stages - 1):
        earlier, later = schedule.rank_of(stage), schedule.rank_of(stage + 1)
        tier = tiers_from(earlier, nodes)[later]
        for tokens in num_tokens if earlier != later else ():
            for call_site in ("pipeline forward", "pipeline backward"):
                yield from _messages(call_site, tier, tokens * token_bytes, 1, PIPELINE_AXIS)


def collective_traffic(
    call_site: str, operation: Operation, axis: str, payload_bytes: int, nodes: Sequence[int]
) -> Iterator[Traffic]:
    """What each rank sends in one collective, from rank 0 where it has a source; ``payload_bytes`` of every rank.

    One rank alone communicates with nobody.
    """
    ranks = len(nodes)
    for rank in range(ranks if ranks > 1 else 0):
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


def _messages(call_site: str, tier: Tier, num_bytes: int, calls: int, axis: str = AXIS) -> Iterator[Traffic]:
    if num_bytes:  # empty messages are not sent
        yield Traffic(call_site, "send", axis, tier, calls * num_bytes, calls * num_bytes, calls)
