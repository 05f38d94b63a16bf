"""The sizes that decide what is sent, from the shape of a model alone; a run takes them from its modules."""

from evermesh.parallelism.cost import ModelShape
from evermesh.parallelism.layout.degrees import Layout
from evermesh.parallelism.layout.sizes import check_shape, held_layers, rank_sets
from evermesh.parallelism.traffic import StageSizes, TensorCalls, TrainedModel


def model_of(shape: ModelShape, layout: Layout, element_bytes: int) -> TrainedModel:
    """Of a decoder, trained in ``layout`` with parameters and activations of ``element_bytes``.

    Raises:
        LayoutDoesNotFit: a degree does not divide what it shares.
    """
    check_shape(shape, layout)
    experts, ends = shape.experts, {layout.pipeline.rank_of(stage) for stage in (0, layout.pipeline.num_stages - 1)}
    tied = -(-shape.vocabulary // layout.tp) * shape.hidden
    return TrainedModel(
        layout=layout,
        hidden=shape.hidden,
        key_value_elements=2 * shape.kv_heads * shape.head_dim,
        query_elements=shape.heads * shape.head_dim,
        head_size=shape.head_dim,
        bytes_per_element=element_bytes,
        stages=tuple(_stage(shape, layout, pp) for pp in range(layout.pp)),
        num_experts=experts.experts if experts else 0,
        top_k=experts.top_k if experts else 0,
        expert_matrix_elements=shape.hidden * experts.ffn // layout.etp if experts else 0,
        tied_elements=(tied,) * layout.tp if shape.tied_embeddings and len(ends) > 1 else (),
    )


def _stage(shape: ModelShape, layout: Layout, pp: int) -> StageSizes:
    held = held_layers(shape, layout)[pp]
    layers = [layer for of_stage in held.values() for layer in of_stage]
    policies = {layer: layout.activations_of(layer) for layer in layers}
    mixtures = tuple(layer for layer in layers if shape.has_experts(layer))
    is_first, is_last = 0 in held, layout.pipeline.num_stages - 1 in held
    shared = shape.experts.shared_ffn if shape.experts else 0
    fed = [layer for layer in layers if shared or not shape.has_experts(layer)]
    kept, repeated = ([policies[layer] == policy for layer in layers] for policy in ("keep", "recompute"))
    return StageSizes(
        layers=len(layers),
        calls=TensorCalls(len(layers) + is_last, len(layers) + is_first, len(layers) - sum(kept), sum(repeated)),
        chunked=TensorCalls(len(fed), len(fed), sum(policies[layer] != "keep" for layer in fed), 0),
        has_head=is_last,
        sets=rank_sets(shape, layout, pp),
        expert_layers=mixtures,
        repeated_attention=sum(repeated),
        offloaded_attention=sum(policy == "offload" for policy in policies.values()),
        repeated_experts=tuple(layer for layer in mixtures if policies[layer] != "keep"),
    )


__all__ = ["model_of"]
