"""Chooses how many waves a batch is run in, how large each is, and in which order: small, large, small.

A pipeline fills and drains with its first and last micro-batches, so these are small. With P stages, a backward pass of
twice a forward pass, and S the forward time of the waves before one, the last stage of 1F1B never waits for a forward
pass that takes at most f1 + 2 S / (P - 1): waves may grow by (P + 1) / (P - 1) each. Towards the end every wave lacks a
little less than the wave after it; that is the shape that a linear program gives for the best sizes, which the benchmark
solves (bench_pipeline_planner). Each small wave costs the fixed time of a micro-batch. The search weighs the one against the
other: it replays one pipeline whose waves all have their sizes.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from evermesh.parallelism.pipeline.schedule import PipelineSchedule
from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.pipelines.problem import Flags, Integers, Machine, Waves
from evermesh.parallelism.planner.pipelines.replay import Gangs, Orders, pack_orders, replay_ticks

_SIZES = (1000, 700, 500, 350, 250, 180, 120, 80, 50, 30)
"""Of the first and the last wave, in thousandths of a full one."""
_RISES = (1150, 1200, 1240, 1280, 1330, 1400, 1500, 1700, 2000)
"""Of one wave to the next, in thousandths."""
_FALLS = (300, 500, 650, 750, 800, 850, 875, 900, 920, 940, 960)
"""How much of what a wave lacks of a full one the wave before it lacks, in thousandths."""
_MOST_WAVES = 512


class Demand(NamedTuple):
    """What a batch asks of waves of one size."""

    target: int
    """Ticks of a full wave, without its fixed cost."""
    room: int
    """Tokens of a full micro-batch."""
    recomputed: bool
    area: int
    """Ticks of all ranks together, of what fits into full waves."""
    room_ticks: int
    """Ticks of a micro-batch of whole sequences that has no room left."""
    tokens: int
    """Of an HDP rank, on average."""
    hill: tuple[int, ...]
    """Ticks of the larger waves that rings need which no ring size makes short enough; falling."""


class Shape(NamedTuple):
    """Of the sequence of waves."""

    first: int = 7
    """Index into the sizes that a first wave may have."""
    rise: int = 2
    last: int = 8
    fall: int = 7
    hill: int = 1
    """Where the larger waves are rising: 0 all, 1 half of them, 2 none."""


class Profile(NamedTuple):
    """Waves in the order in which pipelines run them."""

    waves: Waves
    estimate: int
    """Ticks until the last stage is done, if every rank's micro-batches have their wave's size."""


def search(demand: Demand, machine: Machine, sweeps: int) -> tuple[Shape, int]:
    """The best shape for full waves of one size, and its estimate; coordinate descent of at most so many ``sweeps``."""
    seen: dict[Shape, int] = {}

    def look_at(shape: Shape) -> int:
        if shape not in seen:
            seen[shape] = profile_of(demand, shape, machine).estimate
        return seen[shape]

    best = Shape() if machine.schedule.ranks > 1 else Shape(0, 0, 0, 0, 1)
    choices = {"last": len(_SIZES), "fall": len(_FALLS), "first": len(_SIZES), "rise": len(_RISES), "hill": 3}
    for _ in range(sweeps if machine.schedule.ranks > 1 else 0):
        before = best
        for field, number in choices.items():
            if field == "hill" and not demand.hill:
                continue
            shapes = [best._replace(**{field: index}) for index in range(number)]
            best = min(shapes, key=lambda shape: (look_at(shape), shape))
        if best == before:
            break
    return best, look_at(best)


def profile_of(demand: Demand, shape: Shape, machine: Machine, slack: int = 1000) -> Profile:
    """Waves of that shape with enough full ones for all of the batch; all as many thousandths of that as ``slack`` says."""
    rising = list(_rising(demand.target, _SIZES[shape.first], _RISES[shape.rise]))
    falling = list(_falling(demand.target, _SIZES[shape.last], _FALLS[shape.fall]))[::-1]
    ramps = sum(rising) + sum(falling)
    left = demand.area / machine.speed - ramps
    # sequences that are short take least time for their tokens; even these have to find room
    most = min(demand.target, demand.room_ticks)
    room_left = demand.tokens * demand.room_ticks / demand.room - sum(min(wave, most) for wave in [*rising, *falling])
    room_left -= len(demand.hill) * demand.room_ticks
    full = max(-int(-left // demand.target), -int(-room_left // most), 0 if rising or falling or demand.hill else 1)
    full = min(_MOST_WAVES, full)
    up, down = _hill(demand.hill, shape.hill)
    # full waves stand on both sides of the hill, and most behind it, where waves may only shrink slowly
    before = full // 3 if demand.hill else full
    targets = [*rising, *[demand.target] * before, *up, *down, *[demand.target] * (full - before), *falling]
    waves = waves_of([wave * slack // 1000 for wave in targets], demand, machine)
    return Profile(waves, estimate(waves.targets, waves.recomputed, machine))


def waves_of(targets: list[int], demand: Demand, machine: Machine) -> Waves:
    """Waves of these sizes; those that fit keep their activations."""
    sizes = np.array(targets, dtype=np.int64)
    kept_ticks = demand.room_ticks * machine.keep_room // demand.room
    recomputed = np.where(sizes > min(demand.target - 1, kept_ticks), demand.recomputed, machine.keep_room == 0)
    if demand.recomputed:
        room = np.where(recomputed, demand.room, machine.keep_room)
    else:
        room = np.full(sizes.shape, demand.room, dtype=np.int64)
    return Waves(sizes, room.astype(np.int64), recomputed.astype(np.bool_))


def estimate(targets: Integers, recomputed: Flags, machine: Machine) -> int:
    """Ticks until the last stage is done."""
    ticks = stage_ticks(targets + machine.fixed, recomputed, machine.schedule.num_stages)
    number = len(targets)
    return wave_replay(pack_estimate(machine.schedule, number), ticks)


@functools.lru_cache(maxsize=512)
def pack_estimate(schedule: PipelineSchedule, number: int) -> Orders:
    """The orders for ``number`` micro-batches, or nearly so where gradients of weights may move."""
    if not schedule.splits_backward or number & (number - 1) == 0:
        return pack_orders(schedule, (number,))
    actions, firsts, rank_of = pack_estimate(schedule, 1 << number.bit_length())
    kept = actions[:, 2] < number
    before = np.concatenate(([0], np.cumsum(kept)))
    return Orders(actions[kept], before[firsts], rank_of)


@compiled
def stage_ticks(ticks: Integers, recomputed: Flags, num_stages: int) -> Integers:
    """[..., micro-batch, kind]: what every kind of action takes in one stage."""
    parts = np.empty((ticks.size, 4), dtype=np.int64)
    for index in range(ticks.size):
        again = int(recomputed[index])
        one = ticks[index] // (num_stages * (3 + again))
        parts[index, 0] = one
        parts[index, 1] = one * (2 + again)
        parts[index, 2] = one * (1 + again)
        parts[index, 3] = one
    return parts


@compiled
def wave_replay(orders: Orders, ticks: Integers) -> int:
    """``replay_ticks`` of one pipeline; ``ticks`` are [micro-batch, kind]."""
    number = ticks.shape[0]
    alone = np.zeros((number, 1), dtype=np.int64)
    gangs = Gangs(alone, alone + 1, alone)
    return replay_ticks(orders, np.zeros(1, dtype=np.int64), ticks.reshape((1, number, 4)), gangs)


def _rising(target: int, size: int, rate: int) -> Iterator[int]:
    """Waves below ``target`` that grow geometrically."""
    wave = target * size // 1000
    while wave < target:
        yield max(1, wave)
        wave = max(wave + 1, wave * rate // 1000)


def _falling(target: int, size: int, rate: int) -> Iterator[int]:
    """Waves below ``target``, the last first; what they lack of it falls geometrically."""
    lacking = target * (1000 - size) // 1000
    while lacking * 40 > target:
        yield max(1, target - lacking)
        lacking = lacking * rate // 1000


def _hill(falling: tuple[int, ...], shape: int) -> tuple[list[int], list[int]]:
    """The rising and the falling side."""
    if shape == 0:
        return list(falling[::-1]), []
    return (list(falling[1::2][::-1]), list(falling[::2])) if shape == 1 else ([], list(falling))
