"""What the trainer of one rank asks at certain places of a step, in runs that were given faults; others have none of it."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from evermesh.fault.errors import EventLogUnusable, InjectedFault
from evermesh.fault.injection.flipping import choose_bit
from evermesh.fault.injection.rotting import choose_byte
from evermesh.fault.injection.schedule import AtStep, Flip, Hang, Kill, Phase, Poison, Raise, Shot, Slow, Stop
from evermesh.fault.injection.telling import fired_shots, tell

_FOREVER_S = 1 << 30

Tensors = Callable[[], Mapping[str, Sequence[Tensor]]]
"""Live tensors of a rank by name."""


class Injector:
    """The shots that one rank fires at itself.

    A shot is fired once in the life of a run: what the event log says was fired is not fired again after a restart. What
    cannot be written down there is not injected.

    Args:
        shots: of the whole run.
        rank: who this is.
        events: the event log of the run.
    """

    def __init__(self, shots: Sequence[Shot], rank: int, events: Path) -> None:
        self._events, self._rank = events, rank
        self._parameters: Tensors = dict
        self._gradients: Tensors = dict
        self._told = fired_shots(events)
        mine = [shot for shot in shots if shot.is_inside and shot.victim is not None and shot.victim.which == rank]
        self._left = [shot for shot in mine if shot.number not in self._told and not isinstance(shot.fault, Slow)]
        self._slow = [shot for shot in mine if isinstance(shot.fault, Slow)]
        self._poison: Shot | None = None
        self.memory: Path | None = None
        """Where the keeper of this node holds snapshots; None: this rank leaves none."""
        self._step = 0
        self._began_s = time.monotonic()

    def attach(self, parameters: Tensors, gradients: Tensors) -> None:
        """What bits can be flipped in, from now on: parameters that this rank owns, and gradients of its own batch."""
        self._parameters, self._gradients = parameters, gradients

    def reach(self, phase: Phase, step: int) -> None:
        """The rank is at this place of ``step``. It may not return.

        Raises:
            InjectedFault: a shot says so.
        """
        if phase == "forward":
            self._began_s = time.monotonic()
            self._poison = None
        self._step = step
        if phase == "all-reduce":
            self._slow_down()
        for shot in self._due(phase):
            self._fire(shot)

    def through(self, output: Tensor) -> Tensor:
        """``output`` of a model; when its gradient arrives the rank is in a backward pass."""
        if output.requires_grad and self._due("backward"):
            output.register_hook(lambda _: self.reach("backward", self._step))
        return output

    def spoil(self, loss: Tensor) -> Tensor:
        """The loss of one micro-batch as it is to go on."""
        shot = self._poison
        if shot is None or not loss.requires_grad:
            return loss
        assert isinstance(shot.fault, Poison)
        factor = float("nan") if shot.fault.factor is None else shot.fault.factor
        return loss * factor if shot.number in self._told or self._tell(shot, f"the loss times {factor:g}") else loss

    def _due(self, phase: Phase) -> list[Shot]:
        """The shots for this place: of a fault that happens several times, only the next one."""
        found: dict[int, Shot] = {}
        for shot in self._left:
            if _is_at(shot, phase, self._step):
                found.setdefault(shot.of_fault, shot)
        return list(found.values())

    def _fire(self, shot: Shot) -> None:
        fault = shot.fault
        match fault:
            case Poison():
                self._left.remove(shot)
                self._poison = shot  # told where it is done: a rank may have no token in this step
            case Flip() if fault.is_of_snapshot:
                byte = choose_byte(fault, self.memory, self._rank, shot.seed)
                if self._tell(shot, str(byte)):
                    byte.flip()
            case Flip():
                bit = choose_bit(
                    fault, self._parameters() if fault.what == "parameter" else self._gradients(), shot.seed
                )
                if self._tell(shot, str(bit)):
                    bit.flip()
            case Kill() if self._tell(shot):
                os.kill(os.getpid(), signal.Signals[fault.signal])
            case Stop() if self._tell(shot):
                os.kill(os.getpid(), signal.SIGSTOP)
            case Raise() if self._tell(shot):
                raise InjectedFault(fault.text)
            case Hang() if self._tell(shot):
                _hang(holds_gil=fault.holds_gil)

    def _slow_down(self) -> None:
        """Let the computation of this step, which is over, take longer."""
        computed_s = time.monotonic() - self._began_s
        for shot in self._slow:
            assert isinstance(shot.fault, Slow)
            assert isinstance(shot.at, AtStep)
            if 0 <= self._step - shot.at.step < shot.fault.steps and (shot.number in self._told or self._tell(shot)):
                time.sleep(computed_s * (shot.fault.factor - 1) + shot.fault.sleep_s)

    def _tell(self, shot: Shot, what: str = "") -> bool:
        """Write down that ``shot`` is fired now; whether that could be done."""
        if shot in self._left:
            self._left.remove(shot)
        try:
            tell(self._events, shot, self._step, os.getpid(), what)
        except EventLogUnusable as error:
            print(f"not injected: {shot}: {error}", file=sys.stderr, flush=True)
            return False
        self._told.add(shot.number)
        return True


def _is_at(shot: Shot, phase: Phase, step: int) -> bool:
    """Whether ``shot`` is for this place of this step."""
    assert isinstance(shot.at, AtStep)
    if phase == "restore":
        return shot.at.phase == "restore" and step >= shot.at.step
    if isinstance(shot.fault, Flip) and shot.fault.what == "gradient":
        return phase == "all-reduce" and step == shot.at.step
    return shot.at.phase == phase and step == shot.at.step


def _hang(*, holds_gil: bool) -> None:
    """Never return."""
    while True:
        if holds_gil:
            ctypes.PyDLL(None).sleep(_FOREVER_S)  # called without giving the interpreter's lock back
        time.sleep(_FOREVER_S)
