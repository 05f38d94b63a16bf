"""How the decoder may be shared by tensor-parallel ranks; imports no torch."""

from evermesh.parallelism.experts import ExpertSharding
from evermesh.parallelism.tensor import TensorSharding

DECODER_SHARDING = TensorSharding(
    parameters={
        "embedding.weight": "vocabulary",
        "blocks.*.attention.query.weight": "column",
        "blocks.*.attention.key.weight": "column",
        "blocks.*.attention.value.weight": "column",
        "blocks.*.attention.query.bias": "column",
        "blocks.*.attention.key.bias": "column",
        "blocks.*.attention.value.bias": "column",
        "blocks.*.attention.output.weight": "row",
        "blocks.*.feed_forward.gate.weight": "column",
        "blocks.*.feed_forward.up.weight": "column",
        "blocks.*.feed_forward.down.weight": "row",
        "blocks.*.mixture.router.weight": "replicated",
        "blocks.*.mixture.experts.*": "experts",
        "blocks.*.mixture.shared.gate.weight": "column",
        "blocks.*.mixture.shared.up.weight": "column",
        "blocks.*.mixture.shared.down.weight": "row",
        "blocks.*.mixture.shared_gate.weight": "replicated",
        "blocks.*_norm.weight": "replicated",
        "norm.weight": "replicated",
        "head.weight": "vocabulary",
    },
    tokens={
        "embedding": "look up",
        "blocks.*.attention": "gather and scatter",
        "blocks.*.feed_forward": "token by token",
        "blocks.*.mixture.shared": "token by token",
        "head": "gather",
    },
    equal_parts=("heads", "kv_heads", "ffn"),
)
"""Whole heads, so that attention needs no communication: query and output by ``heads``, key and value by ``kv_heads``."""

DECODER_EXPERTS = ExpertSharding(
    parameters={
        "blocks.*.mixture.experts.gate": 1,
        "blocks.*.mixture.experts.up": 1,
        "blocks.*.mixture.experts.down": 2,
    }
)
"""The router is a dense parameter: every rank routes its own tokens."""

DECODER_PRODUCTS = (
    "blocks.*.attention.query",
    "blocks.*.attention.key",
    "blocks.*.attention.value",
    "blocks.*.feed_forward.gate",
    "blocks.*.feed_forward.up",
)
"""The linear layers whose outputs a backward pass needs; those of experts are computed again with all of a mixture."""
