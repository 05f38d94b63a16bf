"""What a controller tells about its job: the answer of ``GET /api/status``; imports no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

JobState = Literal[
    "placing", "starting", "training", "stopping", "recovering", "waiting", "finished", "stopped", "failed"
]
"""Drawn in the README of the launcher. The last three are the end."""
ENDED: tuple[JobState, ...] = ("finished", "stopped", "failed")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class RankStatus(_Frozen):
    """One worker of the current attempt."""

    rank: int
    node: str
    pid: int | None = None
    state: Literal["starting", "training", "done", "failed", "ended"]
    step: int | None = None
    """Steps that it finished; None before the first one of this attempt."""
    step_s: float | None = None
    """Wall time of its last step, seconds."""
    compute_s: float | None = None
    """The part before it met the others to sum gradients, seconds."""


class NodeStatus(_Frozen):
    """One node and its agent."""

    node: str
    host: str = ""
    address: str = ""
    """Where its ranks are reached."""
    pid: int | None = None
    """Process of the agent."""
    state: Literal["joining", "ready", "cut off", "lost"]
    """``cut off``: its agent is not heard, but training goes on."""
    is_spare: bool = False
    lease_left_s: float | None = None
    """Seconds until it counts as lost, unless its agent is heard; None before it joined."""
    ranks: tuple[int, ...] = ()
    memory_free_bytes: int | None = None
    shared_memory_bytes: int | None = None
    """Size of its shared-memory area."""


class JobStatus(_Frozen):
    """One job at one moment."""

    name: str
    directory: str
    state: JobState
    reason: str
    """Why it is in this state."""
    generation: int
    """Attempts so far, this one included."""
    restarts: int
    """Restarts so far."""
    max_restarts: int
    workers: int
    nodes: tuple[NodeStatus, ...] = ()
    ranks: tuple[RankStatus, ...] = ()
    step: int | None = None
    steps: int | None = None
    """Steps of the whole run; None for a script."""
    loss: float | None = None
    tokens_per_s: float | None = None
    time_left_s: float | None = None
    started_s: float
    """Wall clock, seconds since 1970."""
    pid: int
    """Process of the controller."""
