"""Which part of a model is which stage of a pipeline; imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

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


def stage_parts(config: "ModelConfig", vocabulary: int, layout: Layout) -> tuple[Part, ...]:
    """The part of every pipeline stage: the slowest as fast as it can be, by the FLOPs of a token outside attention.

    Raises:
        LayoutDoesNotFit: the model has fewer layers than there are stages.
    """
    shape = config.shape(vocabulary)
    head = 2.0 * shape.hidden * shape.vocabulary
    attention = 2.0 * shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    widths = [config.active_ffn(layer) for layer in range(config.layers)]
    costs = [attention + 6.0 * shape.hidden * width for width in widths]
    return tuple(Part.of(config, layers) for layers in split_layers(costs, layout.pipeline.num_stages, head_s=head))


def parts_of_rank(parts: tuple[Part, ...], layout: Layout, pp_rank: int) -> Mapping[int, Part]:
    """By stage: the parts that a pipeline rank holds."""
    return {stage: parts[stage] for stage in layout.pipeline.stages_of(pp_rank)}
