"""What blocks of a model compute again and move to host memory, per token, by formula; imports no torch.

A block that offloads computes the projections of attention and of the feed-forward block again, of the tokens whose products
were not moved, and a mixture whole. See ``runtime/memory/sizes.py`` for what is moved.
"""

from typing import NamedTuple

from evermesh.parallelism.cost import ModelShape
from evermesh.parallelism.layout.activations import Precision, host_bytes
from evermesh.parallelism.layout.degrees import Layout


class Repeated(NamedTuple):
    """Of one token in all layers."""

    elements: float
    """Of the matrices that it passes through again in the backward pass, if its products do not wait in host memory."""
    saved: float
    """Of these, those that it does not pass through again if they do."""
    host_bytes: float
    """That are always moved, by each of the ranks that share a model."""
    products_bytes: float
    """That are moved besides if its products wait in host memory."""


def repeated(shape: ModelShape, layout: Layout, precision: Precision) -> Repeated:
    """What the blocks do whose activations are not kept."""
    projections = shape.hidden * shape.head_dim * (shape.heads + 2 * shape.kv_heads)
    inner = (shape.ffn_matrices - 1) * shape.hidden * shape.ffn
    total = Repeated(0.0, 0.0, 0.0, 0.0)
    for layer in range(shape.layers):
        policy, has_experts = layout.activations_of(layer), shape.has_experts(layer)
        if policy == "recompute":
            total = total._replace(elements=total.elements + shape.active_elements(layer))
        elif policy == "offload":
            saved = projections if has_experts else projections + inner
            whole = shape.active_elements(layer) - shape.attention_elements() if has_experts else 0
            moved = host_bytes(shape, layout.tp, precision, has_experts=has_experts)
            total = Repeated(
                total.elements + saved + whole,
                total.saved + saved,
                total.host_bytes + moved.always,
                total.products_bytes + moved.products,
            )
    return total


__all__ = ["Repeated", "repeated"]
