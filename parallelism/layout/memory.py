"""What every pipeline rank of a layout needs of device memory, before anything runs; imports no torch.

Parameters, gradients and optimizer states by ``states.state_memory``; activations by ``activations``, of as many
micro-batches as the schedule has in flight, each of them full; logits, ring buffers, and a reserve for what no formula
knows (contexts, buffers of the communication library, fragments).
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from evermesh.parallelism.cost import ModelShape
from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.layout.activations import Precision, block_tokens, exchanged_bytes, logits_bytes
from evermesh.parallelism.layout.degrees import Layout
from evermesh.parallelism.layout.sizes import held_layers, rank_sets
from evermesh.parallelism.layout.states import StateMemory, state_memory
from evermesh.parallelism.pipeline.schedule import PipelineSchedule

_GIB = 2**30


class TokenBytes(NamedTuple):
    """Of each device, for every token that a micro-batch may have."""

    kept: float
    """Activations from forward to backward, of all micro-batches in flight."""
    working: float
    """Of the block that computes backward, or of logits and their gradients, whichever is more."""
    buffers: float
    """Of rings."""
    host: float
    """Activations that wait in host memory."""


@dataclass(frozen=True, slots=True)
class RankMemory:
    """What each device of one pipeline rank needs, at most at any time of a step."""

    pp_rank: int
    states: StateMemory
    per_token: TokenBytes
    capacity: int
    """Tokens of a micro-batch."""
    gathered_keys: float
    """Bytes of the keys and values of a whole sequence; 0: they are passed around."""
    reserve: int
    """Bytes for what no formula knows."""

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by what they are of."""
        return {
            "parameters": self.states.parameters + self.states.gathered,
            "gradients": self.states.gradients + self.states.passing,
            "optimizer states": self.states.states,
            "activations kept": self.per_token.kept * self.capacity,
            "activations at work": self.per_token.working * self.capacity,
            "ring buffers": self.per_token.buffers * self.capacity + self.gathered_keys,
            "reserve": self.reserve,
        }

    @property
    def total(self) -> float:
        """Bytes of a device."""
        return sum(self.parts.values())

    @property
    def binding(self) -> str:
        """The largest part."""
        return max(self.parts, key=lambda name: self.parts[name])

    @property
    def host(self) -> float:
        """Bytes in host memory, for each device."""
        return self.per_token.host * self.capacity

    def largest_capacity(self, memory_bytes: float) -> int:
        """Tokens of a micro-batch with which everything fits; 0: it never does."""
        per_token = self.per_token.kept + self.per_token.working + self.per_token.buffers
        return max(0, int((memory_bytes - (self.total - per_token * self.capacity)) / per_token))

    def at(self, capacity: int) -> Self:
        """With another number of tokens in a micro-batch."""
        return replace(self, capacity=capacity)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / _GIB:,.1f}" for name, size in self.parts.items() if size >= 0.05 * _GIB)
        return f"{self.total / _GIB:,.1f} GiB on pipeline rank {self.pp_rank} ({parts})"


@dataclass(frozen=True, slots=True)
class Occupancy:
    """What a layout is used for, as far as memory depends on it."""

    reserve_bytes: int = 0
    micro_batches: int | None = None
    """Of an HDP rank in a step; None: as many as the schedule ever has in flight."""
    longest: int = 0
    """Tokens of the longest sequence, whose keys and values may be gathered."""
    imbalance: float = 1.0
    """The most rows that the experts of a rank get, over the mean."""


def layout_memory(
    shape: ModelShape, layout: Layout, precision: Precision, use: Occupancy | None = None
) -> tuple[RankMemory, ...]:
    """What the pipeline ranks need; of several that hold alike, only the one with the most micro-batches in flight.

    Raises:
        LayoutDoesNotFit: there are more stages than layers, a degree does not divide the ranks, or "gpipe" keeps all
            micro-batches and ``use`` does not say how many there are.
    """
    use = use or Occupancy()
    in_flight = [stages_in_flight(layout.pipeline, pp_rank, use.micro_batches) for pp_rank in range(layout.pp)]
    most: dict[object, int] = {}
    for pp_rank, held in enumerate(held_layers(shape, layout)):
        kind = _kind(shape, layout, held)
        if kind not in most or in_flight[pp_rank] > in_flight[most[kind]]:
            most[kind] = pp_rank
    return tuple(_rank_memory(shape, layout, pp_rank, in_flight[pp_rank], precision, use) for pp_rank in most.values())


def fullest(memory: Sequence[RankMemory]) -> RankMemory:
    """The one that needs most."""
    return max(memory, key=lambda rank: (rank.total, -rank.pp_rank))


def stages_in_flight(schedule: PipelineSchedule, rank: int, micro_batches: int | None = None) -> int:
    """The most pairs of (stage, micro-batch) whose activations a pipeline rank keeps at once.

    At most what ``peak_activations`` counts in the order itself, and equal to it for many micro-batches.
    """
    ranks, virtual = schedule.ranks, schedule.virtual_stages
    if schedule.name == "gpipe" and micro_batches is None:
        raise LayoutDoesNotFit(
            "gpipe keeps the activations of all micro-batches of a step; say how many, or take 1f1b.", axis="schedule"
        )
    all_of_step = (micro_batches or 2 * ranks) * virtual
    if schedule.name == "gpipe":
        return all_of_step
    if schedule.name == "1f1b":
        return min(all_of_step, ranks - rank)
    if schedule.name == "interleaved-1f1b":
        return min(all_of_step, 2 * (ranks - rank - 1) + (virtual - 1) * ranks + 1)
    return min(all_of_step, ranks * virtual)


def _kind(shape: ModelShape, layout: Layout, held: Mapping[int, range]) -> object:
    """Equal for pipeline ranks that hold alike."""
    last = layout.pipeline.num_stages - 1
    if isinstance(layout.activations, str) and shape.experts is None:
        return 0 in held, last in held, tuple(map(len, held.values()))
    blocks = [[(shape.has_experts(layer), layout.activations_of(layer)) for layer in held[stage]] for stage in held]
    return 0 in held, last in held, tuple(map(tuple, blocks))


def _rank_memory(
    shape: ModelShape, layout: Layout, pp_rank: int, in_flight: int, precision: Precision, use: Occupancy
) -> RankMemory:
    held = held_layers(shape, layout)[pp_rank]
    blocks = [[block_tokens(shape, layout, layer, precision, use.imbalance) for layer in held[stage]] for stage in held]
    working = max(block.whole for of_stage in blocks for block in of_stage)
    if layout.pipeline.num_stages - 1 in held:
        working = max(working, logits_bytes(shape, layout.tp, precision))
    # at the peak, gradients of all keys and values on their way out and in
    gathered = 2 * 2 * shape.kv_heads * shape.head_dim / layout.tp * precision.wide_bytes
    return RankMemory(
        pp_rank=pp_rank,
        states=_states(shape, layout.model_copy(update=_OF_NO_STATES), pp_rank, precision.element_bytes),
        per_token=TokenBytes(
            kept=in_flight * max(sum(block.kept for block in of_stage) for of_stage in blocks),
            working=working,
            buffers=exchanged_bytes(shape, layout, precision),
            host=in_flight * max(sum(block.host for block in of_stage) for of_stage in blocks),
        ),
        capacity=layout.capacity,
        gathered_keys=use.longest * gathered if layout.gathers_keys else 0.0,
        reserve=use.reserve_bytes,
    )


_OF_NO_STATES: dict[str, Any] = {"activations": "keep", "offload": 0.0, "capacity": 1}
"""What parameters and states do not depend on."""


@functools.lru_cache(maxsize=4096)
def _states(shape: ModelShape, layout: Layout, pp_rank: int, element_bytes: int) -> StateMemory:
    return state_memory(rank_sets(shape, layout, pp_rank), layout, element_bytes)


__all__ = ["Occupancy", "RankMemory", "TokenBytes", "fullest", "layout_memory", "stages_in_flight"]
