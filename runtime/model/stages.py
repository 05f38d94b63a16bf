"""Which part of a model is which stage of a pipeline; imports no torch."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.pipeline.split import split_layers

if TYPE_CHECKING:
    from evermesh.runtime.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive layers of a model, with the embedding before them or the head behind them."""

    layers: range
    is_first: bool = True
    is_last: bool = True

    @classmethod
    def of(cls, config: "ModelConfig", layers: range) -> Self:
        """The part with these layers: the first layer comes with the embedding, the last with the head."""
        return cls(layers, layers.start == 0, layers.stop == config.layers)


class LayerCosts(NamedTuple):
    """What stages share: time, or what stands for it, in any unit."""

    layers: tuple[float, ...]
    embedding: float
    head: float
    """With the loss."""


def nominal_costs(config: "ModelConfig", vocabulary: int) -> LayerCosts:
    """FLOPs of a token outside attention."""
    shape = config.shape(vocabulary)
    attention = 2.0 * shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    widths = [config.active_ffn(layer) for layer in range(config.layers)]
    layers = tuple(attention + 6.0 * shape.hidden * width for width in widths)
    return LayerCosts(layers, embedding=0.0, head=2.0 * shape.hidden * shape.vocabulary)


def stage_parts(config: "ModelConfig", layout: Layout, costs: LayerCosts) -> tuple[Part, ...]:
    """The part of every pipeline stage: as ``layout.split`` says, or with the slowest as fast as it can be.

    Raises:
        LayoutDoesNotFit: the model has fewer layers than there are stages, or ``split`` another number of either.
    """
    stages = layout.pipeline.num_stages
    if isinstance(layout.split, tuple):
        if len(layout.split) != stages or sum(layout.split) != config.layers:
            raise LayoutDoesNotFit(
                f"layout.split names {len(layout.split)} stages with {sum(layout.split)} layers together, but there are "
                f"{stages} stages (pp {layout.pp} x virtual_stages {layout.virtual_stages}) and {config.layers} layers.",
                axis="split",
            )
        ends = list(itertools.accumulate(layout.split, initial=0))
        return tuple(Part.of(config, range(start, stop)) for start, stop in itertools.pairwise(ends))
    split = split_layers(costs.layers, stages, embedding_s=costs.embedding, head_s=costs.head)
    return tuple(Part.of(config, layers) for layers in split)


def parts_of_rank(parts: tuple[Part, ...], layout: Layout, pp_rank: int) -> Mapping[int, Part]:
    """By stage: the parts that a pipeline rank holds."""
    return {stage: parts[stage] for stage in layout.pipeline.stages_of(pp_rank)}
