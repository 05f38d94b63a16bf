"""Faults of real ranks, and what only looks like one, as data: who, in which step, at which of its actions, and how much."""

import ctypes
import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fault.suite.programs import Action, Job

FOREVER_S = 600.0


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to one rank."""

    kind: str
    rank: int
    step: int
    """The first in which it happens; counts from 1."""
    place: float = 0.5
    """At which of the actions that it may happen to, as a share of them."""
    amount: float = 1.0
    """A factor, or seconds: see ``Fault.apply`` and ``links``."""
    peer: int = -1
    """The other end of a link."""

    def apply(self, job: Job, actions: list[Action], step: int) -> list[Action]:
        """What the rank does in ``step`` instead of ``actions``."""
        change = _CHANGES.get(self.kind)
        if change is not None and step >= self.step:
            return change(self, job, list(actions), step)
        if self.kind in HANGS and self.kind != "checkpoint" and step == self.step:
            at = _place(self, [index for index, one in enumerate(actions) if self._may_be_at(one)])
            return [*actions[:at], Action("fault"), *actions[at:]]
        return actions

    def _may_be_at(self, action: Action) -> bool:
        if self.kind == "data loader":
            return action.what == "load"
        return action.what not in ("load", "optimize")


def note(folder: Path, fault: Fault) -> None:
    """Write down that a fault happens now."""
    path = folder / "injected.json"
    if not path.exists():
        new = folder / "injected.json.new"
        new.write_text(json.dumps({"at_ns": time.monotonic_ns()}))
        new.rename(path)


def _endless_loop() -> None:
    until = time.monotonic() + FOREVER_S
    while time.monotonic() < until:
        pass


def _raise() -> None:
    raise RuntimeError("injected")


HANGS: dict[str, Callable[[], object]] = {
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "early exit": lambda: os._exit(0),
    "exception": _raise,
    "GIL held in C": lambda: ctypes.PyDLL(None).sleep(int(FOREVER_S)),
    "endless loop": _endless_loop,
    "data loader": lambda: time.sleep(FOREVER_S),
    "checkpoint": lambda: time.sleep(FOREVER_S),
}
"""What a rank does that comes no further; ``checkpoint`` behind its step, in the phase of that name."""


def _place(fault: Fault, allowed: list[int]) -> int:
    return allowed[min(int(fault.place * len(allowed)), len(allowed) - 1)]


def _collectives(actions: list[Action]) -> list[int]:
    return [index for index, one in enumerate(actions) if one.what == "collective"]


def _skip(fault: Fault, job: Job, actions: list[Action], step: int) -> list[Action]:
    if step == fault.step:
        actions[_place(fault, _collectives(actions))] = Action("fault")
    return actions


def _extra(fault: Fault, job: Job, actions: list[Action], step: int) -> list[Action]:
    if step == fault.step:
        at = _place(fault, _collectives(actions))
        actions[at:at] = [Action("fault"), actions[at]]
    return actions


def _other(**changes: Any) -> Callable[[Fault, Job, list[Action], int], list[Action]]:
    def change(fault: Fault, job: Job, actions: list[Action], step: int) -> list[Action]:
        if step == fault.step:
            of_sums = [index for index in _collectives(actions) if actions[index].operation == "all_reduce"]
            at = _place(fault, of_sums)
            actions[at : at + 1] = [Action("fault"), actions[at]._replace(**changes)]
        return actions

    return change


def _swap(fault: Fault, job: Job, actions: list[Action], step: int) -> list[Action]:
    """The last collective of a group and the first of the next one change places, with all that is between them."""
    if step == fault.step:
        at = _collectives(actions)
        pairs = [(a, b) for a, b in itertools.pairwise(at) if actions[a].axis != actions[b].axis]
        first, second = pairs[_place(fault, list(range(len(pairs))))]
        actions[first], actions[second] = actions[second], actions[first]
        actions.insert(first, Action("fault"))
    return actions


def _longer(actions: list[Action], factor: float) -> list[Action]:
    return [one._replace(seconds=one.seconds * factor) if one.what == "compute" else one for one in actions]


def _slow(fault: Fault, job: Job, actions: list[Action], step: int) -> list[Action]:
    return [Action("fault"), *_longer(actions, fault.amount)]


def _pauses(fault: Fault, job: Job, actions: list[Action], step: int) -> list[Action]:
    """In every fourth step, as for a collection of garbage."""
    if (step - fault.step) % 4:
        return actions
    at = _place(fault, [index for index, one in enumerate(actions) if one.what == "compute"])
    return [*actions[:at], Action("fault"), Action("compute", seconds=fault.amount), *actions[at:]]


def _long_sequence(fault: Fault, job: Job, actions: list[Action], step: int) -> list[Action]:
    """In every third step; the plan knows."""
    return _longer(actions, fault.amount) if step % 3 == 0 else actions


def is_long(fault: Fault, step: int) -> bool:
    """Whether ``long sequence`` makes this step longer for its rank."""
    return fault.kind == "long sequence" and step >= fault.step and step % 3 == 0


_CHANGES: dict[str, Callable[[Fault, Job, list[Action], int], list[Action]]] = {
    "skipped": _skip,
    "extra": _extra,
    "other operation": _other(operation="all_gather"),
    "other shape": _other(elements=3072),
    "other dtype": _other(dtype="int32"),
    "other order": _swap,
    "slow rank": _slow,
    "pauses": _pauses,
    "long sequence": _long_sequence,
}
