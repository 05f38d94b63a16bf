"""Schedules from a seed: many random faults, with a checkpoint between any two."""

import random
from collections.abc import Mapping, Sequence

from evermesh.fault.errors import ScheduleInvalid
from evermesh.fault.injection.checking import RunShape
from evermesh.fault.injection.schedule import (
    AtStep,
    Fault,
    Flip,
    Hang,
    Kill,
    Phase,
    Poison,
    Raise,
    Schedule,
    Slow,
    Stop,
    Target,
)

KINDS: Mapping[str, float] = {"kill": 4.0, "stop": 1.0, "slow": 1.0, "raise": 2.0}
"""Kinds that are drawn where nobody chooses, each with its rate. The others end a run, change its numbers, or cost
seconds until they are found."""
_PLACES: Sequence[Phase] = ("forward", "backward", "all-reduce", "copy", "write")
_KILLED: Mapping[str, float] = {"rank any": 6.0, "agent any": 1.0, "controller": 1.0, "rank all": 1.0}


def draw(seed: int, faults: int, shape: RunShape, kinds: Mapping[str, float] | None = None) -> Schedule:
    """A schedule of so many faults, of kinds with these rates, in a run of this shape.

    Between two of them a checkpoint is written for certain: three failures in a row without a new one end a job.

    Raises:
        ScheduleInvalid: the run is too short for so many, or a kind cannot be drawn.
    """
    rates = dict(kinds or KINDS)
    unknown = sorted(rates.keys() - _DRAWN.keys())
    if unknown:
        raise ScheduleInvalid([("kinds", f"{', '.join(unknown)} cannot be drawn; {', '.join(_DRAWN)} can")])
    every = shape.checkpoint_every or shape.steps
    intervals = shape.steps // every
    if 2 * faults - 1 > intervals:
        text = (
            f"{faults} faults, each with {every} steps (checkpoint.every) of its own and as many up to the next, need "
            f"{(2 * faults - 1) * every} steps; the run has {shape.steps}. Ask for at most {(intervals + 1) // 2}, or train "
            "longer"
        )
        raise ScheduleInvalid([("faults", text)])
    chance = random.Random(seed)
    # the save behind a free interval waits for the one before it
    chosen = [
        number + place for place, number in enumerate(sorted(chance.sample(range(intervals - faults + 1), faults)))
    ]
    found = []
    for interval in chosen:
        kind = chance.choices(list(rates), list(rates.values()))[0]
        at = _moment(chance, interval * every, every, is_exception=kind == "raise")
        # what is done from outside comes some steps later, and must not come too late
        found.append(
            _kill_rank(chance, at) if kind == "kill" and interval == intervals - 1 else _DRAWN[kind](chance, at)
        )
    return Schedule(seed=seed, faults=tuple(found))


def _moment(chance: random.Random, begin: int, every: int, *, is_exception: bool) -> AtStep:
    phase = chance.choice(_PLACES)
    # in the first step of an attempt an exception ends a job, and rightly so
    first = 2 if is_exception and every > 1 else 1
    step = begin + every if phase in ("copy", "write") else begin + chance.randint(first, every)
    return AtStep(step=step, phase=phase)


def _kill(chance: random.Random, at: AtStep) -> Fault:
    target = chance.choices(list(_KILLED), list(_KILLED.values()))[0]
    where = at if target.startswith("rank") else AtStep(step=at.step)
    return Kill(target=Target.model_validate(target), at=where)


def _kill_rank(chance: random.Random, at: AtStep) -> Fault:
    return Kill(at=at)


def _stop(chance: random.Random, at: AtStep) -> Fault:
    return Stop(at=at, continue_after_s=round(chance.uniform(0.1, 1.0), 2))


def _slow(chance: random.Random, at: AtStep) -> Fault:
    return Slow(at=AtStep(step=at.step), factor=round(chance.uniform(2.0, 10.0), 1), steps=chance.randint(1, 5))


def _raise(chance: random.Random, at: AtStep) -> Fault:
    return Raise(at=at)


def _hang(chance: random.Random, at: AtStep) -> Fault:
    return Hang(at=at, holds_gil=chance.random() < 0.5)


def _flip(chance: random.Random, at: AtStep) -> Fault:
    return Flip(at=AtStep(step=at.step), what="parameter" if chance.random() < 0.5 else "gradient")


def _poison(chance: random.Random, at: AtStep) -> Fault:
    factor = None if chance.random() < 0.5 else round(chance.uniform(10.0, 1000.0))
    return Poison(at=AtStep(step=at.step), factor=factor)


_DRAWN = {
    "kill": _kill,
    "stop": _stop,
    "slow": _slow,
    "raise": _raise,
    "hang": _hang,
    "flip": _flip,
    "poison": _poison,
}
