"""Rotary positions (Su et al., arXiv 2104.09864), with the ways in which checkpoints stretch them for a longer context.

Angles are computed in float64, because positions may be large. Shape legend: T tokens, H heads, D head size.
"""

import math

import torch
from torch import Tensor

from evermesh.runtime.model.config import LinearRope, Llama3Rope, ModelConfig, YarnRope

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine [T, 1, D/2] of every position's angles."""


def rotation(config: ModelConfig, positions_T: Tensor, dtype: torch.dtype) -> Rotation:
    """The rotation of every position, computed in float64 and given in ``dtype``."""
    angles = positions_T.to(torch.float64).unsqueeze(-1) * frequencies(config, positions_T.device)
    cosine, sine = angles.cos(), angles.sin()
    if isinstance(config.rope_scaling, YarnRope):
        factor = _attention_factor(config.rope_scaling)
        cosine, sine = cosine * factor, sine * factor
    return cosine.to(dtype).unsqueeze(1), sine.to(dtype).unsqueeze(1)


def rotate(x_THD: Tensor, rotation: Rotation) -> Tensor:
    """``x_THD`` turned by its positions, in the half-split convention of Hugging Face checkpoints."""
    cosine, sine = rotation
    first, second = x_THD.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Radians per position of every pair of dims [D/2], float64."""
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float64, device=device) / config.head_size
    plain = config.rope_theta**-exponents
    match config.rope_scaling:
        case None:
            return plain
        case LinearRope(factor=factor):
            return plain / factor
        case Llama3Rope() as scaling:
            return _llama3(plain, scaling)
        case YarnRope() as scaling:
            return _yarn(plain, scaling, config)


def _llama3(plain: Tensor, scaling: Llama3Rope) -> Tensor:
    rotations = scaling.original_positions * plain / (2 * math.pi)
    kept = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return _blend(plain, scaling.factor, kept.clamp(0, 1))


def _yarn(plain: Tensor, scaling: YarnRope, config: ModelConfig) -> Tensor:
    last = config.head_size - 1
    low, high = (_dim_that_turns(rotations, scaling, config) for rotations in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, last)
    pairs = torch.arange(len(plain), dtype=torch.float64, device=plain.device)
    divided = (pairs - low) / (high - low if high > low else 1e-3)
    return _blend(plain, scaling.factor, 1 - divided.clamp(0, 1))


def _dim_that_turns(rotations: float, scaling: YarnRope, config: ModelConfig) -> float:
    """The pair of dims that makes so many rotations within the original context (YaRN, section 3.2)."""
    per_rotation = scaling.original_positions / (rotations * 2 * math.pi)
    return config.head_size * math.log(per_rotation) / (2 * math.log(config.rope_theta))


def _blend(plain: Tensor, factor: float, kept: Tensor) -> Tensor:
    """Between the plain frequencies (``kept`` is 1) and those divided by ``factor`` (0)."""
    return kept * plain + (1 - kept) * plain / factor


def _attention_factor(scaling: YarnRope) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
