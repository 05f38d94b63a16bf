"""The traffic of a training step: counted by the ledgers of all ranks, and by formula.

Everything that a step sends is in both, with one exception: the ``all_reduce`` that adds up the counts themselves
(call site ``bookkeeping``). Batch plans count for the step that they are made for, although they are sent before it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from evermesh.parallelism.batch_plan import DIGEST_BYTES, BatchPlan
from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.experts import GridCut
from evermesh.parallelism.layout import ActivationPolicy, Layout
from evermesh.parallelism.ledger import Cell, Traffic, add_up, collective_traffic
from evermesh.parallelism.links import TIERS, Operation
from evermesh.parallelism.mesh import Mesh
from evermesh.parallelism.tensor import part_of
from evermesh.parallelism.tiers_traffic import SetSizes
from evermesh.parallelism.traffic import (
    Choices,
    StageSizes,
    TensorCalls,
    TrainedModel,
    plan_traffic,
)
from evermesh.runtime.config import TrainConfig
from evermesh.runtime.flat import FlatLayout, HeldSet
from evermesh.runtime.lamb import num_layers
from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.model.stages import Part, parts_of_rank

OPERATIONS: tuple[tuple[str, Operation, str], ...] = (
    ("ring forward", "send", "hdp"),
    ("ring backward", "send", "hdp"),
    ("ring gradients", "send", "hdp"),
    ("gather forward", "send", "hdp"),
    ("gather backward", "send", "hdp"),
    ("gather gradients", "send", "hdp"),
    ("heads forward", "send", "hdp"),
    ("heads backward", "send", "hdp"),
    ("tensor forward", "all_gather", "tp"),
    ("tensor forward", "reduce_scatter", "tp"),
    ("tensor backward", "all_gather", "tp"),
    ("tensor backward", "reduce_scatter", "tp"),
    ("pipeline forward", "send", "pp"),
    ("pipeline backward", "send", "pp"),
    ("tied embeddings", "all_reduce", "pp"),
    ("tied embeddings", "broadcast", "pp"),
    ("documents", "send", "hdp"),
    ("documents", "all_gather", "tp"),
    ("documents", "all_reduce", "tp"),
    ("expert counts", "all_to_all", "ep"),
    ("expert counts", "all_gather", "etp"),
    ("expert forward", "all_to_all", "ep"),
    ("expert forward", "send", "etp"),
    ("expert backward", "all_to_all", "ep"),
    ("expert backward", "send", "etp"),
    ("expert copies", "send", "ep"),
    ("expert copy gradients", "send", "ep"),
    ("expert loads", "all_reduce", "world"),
    ("loss", "all_reduce", "tp"),
    ("gradients", "all_reduce", "hdp"),
    ("gradients", "reduce_scatter", "hdp"),
    ("gradients", "all_reduce", "tp"),
    ("gradients", "all_reduce", "edp"),
    ("gradients", "reduce_scatter", "edp"),
    ("sharded parameters", "all_gather", "hdp"),
    ("sharded parameters", "all_gather", "edp"),
    ("norms", "all_reduce", "hdp"),
    ("norms", "all_reduce", "tp"),
    ("norms", "all_reduce", "edp"),
    ("norms", "all_reduce", "etp"),
    ("parameters", "all_gather", "hdp"),
    ("parameters", "all_gather", "edp"),
    ("scalars", "all_reduce", "world"),
    ("plan", "broadcast", "control"),
    ("tokens", "broadcast", "readers"),
    ("loss weights", "all_reduce", "control"),
    ("calibration", "all_reduce", "control"),
    ("calibration", "broadcast", "control"),
)
"""Call site, operation and axis of everything that a training step sends."""
_CELLS: tuple[Cell, ...] = tuple((*operation, tier) for operation in OPERATIONS for tier in TIERS)
_ROWS = {cell: row for row, cell in enumerate(_CELLS)}


def over_all_ranks(own: Sequence[Traffic], world: Communicator, device: torch.device) -> tuple[Traffic, ...]:
    """The traffic of one step, summed over the ranks. Collective: one small ``all_reduce``."""
    counts = torch.zeros(len(_CELLS), 3, dtype=torch.int64)
    for traffic in own:
        counts[_ROWS[traffic.cell]] = torch.tensor(traffic.counts)
    counts = counts.to(device)
    world.all_reduce(counts, "bookkeeping")
    summed = (Traffic(*cell, *count) for cell, count in zip(_CELLS, counts.tolist(), strict=True))
    return tuple(sorted(traffic for traffic in summed if traffic.calls))


def payload_bytes(traffic: Sequence[Traffic], call_site: str) -> int:
    """Payload of everything that was sent for ``call_site``."""
    return sum(part.payload_bytes for part in traffic if part.call_site == call_site)


def step_traffic(
    plan: BatchPlan,
    model: TrainedModel,
    nodes: Sequence[int],
    *,
    committed: bool = True,
    choices: Choices | None = None,
) -> tuple[Traffic, ...]:
    """What a training step with this plan sends over all ranks; arguments as for ``plan_traffic``."""
    plan_bytes = DIGEST_BYTES + len(plan.to_json())
    parts = list(plan_traffic(plan, model, nodes, committed=committed, choices=choices))
    parts += collective_traffic("scalars", "all_reduce", "world", 4 * 8, nodes)
    parts += collective_traffic("plan", "broadcast", "control", 8, nodes)  # how long it is
    parts += collective_traffic("plan", "broadcast", "control", plan_bytes, nodes)
    parts += _tokens(plan, model.mesh, nodes)
    parts += collective_traffic("loss weights", "all_reduce", "control", 8, nodes)
    return add_up(parts)


def _tokens(plan: BatchPlan, mesh: Mesh, nodes: Sequence[int]) -> Iterator[Traffic]:
    """Inputs, targets and counts, four bytes each, from the rank of a node that has read them to those that share them."""
    for rank in range(mesh.size):
        place = mesh.coordinates(rank)
        ranks = [other for other in range(mesh.size) if mesh.coordinates(other).hdp == place.hdp]
        sharing = [other for other in ranks if nodes[other] == nodes[rank]]
        num_tokens = sum(micro_batch.num_tokens for micro_batch in plan.ranks[place.hdp])
        if rank == sharing[0] and num_tokens:
            payload_bytes = 3 * 4 * num_tokens
            yield from collective_traffic("tokens", "broadcast", "readers", payload_bytes, [nodes[rank]] * len(sharing))


def trained_model(
    config: TrainConfig, vocabulary: int, parts: tuple[Part, ...], held: Sequence[Sequence[HeldSet]]
) -> TrainedModel:
    """The sizes that decide the traffic; ``parts`` are those of all stages, ``held`` the sets of every pipeline
    rank."""
    layout, model = config.layout, config.model
    with_norms = config.optimizer.kind == "lamb"
    stages = tuple(
        _stage_sizes(model, layout, parts_of_rank(parts, layout, pp), of_rank, with_norms=with_norms)
        for pp, of_rank in enumerate(held)
    )
    ends = {layout.pipeline.rank_of(stage) for stage in (0, layout.pipeline.num_stages - 1)}
    spans = [part_of(vocabulary, layout.tp, tp_rank) for tp_rank in range(layout.tp)]
    return TrainedModel(
        layout=layout,
        hidden=model.hidden,
        key_value_elements=2 * model.kv_heads * model.head_size,
        query_elements=model.heads * model.head_size,
        head_size=model.head_size,
        bytes_per_element=getattr(torch, config.dtype).itemsize,
        stages=stages,
        buckets=config.buckets,
        **_expert_sizes(model, layout),
        tied_elements=tuple(
            (stop - start) * model.hidden for start, stop in spans if model.tied_embeddings and len(ends) > 1
        ),
    )


def _expert_sizes(model: ModelConfig, layout: Layout) -> dict[str, Any]:
    moe = model.moe
    if moe is None:
        return {}
    layers = sum(map(model.has_experts, range(model.layers)))
    return {
        "num_experts": moe.experts,
        "top_k": moe.top_k,
        "balances_by_loss": moe.balancing.kind == "document_loss",
        "balances_by_capacity": moe.capacity_factor is not None,
        "num_loads": layers * moe.experts if moe.balancing.kind == "bias" or layout.hot_experts else 0,
        "expert_matrix_elements": model.hidden * moe.ffn // layout.etp,
    }


def _stage_sizes(
    model: ModelConfig, layout: Layout, parts: Mapping[int, Part], sets: Sequence[HeldSet], *, with_norms: bool
) -> StageSizes:
    layers = [layer for part in parts.values() for layer in part.layers]
    expert_layers = tuple(layer for layer in layers if model.has_experts(layer))
    is_first, is_last = (any(getattr(part, name) for part in parts.values()) for name in ("is_first", "is_last"))
    calls = [_attention_calls(layout.activations_of(layer)) for layer in layers]
    chunked = [_fed_calls(model, layer, layout.activations_of(layer)) for layer in layers]
    return StageSizes(
        layers=len(layers),
        calls=_sum([TensorCalls(is_last, is_first, 0, 0), *calls]),
        chunked=_sum(chunked),
        has_head=is_last,
        sets=tuple(_set_sizes(model, parts, held.layout, with_norms=with_norms) for held in sets),
        expert_layers=expert_layers,
        repeated_attention=sum(layout.activations_of(layer) == "recompute" for layer in layers),
        offloaded_attention=sum(layout.activations_of(layer) == "offload" for layer in layers),
        repeated_experts=tuple(layer for layer in expert_layers if layout.activations_of(layer) != "keep"),
    )


def _sum(calls: Sequence[TensorCalls]) -> TensorCalls:
    return TensorCalls(*map(sum, zip(TensorCalls(0, 0, 0, 0), *calls, strict=True)))


def _set_sizes(model: ModelConfig, parts: Mapping[int, Part], layout: FlatLayout, *, with_norms: bool) -> SetSizes:
    names = [entry.name for entry in layout.entries]
    layers = {name.split(".")[1] for name in names if name.startswith("blocks.")}
    has_embedding, is_last = "embedding.weight" in names, any(part.is_last for part in parts.values())
    is_whole = len(parts) == 1 and all(part.is_first and part.is_last for part in parts.values())
    of_head = 1 if is_whole else 2  # there it waits for its backward pass, which follows at once
    gathers = of_head
    if layers:
        gathers = 2
    elif has_embedding:
        gathers = 1 + (of_head if model.tied_embeddings and is_last else 0)
    return SetSizes(
        padded=layout.padded,
        replicated=(layout.replicated.start, layout.replicated.stop),
        of_experts=isinstance(layout.entries[0].cut, GridCut),
        layer=int(layers.pop()) if len(layers) == 1 else None,
        has_embedding=has_embedding,
        gathers=gathers,
        num_norms=sum(map(num_layers, layout.entries)) if with_norms else 0,
    )


def _attention_calls(policy: ActivationPolicy) -> TensorCalls:
    """Attention gathers its input and scatters its output. (The embedding scatters its output, the head gathers its input.)
    Half a block that is computed again, because its output waits on the host, stops before the scatter.
    """
    return TensorCalls(1, 1, policy != "keep", policy == "recompute")


def _fed_calls(model: ModelConfig, layer: int, policy: ActivationPolicy) -> TensorCalls:
    """So do feed-forward and shared experts, in chunks. A block that is computed again stops behind the last thing that is
    needed: what shared experts gave is, where a gate multiplies it or a loss is computed behind it.
    """
    moe = model.moe if model.has_experts(layer) else None
    if moe is not None and not moe.shared_ffn:
        return TensorCalls(0, 0, 0, 0)
    is_needed = moe is not None and (moe.shared_gate or moe.balancing.kind == "document_loss")
    return TensorCalls(1, 1, policy != "keep", policy != "keep" and is_needed)
