"""How many bytes offloading moves, by formula; nothing here looks at the code that moves them. Imports no torch.

Source: MEMO (arXiv 2407.12117, section 4.1) moves the input and the attention output of a block whole, and a fraction of
the tokens of everything else. Here that fraction is of matrix products only: norms, rotations and gates come from them and
from the inputs without a matrix product, so they are computed again for all tokens. In their terms, of a block with
16 b s h of activations, 3 b s h are always moved and at most 3 b s h + 2 b s f of products (f: width of the feed-forward).
"""

from typing import TYPE_CHECKING

from evermesh.parallelism.batch_plan import BatchPlan
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.tensor import padded_length

if TYPE_CHECKING:
    from evermesh.runtime.model.config import ModelConfig


def offloaded_tokens(fraction: float, num_tokens: int) -> int:
    """Tokens whose products are moved: the first of them."""
    return int(fraction * num_tokens)


def offloaded_bytes(
    model: "ModelConfig", layer: int, num_tokens: int, fraction: float, *, tp: int, bytes_per_element: int
) -> int:
    """What one of ``tp`` ranks moves to host memory for one micro-batch in the block of ``layer``; it all comes back once.

    Args:
        model: sizes of the model.
        layer: index of the block, which says whether it has experts: a mixture is computed again whole.
        num_tokens: of the micro-batch, on all ``tp`` ranks.
        fraction: of the tokens, whose products are moved.
        tp: ranks that share the block.
        bytes_per_element: of activations; the log-sum-exp of attention takes at least four.
    """
    padded = padded_length(num_tokens, tp)
    heads, kv_heads = model.heads // tp, model.kv_heads // tp
    inputs = 2 * (padded // tp) * model.hidden  # of attention and of what follows it
    attention = num_tokens * heads * model.head_size
    products = (heads + 2 * kv_heads) * model.head_size
    if not model.has_experts(layer):
        products += 2 * (model.ffn // tp)
    elements = inputs + attention + offloaded_tokens(fraction, padded) * products
    return elements * bytes_per_element + num_tokens * heads * max(4, bytes_per_element)


def step_offloaded_bytes(plan: BatchPlan, layout: Layout, model: "ModelConfig", bytes_per_element: int) -> int:
    """What all ranks together move to host memory in one training step."""
    layers = [layer for layer in range(model.layers) if layout.activations_of(layer) == "offload"]
    return layout.tp * sum(
        offloaded_bytes(
            model,
            layer,
            micro_batch.num_tokens,
            micro_batch.offload,
            tp=layout.tp,
            bytes_per_element=bytes_per_element,
        )
        for micro_batches in plan.ranks
        for micro_batch in micro_batches
        if micro_batch.recompute == "block"
        for layer in layers
    )
