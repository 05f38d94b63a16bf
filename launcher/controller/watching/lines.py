"""What a controller and its watcher say to each other: a JSON object a line; imports no numpy.

Behind ``Told`` comes what an agent said, as it said it, in a line of its own: nobody but the watcher reads it.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from evermesh.fault.events import Finding
from evermesh.launcher.controller.status import DelayStatus
from evermesh.launcher.watching.messages import ReadRings


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Begin(_Line):
    """From now on it is about another generation."""

    kind: Literal["begin"] = "begin"
    generation: int
    num_ranks: int
    num_nodes: int


class Told(_Line):
    """The next line is what the agent of this node said."""

    kind: Literal["told"] = "told"
    node: str


class Step(_Line):
    """A step was reported."""

    kind: Literal["step"] = "step"
    step: int
    step_s: float


class LastStep(_Line):
    """What agents see of the last step; 0 before the first one."""

    kind: Literal["last_step"] = "last_step"
    step_s: float


ToWatcher = Annotated[Begin | Told | Step | LastStep, Field(discriminator="kind")]
ToWatcherAdapter: TypeAdapter[ToWatcher] = TypeAdapter(ToWatcher)


class Said(_Line):
    """What detectors say of the newest windows of all nodes: all of it, again and again."""

    kind: Literal["said"] = "said"
    generation: int
    findings: tuple[Finding, ...]
    delays: tuple[DelayStatus, ...]
    """Of messages between nodes, the longest first, as far as samples of records tell."""


class Problem(_Line):
    """Something was not understood, or not concluded."""

    kind: Literal["problem"] = "problem"
    text: str


FromWatcher = Annotated[Said | ReadRings | Problem, Field(discriminator="kind")]
FromWatcherAdapter: TypeAdapter[FromWatcher] = TypeAdapter(FromWatcher)
