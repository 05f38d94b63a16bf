"""What a batch plan sends, by formula: the ledger of a run must show exactly this.

Nothing here looks at the code that communicates. What attention sends is in ``attention.traffic``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from evermesh.parallelism.attention.traffic import AttentionSizes, sequence_traffic
from evermesh.parallelism.batch_plan import BatchPlan, MicroBatch
from evermesh.parallelism.experts.placement import Placement
from evermesh.parallelism.experts.traffic import ExpertGroup, copy_traffic, document_traffic, expert_traffic
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.ledger import Traffic, collective_traffic
from evermesh.parallelism.links import Operation, tiers_from
from evermesh.parallelism.mesh import Mesh
from evermesh.parallelism.pipeline.schedule import PipelineSchedule
from evermesh.parallelism.tensor.sharding import chunk_lengths, padded_length
from evermesh.parallelism.tiers_traffic import Rounds, SetSizes, alike, owners_traffic

AXIS, TENSOR_AXIS, PIPELINE_AXIS = "hdp", "tp", "pp"


class TensorCalls(NamedTuple):
    """How often the ranks that share a model gather and scatter tokens in one pass through their layers."""

    gathers: int
    scatters: int
    recomputed_gathers: int
    """In the repetition of blocks that do not keep everything. It leaves out what nothing in the backward pass needs."""
    recomputed_scatters: int


_NO_CALLS = TensorCalls(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class StageSizes:
    """What one pipeline rank holds."""

    layers: int
    """Layers with attention."""
    calls: TensorCalls
    has_head: bool
    sets: tuple[SetSizes, ...]
    """Its parameters, those of experts apart."""
    expert_layers: tuple[int, ...] = ()
    repeated_attention: int = 0
    """Layers whose attention is computed again in the backward pass."""
    offloaded_attention: int = 0
    """Layers whose attention output waits on the host, so that it is not computed again."""
    repeated_experts: tuple[int, ...] = ()
    """Layers whose experts are computed again."""
    chunked: TensorCalls = _NO_CALLS
    """Those of modules that run in ``layout.tp_chunks`` parts, which ``calls`` leaves out. Where such a module is computed
    again, and its scatter is not among the recomputed ones, it is that of its last part alone which is not repeated."""


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """The sizes of a model, and of what is trained, that decide the traffic."""

    layout: Layout
    hidden: int
    key_value_elements: int
    """Of keys and values of one token in one layer, all heads."""
    bytes_per_element: int
    """Of parameters and activations; gradients that add up, and the loss, take at least four bytes."""
    stages: tuple[StageSizes, ...]
    """Of every pipeline rank."""
    num_experts: int = 0
    """Of a layer."""
    top_k: int = 0
    """Experts that a token passes through."""
    balances_by_loss: bool = False
    """Whether documents have a balancing loss."""
    balances_by_capacity: bool = False
    """Whether documents have a capacity."""
    num_loads: int = 0
    """Experts of all layers whose load is counted once per step; 0: it is not."""
    expert_matrix_elements: int = 0
    """Of each of the three matrices of one expert, on one rank."""
    tied_elements: tuple[int, ...] = ()
    """Of the embedding, by tensor-parallel rank, where another rank has a copy of it."""
    query_elements: int = 0
    """Of queries of one token in one layer, all heads; needed where ranks divide heads, like ``head_size``."""
    head_size: int = 0
    buckets: tuple[int, ...] = ()
    """Numbers of tokens that micro-batches are padded to; none: as few as the ranks that share them need."""

    @property
    def mesh(self) -> Mesh:
        """Where its ranks stand."""
        return Mesh.of(self.layout)

    @property
    def gradient_bytes(self) -> int:
        """Of an element of a gradient that adds up."""
        return max(4, self.bytes_per_element)

    @property
    def token_bytes(self) -> int:
        """Of the activations of one token."""
        return self.hidden * self.bytes_per_element

    def attention(self, stage: StageSizes) -> AttentionSizes:
        """Of one rank of a stage."""
        return AttentionSizes(
            layers=stage.layers,
            repeated=stage.repeated_attention,
            offloaded=stage.offloaded_attention,
            query_elements=self.query_elements // self.layout.tp,
            key_value_elements=self.key_value_elements // self.layout.tp,
            head_elements=2 * self.head_size,
            bytes_per_element=self.bytes_per_element,
        )

    def own_tokens(self, num_tokens: int) -> int:
        """Tokens of a micro-batch, with padding, that each of the ranks holds that share a model."""
        return padded_length(num_tokens, self.layout.tp, self.buckets) // self.layout.tp


class Choices(NamedTuple):
    """What was decided while the step ran, where there are experts."""

    routing: Sequence[Sequence[Mapping[int, Sequence[int]]]]
    """By rank, by micro-batch, by layer: how many of its tokens go to each expert."""
    placements: Sequence[Mapping[int, Placement]]
    """By rank, by layer: who holds which experts; a layer without copies may be left out."""


def plan_traffic(
    plan: BatchPlan,
    model: TrainedModel,
    nodes: Sequence[int],
    *,
    committed: bool = True,
    choices: Choices | None = None,
) -> list[Traffic]:
    """What all ranks send for one step, not yet added up: rings, activations, gradients and parameters.

    Args:
        plan: the batch plan.
        model: what is trained.
        nodes: index of the node of every rank.
        committed: whether the step ended in an update; without one the parameters are not gathered.
        choices: what was decided meanwhile; needed where there are experts.
    """
    mesh, parts = model.mesh, list[Traffic]()
    for group in mesh.groups("hdp"):
        stage = model.stages[mesh.coordinates(group[0]).pp]
        parts += _shared_sequences(plan, model, stage, [nodes[rank] for rank in group])
        parts += _owners(plan, AXIS, group, model, nodes, choices, committed=committed)
    for group in mesh.groups("tp"):
        place = mesh.coordinates(group[0])
        parts += _tp_traffic(plan, place.hdp, model, model.stages[place.pp], [nodes[rank] for rank in group])
    for group in mesh.groups("pp"):
        place = mesh.coordinates(group[0])
        sizes = [model.own_tokens(mb.num_tokens) for mb in plan.ranks[place.hdp]]
        own_nodes = [nodes[rank] for rank in group]
        parts += pipeline_traffic(sizes, model.token_bytes, model.layout.pipeline, own_nodes)
        parts += _tied(place.tp, model, own_nodes, committed=committed)
    if model.num_experts:
        for group in mesh.groups("edp"):
            parts += _owners(plan, "edp", group, model, nodes, choices, committed=committed)
        for pp in range(mesh.pp):
            for group in mesh.expert_holders(pp):
                assert choices is not None
                parts += _experts(plan, group, model, nodes, choices)
            parts += _documents(plan, pp, model, nodes)
    if committed:
        parts += _norms(model, nodes)
    if model.num_loads and committed:
        parts += collective_traffic("expert loads", "all_reduce", "world", 8 * model.num_loads, nodes)
    return parts


def _owners(
    plan: BatchPlan,
    axis: str,
    group: Sequence[int],
    model: TrainedModel,
    nodes: Sequence[int],
    choices: Choices | None,
    *,
    committed: bool,
) -> Iterator[Traffic]:
    """What the ranks that hold the same parameters exchange of them, and of their gradients."""
    layout, place = model.layout, model.mesh.coordinates(group[0])
    division = layout.division if axis == AXIS else layout.expert_division
    own_nodes = [nodes[rank] for rank in group]
    copied = choices.placements[group[0]] if choices is not None else {}
    for sizes in model.stages[place.pp].sets:
        if sizes.of_experts == (axis == AXIS):
            continue
        placement = copied.get(sizes.layer) if sizes.of_experts and sizes.layer is not None else None
        has_copies = placement is not None and bool(placement.copies)
        rounds = owner_rounds(sizes, model, len(plan.ranks[place.hdp]), has_copies=has_copies, committed=committed)
        yield from owners_traffic(sizes, division, rounds, axis, own_nodes, model.bytes_per_element)


def owner_rounds(sizes: SetSizes, model: TrainedModel, passes: int, *, has_copies: bool, committed: bool) -> Rounds:
    """How often the owners of a set exchange it, given the micro-batches of one of them."""
    layout, gathers, reduces = model.layout, 1, 1
    if layout.tiers.in_lock_step:
        gathers = sizes.gathers * passes + has_copies
        if not layout.keeps_gradients:
            reduces = passes + has_copies + (sizes.has_embedding and bool(model.tied_elements))
    gathers += committed and sizes.has_embedding and bool(model.tied_elements)
    return Rounds(gathers, reduces, publishes=committed)


def _norms(model: TrainedModel, nodes: Sequence[int]) -> Iterator[Traffic]:
    """Squares of the norms of every layer and of its update, eight bytes each, over all that hold some of it."""
    for axis in ("hdp", "tp", "edp", "etp"):
        is_dense = axis in ("hdp", "tp")
        for group in model.mesh.groups(axis) if is_dense or model.num_experts else ():
            own_nodes = [nodes[rank] for rank in group]
            for sizes in model.stages[model.mesh.coordinates(group[0]).pp].sets:
                if sizes.num_norms and sizes.of_experts != is_dense:
                    yield from collective_traffic("norms", "all_reduce", axis, 2 * 8 * sizes.num_norms, own_nodes)


def _tp_traffic(
    plan: BatchPlan, hdp_rank: int, model: TrainedModel, stage: StageSizes, nodes: Sequence[int]
) -> Iterator[Traffic]:
    """What the ranks that share one model send."""
    for sizes in stage.sets:
        elements = 0 if sizes.of_experts else alike(sizes, model.layout.division, hdp_rank)
        if elements:
            num_bytes = elements * model.gradient_bytes
            yield from collective_traffic("gradients", "all_reduce", TENSOR_AXIS, num_bytes, nodes)
    for micro_batch in plan.ranks[hdp_rank]:
        recomputed = micro_batch.recompute == "block"
        yield from tensor_traffic(micro_batch.num_tokens, model, stage, nodes, recomputed=recomputed)


def tensor_traffic(
    num_tokens: int, model: TrainedModel, stage: StageSizes, nodes: Sequence[int], *, recomputed: bool = False
) -> Iterator[Traffic]:
    """What the ranks that share one model send for one micro-batch, whose tokens are padded to a multiple of them.

    Backward, each gather is a scatter and each scatter a gather.
    """
    for call_site, operation, payload_bytes in tensor_collectives(num_tokens, model, stage, recomputed=recomputed):
        yield from collective_traffic(call_site, operation, TENSOR_AXIS, payload_bytes, nodes)


def tensor_collectives(
    num_tokens: int, model: TrainedModel, stage: StageSizes, *, recomputed: bool = False
) -> Iterator[tuple[str, Operation, int]]:
    """The collectives of ``tensor_traffic``: call site, operation, payload bytes of every rank."""
    if num_tokens == 0:
        return
    own_tokens = model.own_tokens(num_tokens)
    parts = chunk_lengths(own_tokens, model.layout.tp_chunks)
    for calls, lengths in ((stage.calls, (own_tokens,)), (stage.chunked, parts)):
        for call_site, operation, tokens in _tensor_calls(calls, lengths, recomputed=recomputed):
            ranks = 1 if operation == "all_gather" else model.layout.tp
            yield call_site, operation, ranks * tokens * model.token_bytes
    for values in (1, 2) if stage.has_head else ():
        # the largest logit of a token; the sum of its exponentials and the logit of its target
        yield "loss", "all_reduce", values * num_tokens * max(4, model.bytes_per_element)


def _tensor_calls(
    calls: TensorCalls, lengths: tuple[int, ...], *, recomputed: bool
) -> Iterator[tuple[str, Operation, int]]:
    """Call site and operation of every call, and the tokens of each rank in it; the parts of a pass have ``lengths``."""
    repeats = calls.recomputed_gathers if recomputed else 0
    whole_repeats = calls.recomputed_scatters if recomputed else 0
    counts: tuple[tuple[str, Operation, int, tuple[int, ...]], ...] = (
        ("tensor forward", "all_gather", calls.gathers + repeats, lengths),
        ("tensor forward", "reduce_scatter", calls.scatters + whole_repeats, lengths),
        ("tensor forward", "reduce_scatter", repeats - whole_repeats, lengths[:-1]),
        ("tensor backward", "all_gather", calls.scatters, lengths),
        ("tensor backward", "reduce_scatter", calls.gathers, lengths),
    )
    for call_site, operation, count, of_pass in counts:
        for tokens in of_pass * count:
            yield call_site, operation, tokens


def _tied(tp_rank: int, model: TrainedModel, nodes: Sequence[int], *, committed: bool) -> Iterator[Traffic]:
    """What an embedding and the head that copies it exchange, given the nodes of a pipeline."""
    if not model.tied_elements:
        return
    schedule, elements = model.layout.pipeline, model.tied_elements[tp_rank]
    pair = [nodes[schedule.rank_of(stage)] for stage in (0, schedule.num_stages - 1)]
    gradient_bytes, weight_bytes = elements * model.gradient_bytes, elements * model.bytes_per_element
    yield from collective_traffic("tied embeddings", "all_reduce", PIPELINE_AXIS, gradient_bytes, pair)
    if committed:
        yield from collective_traffic("tied embeddings", "broadcast", PIPELINE_AXIS, weight_bytes, pair)


def _experts(
    plan: BatchPlan, ranks: Sequence[int], model: TrainedModel, nodes: Sequence[int], choices: Choices
) -> Iterator[Traffic]:
    """What the ranks that share one set of experts send for all layers of all micro-batches."""
    layout, place = model.layout, model.mesh.coordinates(ranks[0])
    own_nodes = tuple(nodes[rank] for rank in ranks)
    for layer in model.stages[place.pp].expert_layers:
        owners = Placement(model.num_experts, layout.ep)
        placement = choices.placements[ranks[0]].get(layer, owners)
        group = ExpertGroup(placement, layout.etp, own_nodes, model.token_bytes)
        weight_bytes, gradient_bytes = (
            [model.expert_matrix_elements * each] * 3 for each in (model.bytes_per_element, model.gradient_bytes)
        )
        yield from copy_traffic(group, weight_bytes, gradient_bytes)
        for index, micro_batch in enumerate(plan.ranks[place.hdp]):
            counts = [choices.routing[rank][index][layer] for rank in ranks]
            repeated = micro_batch.recompute == "block" and layer in model.stages[place.pp].repeated_experts
            yield from expert_traffic(counts, group, recomputed=repeated)


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
                if tokens:  # empty messages are not sent
                    num_bytes = tokens * token_bytes
                    yield Traffic(call_site, "send", PIPELINE_AXIS, tier, num_bytes, num_bytes, 1)


def _shared_sequences(
    plan: BatchPlan, model: TrainedModel, stage: StageSizes, nodes: Sequence[int]
) -> Iterator[Traffic]:
    """What the attention of one stage sends, between the HDP ranks with these nodes."""
    sizes = model.attention(stage)
    shared = {
        piece.sequence: (piece, micro_batch.recompute == "block")
        for micro_batches in plan.ranks
        for micro_batch in micro_batches
        for piece in micro_batch.pieces
        if len(piece.ring) > 1
    }
    for sequence, (piece, recomputed) in shared.items():
        yield from sequence_traffic(plan.lengths[sequence], piece, sizes, nodes, recomputed=recomputed)


def _documents(plan: BatchPlan, pp: int, model: TrainedModel, nodes: Sequence[int]) -> Iterator[Traffic]:
    """What the ranks of one stage tell each other so that experts are balanced by whole documents."""
    stage = Mesh(model.layout.hdp, model.layout.tp)
    own_nodes = nodes[pp * stage.size : (pp + 1) * stage.size]
    for hdp_rank, micro_batches in enumerate(plan.ranks):
        for micro_batch in micro_batches:
            wave = [micro_batch if rank == hdp_rank else MicroBatch(()) for rank in range(stage.hdp)]
            of_stage, repeats = model.stages[pp], micro_batch.recompute == "block"
            for _ in range(len(of_stage.expert_layers) + len(of_stage.repeated_experts) * repeats):
                yield from document_traffic(
                    wave,
                    plan.lengths,
                    stage,
                    own_nodes,
                    (model.num_experts, model.top_k),
                    buckets=model.buckets,
                    losses=model.balances_by_loss,
                    capacity=model.balances_by_capacity,
                )
