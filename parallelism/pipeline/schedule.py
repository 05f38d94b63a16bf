"""In which order each rank of a pipeline runs the micro-batches of a step through its stages.

The orders of several stages per rank, and of split backward passes, are torch's (``torch.distributed.pipelining``), turned
into data; that of 1F1B is written down here, because torch's is spread over the code that runs it. What they share:

- **One order for every number of micro-batches.** What ``n`` micro-batches are is what ``n + 1`` micro-batches are with the
  last one left out; only "backward weight", which sends nothing, may move. So pipelines with different numbers of
  micro-batches, joined by rings or by experts wherever they share an index, follow one order and cannot wait for each
  other in a circle. torch's own interleaved schedules lack this: they cut n micro-batches into rounds of
  ``n // (n // ranks)``. Here a round always has as many micro-batches as the pipeline has ranks; n is raised to the next
  multiple, and what is not there is dropped, which takes nothing from the order of the others.
- **Memory.** In units of a rank's share of the layers, for one micro-batch of one token budget, with p ranks and v
  virtual stages: "1f1b" keeps p on the first rank; "zero-bubble" and "zero-bubble-v" keep at most p on every rank, so
  they need no more than "1f1b" does; "interleaved-1f1b" keeps p + (p - 1) / v; "gpipe" keeps all.

Sources: GPipe (Huang et al., arXiv 1811.06965), 1F1B and its interleaved form (Narayanan et al., arXiv 2104.04473,
section 2.2), "zero-bubble" = ZB-H1 of Qi et al. (arXiv 2401.10241, section 2), with v > 1 its interleaved form;
"zero-bubble-v" = their ZB-V (section 6).
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from evermesh.parallelism.errors import LayoutDoesNotFit

ScheduleName = Literal["gpipe", "1f1b", "interleaved-1f1b", "zero-bubble", "zero-bubble-v"]
ActionKind = Literal["forward", "backward", "backward input", "backward weight"]
_KINDS: dict[str, ActionKind] = {"F": "forward", "B": "backward", "I": "backward input", "W": "backward weight"}
"""By torch's letters."""


@dataclass(frozen=True, slots=True)
class Action:
    """One stage does one thing with one micro-batch."""

    kind: ActionKind
    """``backward`` computes all gradients; a schedule without bubbles runs its two parts apart."""
    stage: int
    micro_batch: int


class Message(NamedTuple):
    """What one stage hands to the next: activations ``forward``, their gradients ``backward``."""

    direction: Literal["forward", "backward"]
    stage: int
    """The stage that needs it."""
    micro_batch: int


Order = tuple[Action, ...]


@dataclass(frozen=True, slots=True)
class PipelineSchedule:
    """A pipeline of ``ranks x virtual_stages`` stages.

    Raises:
        LayoutDoesNotFit: the schedule does not exist for this number of virtual stages.
    """

    name: ScheduleName = "1f1b"
    ranks: int = 1
    virtual_stages: int = 1
    """Stages of every rank."""
    forward_only: bool = False
    """Without backward passes: what is left of the order of a step still has no circle."""

    def __post_init__(self) -> None:
        wanted = {"gpipe": (1, 1), "1f1b": (1, 1), "interleaved-1f1b": (2, None), "zero-bubble-v": (2, 2)}
        least, most = wanted.get(self.name, (1, None))
        if self.virtual_stages < least or (most is not None and self.virtual_stages > most):
            number = f"{least}" if least == most else f"at least {least}"
            raise LayoutDoesNotFit(
                f"schedule {self.name} takes {number} virtual stages per rank, not {self.virtual_stages}. "
                f"Set layout.virtual_stages to {least}, or take another layout.schedule.",
                "schedule" if self.virtual_stages == 1 else "virtual_stages",
            )

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.ranks * self.virtual_stages

    @property
    def splits_backward(self) -> bool:
        """Whether the gradients of the weights are computed apart from those of the input."""
        return self.name in ("zero-bubble", "zero-bubble-v")

    def rank_of(self, stage: int) -> int:
        """The rank that holds ``stage``: stages go round in a loop; in "zero-bubble-v" they come back, in a V."""
        lap, position = divmod(stage, self.ranks)
        return self.ranks - 1 - position if self.name == "zero-bubble-v" and lap == 1 else position

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that ``rank`` holds, ascending."""
        return tuple(stage for stage in range(self.num_stages) if self.rank_of(stage) == rank)

    def actions(self, rank: int, num_micro_batches: int) -> Order:
        """What ``rank`` does for this many micro-batches, in order; imports torch for those that are torch's."""
        actions = _orders(self, num_micro_batches)[rank]
        return tuple(action for action in actions if action.kind == "forward") if self.forward_only else actions

    def received(self, action: Action) -> Message | None:
        """What ``action`` cannot start without; None when nobody hands it anything."""
        if action.kind == "forward":
            return Message("forward", action.stage, action.micro_batch) if action.stage > 0 else None
        if action.kind == "backward weight" or action.stage == self.num_stages - 1:
            return None
        return Message("backward", action.stage, action.micro_batch)

    def sent(self, action: Action) -> Message | None:
        """What ``action`` hands on; None when nobody waits for it."""
        if action.kind == "forward":
            last = action.stage == self.num_stages - 1
            return None if last else Message("forward", action.stage + 1, action.micro_batch)
        if action.kind == "backward weight" or action.stage == 0:
            return None
        return Message("backward", action.stage - 1, action.micro_batch)

    def sender(self, message: Message) -> int:
        """The rank that sends ``message``; it goes to ``rank_of(message.stage)``."""
        return self.rank_of(message.stage + (-1 if message.direction == "forward" else 1))

    def links(self) -> tuple[tuple[int, int], ...]:
        """Every (sender, receiver) between which messages go, sorted; none from a rank to itself."""
        neighbours = {(self.rank_of(stage), self.rank_of(stage + 1)) for stage in range(self.num_stages - 1)}
        both_ways = neighbours | {(later, earlier) for earlier, later in neighbours}
        return tuple(sorted(link for link in both_ways if link[0] != link[1]))


def peak_activations(actions: Iterable[Action]) -> int:
    """The most (stage, micro-batch) pairs of which a rank keeps activations at once, from forward to the last backward."""
    kept = peak = 0
    for action in actions:
        kept += {"forward": 1, "backward": -1, "backward input": 0, "backward weight": -1}[action.kind]
        peak = max(peak, kept)
    return peak


@functools.lru_cache(maxsize=1024)
def _orders(schedule: PipelineSchedule, num_micro_batches: int) -> tuple[Order, ...]:
    """The order of every rank."""
    if num_micro_batches == 0:
        return ((),) * schedule.ranks
    fitting = -(-num_micro_batches // schedule.ranks) * schedule.ranks
    return tuple(
        tuple(action for action in _order(schedule, rank, fitting) if action.micro_batch < num_micro_batches)
        for rank in range(schedule.ranks)
    )


def _order(schedule: PipelineSchedule, rank: int, num_micro_batches: int) -> Iterator[Action]:
    """The order of one rank, for a multiple of ``schedule.ranks`` micro-batches."""
    if schedule.name in ("gpipe", "1f1b"):
        warm_up = min(schedule.ranks - 1 - rank, num_micro_batches) if schedule.name == "1f1b" else num_micro_batches
        yield from (Action("forward", rank, micro_batch) for micro_batch in range(warm_up))
        for micro_batch in range(warm_up, num_micro_batches):
            yield Action("forward", rank, micro_batch)
            yield Action("backward", rank, micro_batch - warm_up)
        for micro_batch in range(num_micro_batches - warm_up, num_micro_batches):
            yield Action("backward", rank, micro_batch)
        return
    for action in _torch_order(schedule, rank, num_micro_batches):
        if action is not None:  # a time slot in which torch lets the rank wait
            yield Action(_KINDS[action.computation_type.value], action.stage_index, action.microbatch_index)


def _torch_order(schedule: PipelineSchedule, rank: int, num_micro_batches: int) -> list[Any]:
    from torch.distributed.pipelining import schedules

    kinds: dict[str, Any] = {
        "interleaved-1f1b": schedules.ScheduleInterleaved1F1B,
        "zero-bubble": schedules.ScheduleInterleavedZeroBubble,
        "zero-bubble-v": schedules.ScheduleZBVZeroBubble,
    }
    theirs = object.__new__(kinds[schedule.name])  # the constructor asks for stages on process groups
    vars(theirs).update(
        pp_group_size=schedule.ranks,
        n_local_stages=schedule.virtual_stages,
        num_stages=schedule.num_stages,
        _num_stages=schedule.num_stages,
        _n_microbatches=num_micro_batches,
        microbatches_per_round=schedule.ranks,
    )
    return theirs._calculate_single_rank_operations(rank)


__all__ = ["Action", "ActionKind", "Message", "Order", "PipelineSchedule", "ScheduleName", "peak_activations"]
