"""How the decoder may be shared by tensor-parallel ranks; imports no torch."""

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
        "blocks.*_norm.weight": "replicated",
        "norm.weight": "replicated",
        "head.weight": "vocabulary",
    },
    tokens={
        "embedding": "look up",
        "blocks.*.attention": "gather and scatter",
        "blocks.*.feed_forward": "gather and scatter",
        "head": "gather",
    },
    equal_parts=("heads", "kv_heads", "ffn"),
)
"""Whole heads, so that attention needs no communication: query and output by ``heads``, key and value by ``kv_heads``."""
