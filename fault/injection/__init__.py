"""Faults as data: what happens to whom and when, checked before a run starts, injected only where a run was given it."""

from evermesh.fault.injection.checking import RunShape, resolve
from evermesh.fault.injection.drawing import KINDS, draw
from evermesh.fault.injection.schedule import (
    AfterSeconds,
    AtStep,
    Cut,
    Delay,
    Fault,
    Fill,
    Flip,
    Hang,
    Injection,
    Kill,
    Poison,
    Raise,
    Schedule,
    Shot,
    Slow,
    Stop,
    Target,
)

__all__ = [
    "KINDS",
    "AfterSeconds",
    "AtStep",
    "Cut",
    "Delay",
    "Fault",
    "Fill",
    "Flip",
    "Hang",
    "Injection",
    "Kill",
    "Poison",
    "Raise",
    "RunShape",
    "Schedule",
    "Shot",
    "Slow",
    "Stop",
    "Target",
    "draw",
    "resolve",
]
