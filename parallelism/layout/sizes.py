"""How large a model is, and the part of it that every pipeline rank of a layout holds; imports no torch.

The sizes are those of the decoder of ``runtime/model``: norms without bias, no biases, head and embedding of equal shape.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from evermesh.parallelism.cost import ModelShape
from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.layout.degrees import Layout
from evermesh.parallelism.pipeline.schedule import PipelineSchedule
from evermesh.parallelism.pipeline.split import split_layers
from evermesh.parallelism.tiers_traffic import SetSizes


def num_parameters(shape: ModelShape) -> int:
    """Elements of the whole model."""
    one = Layout()
    return sum(sizes.padded for sizes in rank_sets(shape, one, 0))


def check_shape(shape: ModelShape, layout: Layout) -> None:
    """Return if a model of these sizes can be shared as ``layout`` says.

    Raises:
        LayoutDoesNotFit: a degree does not divide what it shares.
    """
    experts = shape.experts
    divided = {"tp": (layout.tp, {"heads": shape.heads, "kv_heads": shape.kv_heads, "ffn": shape.ffn})}
    if experts is not None:
        divided["ep"] = (layout.ep, {"experts": experts.experts})
        divided["etp"] = (layout.etp, {"width of an expert": experts.ffn})
    elif layout.ep * layout.etp > 1:
        raise LayoutDoesNotFit(f"ep {layout.ep} x etp {layout.etp}, but the model has no experts to share.", axis="ep")
    for axis, (degree, sizes) in divided.items():
        broken = [f"{name} {size}" for name, size in sizes.items() if size % degree]
        if broken:
            raise LayoutDoesNotFit(f"layout.{axis} is {degree}, which does not divide {' nor '.join(broken)}.", axis)


def stage_layers(shape: ModelShape, layout: Layout) -> tuple[range, ...]:
    """The layers of every pipeline stage, as the runtime divides them by FLOPs, or as ``layout.split`` says.

    Raises:
        LayoutDoesNotFit: there are fewer layers than stages, or ``split`` names another number.
    """
    return _stage_layers(shape, layout.pipeline.num_stages, layout.split if isinstance(layout.split, tuple) else ())


def _stage_layers(shape: ModelShape, num_stages: int, split: tuple[int, ...]) -> tuple[range, ...]:
    if not split:
        return balanced_layers(shape, num_stages, ())
    if len(split) != num_stages or sum(split) != shape.layers:
        raise LayoutDoesNotFit(
            f"layout.split {split} is not {num_stages} stages with {shape.layers} layers together.", axis="split"
        )
    ends = itertools.accumulate(split, initial=0)
    return tuple(range(start, stop) for start, stop in itertools.pairwise(ends))


@functools.lru_cache(maxsize=4096)
def balanced_layers(
    shape: ModelShape, num_stages: int, speeds: tuple[float, ...], attention: float = 0.0
) -> tuple[range, ...]:
    """The layers of every stage so that the slowest is as fast as it can be.

    ``speeds`` of the stages' devices; ``attention``: what it takes in one layer for a token, in FLOPs of matrix products.
    """
    layers = [2.0 * shape.active_elements(layer) + attention for layer in range(shape.layers)]
    return split_layers(layers, num_stages, head_s=2.0 * shape.hidden * shape.vocabulary, speeds=speeds)


def held_layers(shape: ModelShape, layout: Layout) -> tuple[dict[int, range], ...]:
    """By pipeline rank, by stage: the layers that it holds; raises as ``stage_layers`` does."""
    return _held_layers(shape, layout.pipeline, layout.split if isinstance(layout.split, tuple) else ())


@functools.lru_cache(maxsize=4096)
def _held_layers(shape: ModelShape, schedule: PipelineSchedule, split: tuple[int, ...]) -> tuple[dict[int, range], ...]:
    layers = _stage_layers(shape, schedule.num_stages, split)
    held: tuple[dict[int, range], ...] = tuple({} for _ in range(schedule.ranks))
    for stage, of_stage in enumerate(layers):
        held[schedule.rank_of(stage)][stage] = of_stage
    return held


class Content(NamedTuple):
    """What a pipeline rank holds."""

    has_embedding: bool
    has_head: bool
    layers: int
    mixtures: int
    elements: int
    """Of the matrices that a token passes through in its layers."""


def contents(shape: ModelShape, layout: Layout) -> tuple[Content, ...]:
    """What every pipeline rank holds, in numbers."""
    return _contents_of(shape, layout.pipeline, layout.split if isinstance(layout.split, tuple) else ())


@functools.lru_cache(maxsize=4096)
def _contents_of(shape: ModelShape, schedule: PipelineSchedule, split: tuple[int, ...]) -> tuple[Content, ...]:
    found = []
    for held in _held_layers(shape, schedule, split):
        layers = [layer for of_stage in held.values() for layer in of_stage]
        found.append(
            Content(
                has_embedding=0 in held,
                has_head=schedule.num_stages - 1 in held,
                layers=len(layers),
                mixtures=sum(map(shape.has_experts, layers)),
                elements=sum(map(shape.active_elements, layers)),
            )
        )
    return tuple(found)


def rank_sets(shape: ModelShape, layout: Layout, pp_rank: int) -> tuple[SetSizes, ...]:
    """The parameters that every rank of a pipeline stage holds, in the sets that are gathered and summed together."""
    held = held_layers(shape, layout)[pp_rank]
    layers = [layer for of_stage in held.values() for layer in of_stage]
    vocabulary = -(-shape.vocabulary // layout.tp) * shape.hidden
    is_first, is_last = 0 in held, layout.pipeline.num_stages - 1 in held
    head = shape.hidden + (0 if shape.tied_embeddings else vocabulary)  # with the norm before it
    ends = [vocabulary] * is_first + [head] * is_last
    dense: list[tuple[int | None, int]] = [(None, size) for size in ends]
    dense += [(layer, _dense_elements(shape, layer, layout.tp)) for layer in layers]
    experts: list[tuple[int | None, int]] = [
        (layer, _expert_elements(shape, layout.ep * layout.etp)) for layer in layers if shape.has_experts(layer)
    ]
    if not layout.tiers.by_block:
        dense, experts = _joined(dense), _joined(experts)
    padded_to = layout.division.states, layout.expert_division.states
    return (*_sets(dense, padded_to[0]), *_sets(experts, padded_to[1], of_experts=True))


def _joined(sizes: list[tuple[int | None, int]]) -> list[tuple[int | None, int]]:
    return [(None, sum(size for _, size in sizes))] if sizes else []


def _sets(sizes: Sequence[tuple[int | None, int]], multiple: int, *, of_experts: bool = False) -> list[SetSizes]:
    return [
        SetSizes(
            -(-size // multiple) * multiple, of_experts=of_experts, layer=layer, gathers=2 if layer is not None else 1
        )
        for layer, size in sizes
    ]


def _dense_elements(shape: ModelShape, layer: int, tp: int) -> int:
    """Of one layer on one rank, without its experts."""
    norms = 2 * shape.hidden
    attention = shape.attention_elements() // tp
    if not shape.has_experts(layer) or shape.experts is None:
        return norms + attention + shape.ffn_matrices * shape.hidden * shape.ffn // tp
    shared = shape.ffn_matrices * shape.hidden * shape.experts.shared_ffn // tp
    return norms + attention + shape.hidden * shape.experts.experts + shared


def _expert_elements(shape: ModelShape, sharers: int) -> int:
    assert shape.experts is not None
    return shape.experts.experts * shape.ffn_matrices * shape.hidden * shape.experts.ffn // sharers


__all__ = [
    "Content",
    "balanced_layers",
    "check_shape",
    "contents",
    "held_layers",
    "num_parameters",
    "rank_sets",
    "stage_layers",
]
