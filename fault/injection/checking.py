"""A schedule against the run that it is for: everything wrong with it is told before anything starts."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from evermesh.fault.errors import ScheduleInvalid
from evermesh.fault.injection.schedule import (
    AtStep,
    Fault,
    Fill,
    Flip,
    Injection,
    Kill,
    Poison,
    Schedule,
    Shot,
    Slow,
    Stop,
    Target,
)

_TO_LAUNCHER = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
"""What it answers; any other signal would end the report too."""


@dataclass(frozen=True, slots=True)
class RunShape:
    """What a schedule must fit."""

    workers: int
    nodes: int
    steps: int
    """The last step of this attempt."""
    checkpoint_every: int | None
    """Steps; None: only the last one is saved."""

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due behind ``step``."""
        return step == self.steps or bool(self.checkpoint_every and step % self.checkpoint_every == 0)


def resolve(schedule: Schedule, shape: RunShape) -> Injection:
    """The shots of ``schedule`` in a run of this shape; what was left to chance follows from its seed.

    Raises:
        ScheduleInvalid: it does not fit the run; names every fault with what is wrong.
    """
    problems = [
        (f"faults.{number}.{key}", text)
        for number, fault in enumerate(schedule.faults)
        for key, text in _problems(fault, shape)
    ]
    if problems:
        raise ScheduleInvalid(problems)
    shots: list[Shot] = []
    for of_fault, fault in enumerate(schedule.faults):
        for occurrence in range(fault.times):
            seed = f"{schedule.seed}-{of_fault}-{occurrence}"
            for victim in _victims(fault, shape, seed):
                at = _moment(fault, occurrence)
                shots.append(
                    Shot(
                        number=len(shots), of_fault=of_fault, fault=fault, victim=victim, at=at, seed=f"{seed}-{victim}"
                    )
                )
    return Injection(schedule=schedule, shots=tuple(shots))


def _moment(fault: Fault, occurrence: int) -> "AtStep | object":
    name = "step" if isinstance(fault.at, AtStep) else "seconds"
    return fault.at.model_copy(update={name: getattr(fault.at, name) + occurrence * fault.every})


def _victims(fault: Fault, shape: RunShape, seed: str) -> Iterator[Target | None]:
    if isinstance(fault, Fill):
        yield None
        return
    target = fault.target
    count = shape.workers if target.of == "rank" else shape.nodes
    if target.which == "all":
        yield from (Target(of=target.of, which=number) for number in range(count))
    elif target.which == "any":
        yield Target(of=target.of, which=random.Random(seed).randrange(count))
    else:
        yield target


def _problems(fault: Fault, shape: RunShape) -> Iterator[tuple[str, str]]:
    """Everything that is wrong with one fault: key and text."""
    if not isinstance(fault, Fill):
        yield from _target_problems(fault, shape)
    if isinstance(fault.at, AtStep):
        yield from _step_problems(fault, fault.at, shape)
        return
    if not _has_outside(fault):
        yield "at.seconds", f"{fault.kind} happens inside a rank: give at.step"
    if fault.times > 1 and not fault.every:
        yield "every", f"{fault.times} times at the same second; set the seconds from one to the next"


def _target_problems(fault: Fault, shape: RunShape) -> Iterator[tuple[str, str]]:
    assert not isinstance(fault, Fill)
    target, allowed = fault.target, _allowed(fault)
    if target.of not in allowed:
        yield "target", f"{fault.kind} does not hit {target}; it hits {', '.join(allowed)}"
    elif isinstance(target.which, int):
        count = shape.workers if target.of == "rank" else shape.nodes
        if target.which >= count:
            name = f"{target.of}s"
            yield "target", f"{target} is none of the {count} {name} of this job (0 to {count - 1})"
    if isinstance(fault, Kill) and target.of == "launcher" and fault.signal not in _TO_LAUNCHER:
        yield "signal", f"{fault.signal} would end who writes the report; the launcher takes {', '.join(_TO_LAUNCHER)}"


def _allowed(fault: Fault) -> tuple[str, ...]:
    """What a kind of fault can hit."""
    if isinstance(fault, Kill):
        return ("rank", "node", "agent", "keeper", "controller", "head", "launcher", "job")
    if isinstance(fault, Stop):
        return ("rank", "node", "agent", "keeper", "controller")
    if isinstance(fault, Slow):
        return ("rank", "node")
    return ("node",) if fault.kind in ("cut", "delay") else ("rank",)


def _has_outside(fault: Fault) -> bool:
    """Whether it can be done from outside the ranks."""
    return fault.kind in ("kill", "stop", "cut", "delay", "fill")


def _step_problems(fault: Fault, at: AtStep, shape: RunShape) -> Iterator[tuple[str, str]]:
    last = at.step + (fault.times - 1) * fault.every
    if last > shape.steps:
        told = f"step {last}" if fault.times == 1 else f"the last time is step {last}"
        yield "at.step", f"{told}, but the run ends with step {shape.steps}"
    if at.phase == "forward":
        return
    if isinstance(fault, Slow | Flip | Poison):
        yield "at.phase", f"{fault.kind} has its own place in a step; leave phase out"
    elif isinstance(fault, Fill) or fault.target.of != "rank":
        yield "at.phase", "only a rank can be hit at a place of a step; leave phase out"
    elif at.phase in ("copy", "write"):
        steps = [at.step + number * fault.every for number in range(fault.times)]
        idle = [step for step in steps if not shape.saves(step)]
        if idle:
            due = f"one is due every {shape.checkpoint_every} steps and" if shape.checkpoint_every else "one is due"
            yield "at.step", f"no checkpoint is due at step {idle[0]}: {due} behind the last step, {shape.steps}"
