"""What an agent and the controller say to each other: one JSON object per WebSocket message; imports no torch.

Both sides refuse unknown kinds and fields. Whatever belongs to an attempt names its generation: an agent does nothing
that an older generation asks for, and the controller ignores what an older one reports.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter

from evermesh.launcher.policy import Failure


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Store(_Message):
    """Where the ranks of a generation meet."""

    host: str
    port: int


class RankBeat(_Message):
    """How far a rank is, read from outside."""

    rank: int
    pid: int
    step: int
    """Steps it finished; 0 before the first one of this generation."""
    step_s: float
    compute_s: float


class Outcome(_Message):
    """What became of the ranks of a generation on one node, so far."""

    generation: int
    done: dict[int, dict[str, Any]] = Field(default_factory=dict)
    """By rank: what it returned."""
    failures: tuple[Failure, ...] = ()
    is_over: bool = False
    """No process of it is left on the node."""


class SnapshotPart(_Message):
    """What a rank left in the memory of its node."""

    rank: int
    generation: int
    """Of the attempt that made it."""
    step: int
    shard_map: str
    """Digest."""
    world_size: int | None = None
    """Ranks of the attempt; None: the node does not know."""


class KeeperAt(_Message):
    """Where ranks of other nodes read what the keeper of a node has."""

    host: str
    port: int


class InMemory(_Message):
    """The snapshots that the keeper of a node has, or has left."""

    launch: str
    """Which launch they belong to; those of another are of no use."""
    parts: tuple[SnapshotPart, ...] = ()
    keeper: KeeperAt | None = None


# from the agent


class Hello(_Message):
    """The first message of a connection: who I am and what runs here."""

    kind: Literal["hello"] = "hello"
    node: str
    host: str
    address: str
    pid: int
    outcome: Outcome | None = None
    """Of the generation that runs here or ran here last."""
    shared_memory_bytes: int = 0
    in_memory: InMemory | None = None


class Beat(_Message):
    """I live; renews the lease."""

    kind: Literal["beat"] = "beat"
    generation: int
    ranks: tuple[RankBeat, ...] = ()
    memory_free_bytes: int
    keeper: KeeperAt | None = None


class StoreOpened(_Message):
    """The store for ``generation`` listens."""

    kind: Literal["store_opened"] = "store_opened"
    generation: int
    store: Store


class Started(_Message):
    """The ranks of a generation have been started."""

    kind: Literal["started"] = "started"
    generation: int
    pids: dict[int, int]
    fresh_because: str | None = None
    """Why they are fresh interpreters instead of forks of the warm process; None: they are forks."""


class Report(_Message):
    """What a rank reported, usually a step."""

    kind: Literal["report"] = "report"
    generation: int
    values: dict[str, Any]


class PlanReport(_Message):
    """The plan of the batch that is being trained, now and then."""

    kind: Literal["plan"] = "plan"
    generation: int
    values: dict[str, Any]


class Progress(_Message):
    """Something about the ranks of a generation has changed."""

    kind: Literal["progress"] = "progress"
    outcome: Outcome
    in_memory: InMemory | None = None
    """When it is over."""


class Preempted(_Message):
    """The agent got a signal that announces the end of its node."""

    kind: Literal["preempted"] = "preempted"
    signal: int


class CannotStart(_Message):
    """What was asked for cannot be done on this node."""

    kind: Literal["cannot_start"] = "cannot_start"
    generation: int
    text: str


FromAgent = Annotated[
    Hello | Beat | StoreOpened | Started | Report | PlanReport | Progress | Preempted | CannotStart,
    Field(discriminator="kind"),
]
FromAgentAdapter: TypeAdapter[FromAgent] = TypeAdapter(FromAgent)


# to the agent


class TrainingWork(_Message):
    """Workers of ours: ``MODULE:FUNCTION``, run as ``function(worker, **arguments)`` in forks of the warm process."""

    kind: Literal["training"] = "training"
    entry: str
    arguments: dict[str, Any]
    logs: str
    launch: str | None = None
    """Ranks leave snapshots with a keeper that keeps them for this launch; None: they leave none."""
    keepers: tuple[KeeperAt, ...] = ()
    """Of the nodes of the job, also of some that are lost: their memory may be there."""


class Place(_Message):
    """The ranks of one node."""

    first_rank: int
    ranks: int
    world_size: int
    node_rank: int
    nodes: int


class OpenStore(_Message):
    """Let the ranks of this generation meet on your node."""

    kind: Literal["open_store"] = "open_store"
    generation: int


class Start(_Message):
    """Start these ranks."""

    kind: Literal["start"] = "start"
    generation: int
    place: Place
    store: Store
    work: TrainingWork


class Ask(_Message):
    """Ask the ranks to save, or to save and return."""

    kind: Literal["ask"] = "ask"
    generation: int
    what: Literal["save", "stop"]


class ChangeLayout(_Message):
    """Have the ranks go on with these changes to their layout, behind the step under way."""

    kind: Literal["change_layout"] = "change_layout"
    generation: int
    changes: dict[str, JsonValue]


class End(_Message):
    """End all ranks at once; before that, with ``stacks_because``, write down what they are doing."""

    kind: Literal["end"] = "end"
    generation: int
    stacks_because: str | None = None


class WriteStacks(_Message):
    """Write down what every rank is doing; they go on."""

    kind: Literal["write_stacks"] = "write_stacks"
    because: str


class Leave(_Message):
    """The job is over, or the node is not needed any more: end everything and exit."""

    kind: Literal["leave"] = "leave"


ToAgent = Annotated[OpenStore | Start | Ask | ChangeLayout | End | WriteStacks | Leave, Field(discriminator="kind")]
ToAgentAdapter: TypeAdapter[ToAgent] = TypeAdapter(ToAgent)
