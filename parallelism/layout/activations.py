"""Bytes of activations per token of a micro-batch, on one rank, by formula; imports no torch.

What autograd keeps of a block of our decoder, for one token of an HDP rank (t tensor-parallel ranks share it, C channels, H
and K heads of size D, F width): the inputs of both norms, C/t each; what norms give, which the ranks of a model gather,
C each; queries and attention output, HD/t each; keys and values, KD/t each; of the feed-forward block gate, up, the
activated gate and their product, F/t each (without a gate: up and its activation). With t = 1, H D = C and F = 4 C of a
block without gate that is 16 C elements, the "16 b s h" of MEMO (arXiv 2407.12117, section 4.1); the 34 s b h bytes of
Korthikanti et al. (arXiv 2205.05198, equation 1, attention scores apart) has the masks of two dropouts on top.

A mixture keeps its rows instead: what is sent to the experts and comes back, C each for every choice of a token, and the
inner activations of the chosen experts.

Where ranks divide heads, the attention output is kept twice: inside attention with some heads, outside with some tokens.
"""

import functools
from typing import NamedTuple

from evermesh.parallelism.cost import ExpertShape, ModelShape
from evermesh.parallelism.layout.degrees import ActivationPolicy, Layout


class Precision(NamedTuple):
    """How wide numbers are."""

    element_bytes: int = 2
    """Of parameters and activations."""
    fused_norms: bool = True
    """Whether a norm keeps its input as it is; without a fused kernel it keeps two copies of at least four bytes."""

    @property
    def wide_bytes(self) -> int:
        """Of what is computed more precisely: loss, gradients that add up, scores of a router."""
        return max(4, self.element_bytes)


class BlockTokens(NamedTuple):
    """Bytes per token of an HDP rank, on each of its devices."""

    kept: float
    """From forward to backward, by the policy of the block."""
    whole: float
    """While the block computes backward: everything that it would keep, and the gradients on their way."""
    host: float
    """That wait in host memory."""


def block_tokens(
    shape: ModelShape, layout: Layout, layer: int, precision: Precision, imbalance: float = 1.0
) -> BlockTokens:
    """Of the block of ``layer``; ``imbalance`` is the most rows that experts of a rank get over the mean."""
    policy, outputs = layout.activations_of(layer), 2 if layout.ulysses > 1 else 1
    share = _Share(layout.tp, layout.etp, policy, layout.most_offload, imbalance, outputs)
    return _block_tokens(shape, shape.has_experts(layer), share, precision)


class _Share(NamedTuple):
    """What of a layout and its use decides about a block."""

    tp: int
    etp: int
    policy: ActivationPolicy
    offload: float
    imbalance: float
    attention_outputs: int


@functools.lru_cache(maxsize=4096)
def _block_tokens(shape: ModelShape, has_experts: bool, share: _Share, precision: Precision) -> BlockTokens:
    size, tp = precision.element_bytes, share.tp
    experts = shape.experts if has_experts else None
    keep = _kept_by_attention(shape, share, precision)
    keep += _kept_by_mixture(shape, experts, share, precision) if experts else _kept_by_ffn(shape, tp, precision)
    block_input = shape.hidden * size / tp
    inner = experts.active_ffn if experts else shape.ffn
    whole = keep + (shape.ffn_matrices + 1) * inner * size / tp  # gradients of gate, up, product
    if share.policy == "keep":
        return BlockTokens(keep, whole, 0.0)
    if share.policy == "recompute":
        return BlockTokens(block_input, whole, 0.0)
    host = host_bytes(shape, tp, precision, has_experts=has_experts)
    return BlockTokens(0.0, whole + 2 * block_input, host.always + share.offload * host.products)


def _kept_by_attention(shape: ModelShape, share: _Share, precision: Precision) -> float:
    """With the inputs of both norms."""
    size, wide, tp = precision.element_bytes, precision.wide_bytes, share.tp
    norm_input = shape.hidden / tp * (size if precision.fused_norms else 2 * wide)
    gathered = shape.hidden * size  # each rank of a model has all tokens of what is multiplied with its matrices
    heads = ((1 + share.attention_outputs) * shape.heads + 2 * shape.kv_heads) * shape.head_dim / tp * size
    return 2 * norm_input + gathered + heads + shape.heads / tp * wide


def _kept_by_ffn(shape: ModelShape, tp: int, precision: Precision) -> float:
    return (shape.hidden + _inner(shape) * shape.ffn / tp) * precision.element_bytes


def _kept_by_mixture(shape: ModelShape, experts: ExpertShape, share: _Share, precision: Precision) -> float:
    size, wide, tp = precision.element_bytes, precision.wide_bytes, share.tp
    routed = shape.hidden / tp * size + 2 * experts.experts / tp * wide
    rows = experts.top_k / tp
    sent_and_returned = rows * shape.hidden * (share.etp * share.imbalance + 1) * size
    of_experts = rows * _inner(shape) * experts.ffn * share.imbalance * size
    if not experts.shared_ffn:
        return routed + sent_and_returned + of_experts
    gathered = shape.hidden * size if tp > 1 else 0
    return routed + sent_and_returned + of_experts + gathered + _inner(shape) * experts.shared_ffn / tp * size


def _inner(shape: ModelShape) -> int:
    """Gate, up, the activated gate and their product; or up and its activation."""
    return 4 if shape.gated else 2


class HostBytes(NamedTuple):
    """Bytes per token of an HDP rank, on each of its devices, that a block which offloads moves to the host."""

    always: float
    """Two inputs and the attention output with its log-sum-exp."""
    products: float
    """Of tokens whose products are moved, besides."""


def host_bytes(shape: ModelShape, tp: int, precision: Precision, *, has_experts: bool) -> HostBytes:
    """Of one block; see ``runtime/memory/sizes.py``."""
    products = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    products += 0 if has_experts else (shape.ffn_matrices - 1) * shape.ffn
    always = (2 * shape.hidden + shape.heads * shape.head_dim) * precision.element_bytes
    return HostBytes((always + shape.heads * precision.wide_bytes) / tp, products * precision.element_bytes / tp)


def logits_bytes(shape: ModelShape, tp: int, precision: Precision) -> float:
    """Per token, on the rank with the head: log-softmax and its gradient, at least four bytes each, and narrower logits."""
    size, wide = precision.element_bytes, precision.wide_bytes
    return -(-shape.vocabulary // tp) * (2 * wide + (size if size < wide else 0))


def exchanged_bytes(shape: ModelShape, layout: Layout, precision: Precision) -> float:
    """Per token, of what rings hold besides: two blocks of keys and values, and two of their gradients.

    Ranks that divide heads hold gradients of queries, keys and values, what they send of them and what they receive; or send
    and receive everything, where the attention output waited on the host.
    """
    if layout.hdp == 1:
        return 0.0
    of_head = shape.head_dim / layout.tp
    keys_and_values = 2 * shape.kv_heads * of_head
    by_heads = 0.0
    if layout.ulysses > 1:
        by_heads = 3 * (shape.heads + 2 * shape.kv_heads) * of_head
    if layout.ulysses > 1 and "offload" in layout.activation_policies:
        by_heads = max(by_heads, 2 * (3 * shape.heads + 2 * shape.kv_heads) * of_head)
    return keys_and_values * 2 * (precision.element_bytes + precision.wide_bytes) + by_heads * precision.element_bytes


__all__ = ["BlockTokens", "HostBytes", "Precision", "block_tokens", "exchanged_bytes", "host_bytes", "logits_bytes"]
