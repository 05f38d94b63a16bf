"""Model FLOPs of a training step, and how much of the peak they use (MFU); imports no torch.

Two conventions are in use, and published figures follow one or the other: ``full`` counts every pair of tokens of a
document, as Megatron-LM does, ``causal`` only those that a causal mask leaves. Backward counts twice forward, attention too:
what a kernel computes again is not the model's. Whoever prints an MFU prints the convention.
"""

from collections.abc import Sequence

from evermesh.parallelism.cost import FlopConvention, ModelShape


def model_flops(
    shape: ModelShape, lengths: Sequence[int], convention: FlopConvention = "causal", *, recomputed: bool = False
) -> float:
    """FLOPs of one step on documents of these lengths.

    ``recomputed`` adds one more forward pass of all blocks, not of the logits: the hardware FLOPs of full recomputation
    (Narayanan et al., arXiv 2104.04473, equation 3, has them for a GPT).
    """
    tokens = sum(lengths)
    pairs = sum(length * (length + 1) / 2 if convention == "causal" else float(length * length) for length in lengths)
    logits = 2.0 * shape.hidden * shape.vocabulary * tokens
    blocks = shape.linear_flops_per_token() * tokens - logits + shape.attention_flops_per_pair() * pairs
    return 3.0 * logits + (4.0 if recomputed else 3.0) * blocks


def utilisation(flops: float, seconds: float, devices: int, peak_flops_per_s: float) -> float:
    """The share of the peak of all devices that ``flops`` in ``seconds`` use."""
    return flops / (seconds * devices * peak_flops_per_s)


__all__ = ["model_flops", "utilisation"]
