"""A schedule of faults: what happens to whom, and when. Imports no torch.

    seed: 7
    faults:
      - {kind: kill, target: rank 1, at: {step: 5, phase: backward}}
      - {kind: stop, target: agent any, at: {seconds: 3}, continue_after_s: 2}
      - {kind: poison, target: rank 0, at: {step: 9}, factor: null}

A :class:`Schedule` is what a person writes. ``resolve`` checks it against a run and turns it into an :class:`Injection`: one
:class:`Shot` for every single fault, with nothing left to chance. All are frozen and serialised as JSON.
"""

import re
import signal as signals
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_serializer,
    model_validator,
)

Phase = Literal["forward", "backward", "all-reduce", "copy", "write", "restore"]
"""Where in a step: before its first micro-batch; in a backward pass; behind the last one, before gradients are summed; before
this rank copies its part of the state for a checkpoint, which others may have done already; when its copy is made, and is
being written; when the ranks have begun to restore a checkpoint or a snapshot."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AtStep(_Frozen):
    """In a step of a rank; for what is no rank, as soon as the step is finished."""

    step: PositiveInt
    """The first step of a run is 1. With phase ``restore``: a restart from a checkpoint or a snapshot of this step or a later
    one."""
    phase: Phase = "forward"

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}"


class AfterSeconds(_Frozen):
    """Some time after the first step of the run was finished."""

    seconds: NonNegativeFloat

    def __str__(self) -> str:
        return f"second {self.seconds:g}"


def _unit_of(value: Any) -> str:
    names = value if isinstance(value, dict) else getattr(value, "model_fields_set", ())
    return "seconds" if "seconds" in names else "step"


Moment = Annotated[
    Annotated[AtStep, Tag("step")] | Annotated[AfterSeconds, Tag("seconds")],
    Discriminator(_unit_of),
]

_TARGET = re.compile(r"(rank|node|agent|keeper) (\d+|any|all)|controller|head|launcher|job")


class Target(_Frozen):
    """Who is hit; written as ``rank 1``, ``node any`` (the seed chooses), ``agent all``, ``keeper 0`` (which holds
    the snapshots of node 0), ``controller``, ``head`` (it and the node that it counts to), ``launcher`` (who shows
    the job) or ``job`` (every process of it but the launcher). A node is its agent and all below it."""

    of: Literal["rank", "node", "agent", "keeper", "controller", "head", "launcher", "job"]
    which: NonNegativeInt | Literal["any", "all"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if not _TARGET.fullmatch(value):
            raise ValueError(
                f"{value!r} is no target; write rank 1, rank any, rank all, node 0, agent 0, keeper 0, controller, head, "
                "launcher or job"
            )
        of, _, which = value.partition(" ")
        return {"of": of, "which": int(which) if which.isdecimal() else which or None}

    @model_serializer
    def _write(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return self.of if self.which is None else f"{self.of} {self.which}"


def _signal_name(value: Any) -> Any:
    """``SIGKILL`` for 9, ``9``, ``KILL`` and ``SIGKILL``."""
    text = str(value)
    try:
        return (
            signals.Signals(int(text)).name
            if text.isdecimal()
            else signals.Signals[f"SIG{text.removeprefix('SIG')}"].name
        )
    except (ValueError, KeyError):
        raise ValueError(f"{value!r} is no signal of this system; write SIGKILL or 9") from None


class _Fault(_Frozen):
    at: Moment
    times: PositiveInt = 1
    """How often it happens."""
    every: NonNegativeInt = 0
    """Steps, or seconds, from one time to the next; 0: again when a restart has led back to the same step."""


class _OfRank(_Fault):
    target: Target = Target(of="rank", which="any")


class Kill(_OfRank):
    """A signal, any one."""

    kind: Literal["kill"] = "kill"
    signal: Annotated[str, BeforeValidator(_signal_name)] = "SIGKILL"


class Stop(_OfRank):
    """SIGSTOP."""

    kind: Literal["stop"] = "stop"
    continue_after_s: PositiveFloat | None = None
    """Seconds until SIGCONT; null: never."""


class Slow(_OfRank):
    """A rank computes its part of each step slower, or those of a node do: with ``node 1`` those that are placed on it, for
    as long as they are."""

    kind: Literal["slow"] = "slow"
    factor: Annotated[float, Field(ge=1)] = 1.0
    """Times as long."""
    sleep_s: NonNegativeFloat = 0.0
    """And so many seconds more."""
    steps: PositiveInt = 1
    """For so many steps, after a restart too."""

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.factor == 1.0 and self.sleep_s == 0.0:
            raise ValueError("factor 1 and sleep_s 0 slow nothing; set one of them")
        return self


class Cut(_Fault):
    """The way from a node to the controller carries nothing, and keeps its connections open."""

    kind: Literal["cut"] = "cut"
    target: Target = Target(of="node", which="any")
    for_s: PositiveFloat


class Delay(_Fault):
    """What passes between a node and the controller comes later, in both directions."""

    kind: Literal["delay"] = "delay"
    target: Target = Target(of="node", which="any")
    seconds: NonNegativeFloat = 0.0
    """Later by so much."""
    lost: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of it that is lost, and comes when it is sent again."""
    again_s: PositiveFloat = 0.2
    """Seconds until then."""
    for_s: PositiveFloat

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.seconds == 0.0 and self.lost == 0.0:
            raise ValueError("seconds 0 and lost 0 delay nothing; set one of them")
        return self


class Fill(_Fault):
    """A file takes all but some bytes of a file system, and is removed afterwards."""

    kind: Literal["fill"] = "fill"
    place: Literal["disk", "shm"] = "disk"
    """That of the run's directory, or /dev/shm."""
    free_bytes: NonNegativeInt = 0
    """What is left."""
    for_s: PositiveFloat
    most_bytes: PositiveInt = 1 << 30
    """A larger file is not made: a shared disk is not filled by mistake."""


class Flip(_OfRank):
    """One bit of what a rank holds."""

    kind: Literal["flip"] = "flip"
    what: Literal["parameter", "gradient", "snapshot", "header"] = "parameter"
    """A parameter that it owns, before the step; a gradient of its own batch, before the sum; its newest snapshot that is
    sealed, or the header of that one, in the memory of its node, before the step."""
    tensor: str | None = None
    """Name of the parameter; null: the seed chooses, as for the others. A snapshot has none."""
    element: NonNegativeInt | None = None
    """Of the tensor; of a snapshot or a header, a byte."""
    bit: NonNegativeInt | None = None
    """0 is the lowest of the mantissa, or of the byte."""

    @model_validator(mode="after")
    def _names_what_is_there(self) -> Self:
        if self.is_of_snapshot and self.tensor is not None:
            raise ValueError(f"tensor {self.tensor!r} is given, but a {self.what} has bytes; leave tensor out")
        return self

    @property
    def is_of_snapshot(self) -> bool:
        """Whether it changes no number that is trained with."""
        return self.what in ("snapshot", "header")


class Poison(_OfRank):
    """The loss of a rank's tokens in a step, and with it their gradient."""

    kind: Literal["poison"] = "poison"
    factor: float | None = None
    """What it is multiplied by; null: NaN."""


class Raise(_OfRank):
    """An exception."""

    kind: Literal["raise"] = "raise"
    text: str = "injected"


class Hang(_OfRank):
    """An endless loop."""

    kind: Literal["hang"] = "hang"
    holds_gil: bool = False
    """In a library that keeps the interpreter's lock: no thread of the process runs any more."""


Fault = Annotated[
    Kill | Stop | Slow | Cut | Delay | Fill | Flip | Poison | Raise | Hang,
    Field(discriminator="kind"),
]


class Schedule(_Frozen):
    """What is to go wrong in one run."""

    seed: int = 0
    """Of what is left to chance."""
    expect_exit: NonNegativeInt = 0
    """What the job is to end with."""
    faults: tuple[Fault, ...] = Field(min_length=1)


class Shot(_Frozen):
    """One fault that happens once, to one victim."""

    number: NonNegativeInt
    """Its place among the shots of an injection."""
    of_fault: NonNegativeInt
    """Place of its fault in the schedule."""
    fault: Fault
    victim: Target | None
    """Nothing left open; None: a file system."""
    at: Moment
    seed: str

    @property
    def is_inside(self) -> bool:
        """Whether ranks do it to themselves, at an exact place of a step."""
        is_of_rank = self.victim is not None and self.victim.of == "rank" and isinstance(self.at, AtStep)
        return is_of_rank or isinstance(self.fault, Slow)

    @property
    def alters_numbers(self) -> bool:
        """Whether losses and parameters may be others afterwards, though the run goes on."""
        return isinstance(self.fault, Poison) or (isinstance(self.fault, Flip) and not self.fault.is_of_snapshot)

    def __str__(self) -> str:
        extra = f" {self.fault.signal}" if isinstance(self.fault, Kill) and self.fault.signal != "SIGKILL" else ""
        return f"{self.fault.kind}{extra} {self.victim or getattr(self.fault, 'place', '')} at {self.at}"


class Injection(_Frozen):
    """The shots of one run, as its directory records them."""

    schedule: Schedule
    shots: tuple[Shot, ...]
