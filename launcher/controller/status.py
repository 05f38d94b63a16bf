"""What a controller tells about its job: the answer of ``GET /api/status``; imports no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from evermesh.fault.events import Finding
from evermesh.fault.hardware.model import NodeHardware
from evermesh.parallelism.fabric.cards import Setting

JobState = Literal[
    "placing",
    "starting",
    "training",
    "regrouping",
    "stopping",
    "recovering",
    "waiting",
    "finished",
    "stopped",
    "failed",
]
"""Drawn in the README of the launcher. The last three are the end."""
ENDED: tuple[JobState, ...] = ("finished", "stopped", "failed")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


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
    state: Literal["joining", "ready", "refused", "cut off", "lost"]
    """``refused``: it is not fit for a job; ``cut off``: its agent is not heard, but training goes on."""
    is_spare: bool = False
    known_as: str | None = None
    """In the cluster store: HOST/PLACE."""
    aside: str | None = None
    """Why the job uses it no more, or not again; None: it may."""
    lease_left_s: float | None = None
    """Seconds until it counts as lost, unless its agent is heard; None before it joined."""
    ranks: tuple[int, ...] = ()
    memory_free_bytes: int | None = None
    shared_memory_bytes: int | None = None
    """Size of its shared-memory area."""
    snapshot_bytes: int = 0
    """That its keeper holds snapshots in, and parity of others'."""
    hardware: NodeHardware | None = None
    """Its network cards, GPUs and rack; None: not told yet."""
    settings: tuple[Setting, ...] = ()
    """Variables of NCCL and gloo for its ranks, where its environment does not set them."""


class DelayStatus(_Frozen):
    """How long messages of one node to another took lately: a cell of the delay matrix."""

    source: str
    target: str
    ratio: float
    """Times as long as between nodes in the middle."""
    messages: int
    """That were compared."""


Standing = Literal["none", "protected", "degraded"]
"""Of snapshots in the memory of other nodes."""


class SnapshotStatus(_Frozen):
    """The state in the memory of the nodes, and what a restart would lose now."""

    is_on: bool
    """The run wants snapshots; whether there is room for them the event log tells."""
    step: int | None = None
    """Of the newest that all ranks hold; None: there is none."""
    age_steps: int | None = None
    age_s: float | None = None
    every: int | None = None
    """Steps between two, as chosen or configured; None: not known yet."""
    committed: int = 0
    """Complete on all ranks, in this attempt, as the next two."""
    skipped: int = 0
    """Not begun, because the one before was not complete."""
    lost: int = 0
    """Begun, and given up because a rank lost its keeper."""
    source: Literal["memory", "storage", "nothing"] = "nothing"
    """Where a restart would get the state from; ``nothing``: training would begin anew."""
    lost_steps: int = 0
    """Steps that would be trained again if all workers were started again."""
    lost_s: float = 0.0
    """The time of so many steps like the last one, seconds."""
    lost_steps_of_node: int = 0
    """The same if a node were lost with its memory."""
    protection: Standing = "none"
    """Whether other nodes can make the memory of a lost one again; ``degraded``: of fewer than they should."""


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
    lost_rack: str | None = None
    """What the loss of one rack would cost; None: its nodes can be made again, or nothing is known of racks."""
    snapshot: SnapshotStatus | None = None
    """None before the first step of this controller."""
    findings: tuple[Finding, ...] = ()
    """What the records of the ranks say now, the surest first."""
    delays: tuple[DelayStatus, ...] = ()
    """Between nodes, the longest first, at most 1,024; none where no messages cross from node to node, as in sums."""
    started_s: float
    """Wall clock, seconds since 1970."""
    pid: int
    """Process of the controller."""
