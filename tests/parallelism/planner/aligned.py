"""A simple peer of the planners in waves: what HDP ranks run together gets one index on all of them.

Pipelines and shared experts need it. A wave holds at most one micro-batch of each HDP rank; a ring lies in one wave. All
pipelines follow one order (``pipeline.schedule``), whatever their number of micro-batches, so with rings and experts at
equal indices nobody can wait in a circle.

Rings and packs are placed by falling duration, each into the first wave in which all its ranks are free: what runs at the
same time then takes about the same time, and packs fill the gaps beside rings. The waves are put in the order small,
large, small: a pipeline fills and drains with small micro-batches, and neighbours are alike. That is a simple choice; no
order is compared with another.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from evermesh.parallelism.batch_plan import MicroBatch
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.errors import PlanInvalid
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.rank_work import Assignment
from evermesh.parallelism.simulator import micro_batch_s

Wave = dict[int, MicroBatch]
"""By HDP rank."""


class _Unit(NamedTuple):
    """Micro-batches of several ranks that rings join, or of one rank."""

    seconds: float
    micro_batches: Wave


def align(assignment: Assignment, lengths: Sequence[int], layout: Layout, cost: CostModel) -> Assignment:
    """The micro-batches of every HDP rank in waves, with zero-token steps where a rank would be out of step.

    HDP ranks that share experts have equally many, with ``lock_step`` the index, and one choice of recomputation at each
    index. The others end with their last micro-batch; one that is in no ring either has no gaps.

    Raises:
        PlanInvalid: rings join two micro-batches of one rank.
    """
    units = _units(assignment, lengths, cost)
    waves = _small_large_small(_place(units))
    if layout.lock_step_groups:
        waves = [_with_one_recomputation(wave) for wave in waves]
    in_ring = {rank for unit in units if len(unit.micro_batches) > 1 for rank in unit.micro_batches}
    groups = {rank: group for group in layout.lock_step_groups for rank in group}
    return tuple(
        _in_lock_step(rank, groups[rank], waves, layout)
        if rank in groups
        else _alone(rank, waves, layout, keeps_gaps=rank in in_ring)
        for rank in range(layout.hdp)
    )


def _units(assignment: Assignment, lengths: Sequence[int], cost: CostModel) -> list[_Unit]:
    """What has to run together, longest first."""
    micro_batches = {(rank, index): mb for rank, mbs in enumerate(assignment) for index, mb in enumerate(mbs)}
    holders: dict[int, list[tuple[int, int]]] = {}
    for place, micro_batch in micro_batches.items():
        for piece in micro_batch.pieces:
            holders.setdefault(piece.sequence, []).append(place)
    units, seen = [], set[tuple[int, int]]()
    for first in sorted(micro_batches):
        if first in seen or not micro_batches[first].pieces:
            continue
        joined, to_visit = {first}, [first]
        while to_visit:
            for piece in micro_batches[to_visit.pop()].pieces:
                new = set(holders[piece.sequence]) - joined
                joined |= new
                to_visit += new
        seen |= joined
        unit = {rank: micro_batches[rank, index] for rank, index in sorted(joined)}
        if len(unit) < len(joined):
            raise PlanInvalid(
                f"rings join two micro-batches of one rank, among {sorted(joined)}: no wave can hold both."
            )
        units.append(_Unit(max(micro_batch_s(mb, lengths, cost) for mb in unit.values()), unit))
    return sorted(units, key=lambda unit: -unit.seconds)  # stable: by rank and index where equal


def _place(units: Sequence[_Unit]) -> list[Wave]:
    """First fit: every unit into the first wave in which all its ranks are free; waves from large to small."""
    waves: list[Wave] = []
    first_free: dict[int, int] = {}
    for unit in units:
        at = max(first_free.get(rank, 0) for rank in unit.micro_batches)
        while at < len(waves) and not waves[at].keys().isdisjoint(unit.micro_batches):
            at += 1
        if at == len(waves):
            waves.append({})
        waves[at].update(unit.micro_batches)
        for rank in unit.micro_batches:
            free = first_free.get(rank, 0)
            while free < len(waves) and rank in waves[free]:
                free += 1
            first_free[rank] = free
    return waves


def _small_large_small(waves: Sequence[Wave]) -> list[Wave]:
    """From waves that get smaller: every other one, rising, then the rest, falling."""
    return [*reversed(waves[1::2]), *waves[::2]]


def _with_one_recomputation(wave: Wave) -> Wave:
    chosen = max((micro_batch.recompute for micro_batch in wave.values()), key=lambda choice: choice == "block")
    return {rank: replace(micro_batch, recompute=chosen) for rank, micro_batch in wave.items()}


def _in_lock_step(rank: int, group: Sequence[int], waves: Sequence[Wave], layout: Layout) -> tuple[MicroBatch, ...]:
    """As many as the last of the group runs, numbered."""
    number = max((index + 1 for index, wave in enumerate(waves) if not wave.keys().isdisjoint(group)), default=0)
    return tuple(
        replace(wave.get(rank, _nothing(wave, layout)), lock_step=index) for index, wave in enumerate(waves[:number])
    )


def _alone(rank: int, waves: Sequence[Wave], layout: Layout, *, keeps_gaps: bool) -> tuple[MicroBatch, ...]:
    """Up to its last micro-batch."""
    number = max((index + 1 for index, wave in enumerate(waves) if rank in wave), default=0)
    return tuple(wave.get(rank, _nothing(wave, layout)) for wave in waves[:number] if keeps_gaps or rank in wave)


def _nothing(wave: Wave, layout: Layout) -> MicroBatch:
    """A step without tokens, which recomputes as its wave does: its experts communicate as often."""
    choices = {micro_batch.recompute for micro_batch in wave.values()}
    return MicroBatch((), recompute=choices.pop() if len(choices) == 1 else layout.recompute)


__all__ = ["Assignment", "align"]
