"""What an agent and the controller say to each other: one JSON object per WebSocket message; imports no torch.

Both sides refuse unknown kinds and fields. Whatever belongs to an attempt names its generation: an agent does nothing
that an older generation asks for, and the controller ignores what an older one reports.
"""

from signal import Signals
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter
from pydantic.dataclasses import dataclass

from evermesh.fault.cluster.identity import NodeIdentity
from evermesh.fault.hardware.model import NodeHardware
from evermesh.fault.health.verdicts import Verdict
from evermesh.launcher.config import HangConfig
from evermesh.launcher.policy import Failure
from evermesh.launcher.succession.protocol import Seat
from evermesh.launcher.watching.messages import Connections, PlannedWork, ReadRings, RingPart, Window
from evermesh.parallelism.collectives import Point

_WIRE = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, **_WIRE)


class Store(_Message):
    """Where the ranks of a generation meet."""

    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True, config=_WIRE)
class RankBeat:  # there are as many as ranks: a model takes several times the memory
    """How far a rank is, read from outside."""

    rank: int
    pid: int
    step: int
    """Steps it finished; 0 before the first one of this generation."""
    step_s: float
    compute_s: float
    longest_s: float = 0.0
    """The longest of its last steps, seconds; 0 before the first one."""
    point: Point = "start-up"
    idle_s: float = 0.0
    """Since it has written down anything, or was seen to compute, or was held by a debugger."""
    stopped_s: float = 0.0
    """Since it is stopped, as by SIGSTOP."""


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


class ProtectedPart(_Message):
    """A snapshot that a stripe protects, as the keeper of one of its members knows it."""

    version: tuple[int, int, str]
    """Generation, step, and digest of the shard map."""
    stripe: str
    member: int
    code: str
    portions: tuple[tuple[tuple[int, int, int, int], ...], ...]
    """By member: of each of its ranks the rank, and the bytes of data, index and objects."""
    coded_bytes: tuple[int, ...]
    """By member: of these, that which it codes; the rest others hold too."""


class InMemory(_Message):
    """The snapshots that the keeper of a node has, or has left."""

    launch: str
    """Which launch they belong to; those of another are of no use."""
    parts: tuple[SnapshotPart, ...] = ()
    protected: tuple[ProtectedPart, ...] = ()
    """Of which the node can help to rebuild the parts of others."""
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
    guests: dict[str, InMemory] = Field(default_factory=dict)
    """By name: what the keepers hold that it hosts in the place of lost ones."""
    seat: Seat | None = None
    """Where it is asked about the journal; None: it has no part in that."""
    is_head: bool = False
    """It shares a machine with the first controller of the job."""
    metrics: str | None = None
    """Host and port where it serves numbers of its node; None: it does not."""
    verdicts: tuple[Verdict, ...] = ()
    """What was found out about the health of the node, all of it."""
    identity: NodeIdentity | None = None
    """As the cluster store knows it."""
    hardware: NodeHardware | None = None
    """Its network cards, GPUs and rack."""


class Beat(_Message):
    """I live; renews the lease."""

    kind: Literal["beat"] = "beat"
    generation: int
    ranks: tuple[RankBeat, ...] = ()
    memory_free_bytes: int
    shared_memory_free_bytes: int | None = None
    """Of its file system."""
    snapshot_bytes: int = 0
    """Memory that the keeper holds snapshots in, and parity of others'."""
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
    signal: Signals


class CannotStart(_Message):
    """What was asked for cannot be done on this node."""

    kind: Literal["cannot_start"] = "cannot_start"
    generation: int
    text: str


class Noticed(_Message):
    """Something for the event log has happened on this node."""

    kind: Literal["noticed"] = "noticed"
    event: str
    """Its kind there."""
    text: str


class HealthTold(_Message):
    """The health of this node is another than before."""

    kind: Literal["health"] = "health"
    verdicts: tuple[Verdict, ...]
    """All of them."""


class KeeperTells(_Message):
    """The keeper of the node has done what it was told, or cannot; or something about its stripe has changed."""

    kind: Literal["keeper"] = "keeper"
    generation: int
    guest: str | None = None
    """Which keeper, of those that the node hosts in the place of lost ones; None: its own."""
    epoch: int = 0
    """Of its place in a stripe; 0 without one."""
    about: Literal["listen", "join", "rebuild", "standing"]
    ok: bool
    """Done; of ``standing``: the newest snapshot is protected."""
    text: str = ""
    """Why it is not."""
    port: int | None = None
    """Where other keepers reach it at the address of the node."""
    step: int | None = None
    data_bytes: int = 0
    """Of the snapshot that is protected, on this node; 0: none is, as with the next two."""
    coded_bytes: int = 0
    """Of these, that which parity is made of; the rest other nodes hold too."""
    parity_bytes: int = 0
    """That this node keeps for others."""
    repaired: int = 0
    """Chunks of this node that were corrupt and are right now."""
    in_memory: InMemory | None = None


FromAgent = Annotated[
    Hello
    | Beat
    | StoreOpened
    | Started
    | Report
    | PlanReport
    | Progress
    | Preempted
    | CannotStart
    | Noticed
    | KeeperTells
    | Window
    | RingPart
    | Connections
    | PlannedWork
    | HealthTold,
    Field(discriminator="kind"),
]
FromAgentAdapter: TypeAdapter[FromAgent] = TypeAdapter(FromAgent)


# to the agent


class Welcome(_Message):
    """The first message of a connection: what follows is said in this term."""

    kind: Literal["welcome"] = "welcome"
    term: int


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
    records: bool = False
    """Ranks record their collectives."""


class Place(_Message):
    """The ranks of one node."""

    first_rank: int
    ranks: int
    world_size: int
    node_rank: int
    nodes: int


class Keep(_Message):
    """Have a keeper that other keepers can reach, before ranks are started."""

    kind: Literal["keep"] = "keep"
    generation: int
    launch: str


class HostGuest(_Message):
    """Have another keeper, in the place of one that was lost with its node, which other keepers can reach."""

    kind: Literal["host_guest"] = "host_guest"
    generation: int
    launch: str
    guest: str
    """What it is called."""
    version: tuple[int, int, str]
    """The snapshot that is to be rebuilt there: generation, step, and digest of the shard map."""
    ranks: tuple[int, ...]
    """Of the lost node."""


class EndGuest(_Message):
    """What this one keeps is not needed any more."""

    kind: Literal["end_guest"] = "end_guest"
    guest: str


class JoinStripe(_Message):
    """Have your keeper protect snapshots together with those of other nodes; they know each other by a secret of the job."""

    kind: Literal["join_stripe"] = "join_stripe"
    generation: int
    guest: str | None = None
    """A keeper that you host; None: that of the node."""
    epoch: int
    """Nothing that belongs to an earlier one is done any more."""
    stripe: str
    member: int
    code: str
    addresses: tuple[tuple[str, int], ...]
    ranks: tuple[int, ...]
    """Of this node."""
    bytes_per_s: float | None = None


class LeaveStripe(_Message):
    """Have your keeper protect nothing any more: there are too few nodes for a stripe."""

    kind: Literal["leave_stripe"] = "leave_stripe"
    generation: int


class Rebuild(_Message):
    """Have your keeper make a snapshot whole together with all others of its stripe."""

    kind: Literal["rebuild"] = "rebuild"
    generation: int
    guest: str | None = None
    """A keeper that you host; None: that of the node."""
    epoch: int
    protected: ProtectedPart
    timeout_s: float


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
    hang: HangConfig | None = None
    """When ranks count as frozen that no controller can be told about; None: nobody looks."""
    settings: dict[str, str] = Field(default_factory=dict)
    """Variables of NCCL and gloo on this node, where its environment does not set them."""


class Ask(_Message):
    """Ask the ranks to save, to save and return, or to return with the state in memory, for ranks that are started anew."""

    kind: Literal["ask"] = "ask"
    generation: int
    what: Literal["save", "stop", "regroup"]


class ChangeLayout(_Message):
    """Have the ranks go on with these changes to their layout, behind the step under way."""

    kind: Literal["change_layout"] = "change_layout"
    generation: int
    changes: dict[str, JsonValue]


class Speeds(_Message):
    """From the next batch that is planned, count with these speeds."""

    kind: Literal["speeds"] = "speeds"
    generation: int
    speeds: dict[int, float]
    """By rank, 1 being nominal; all others are nominal."""


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


ToAgent = Annotated[
    Welcome
    | Keep
    | HostGuest
    | EndGuest
    | JoinStripe
    | LeaveStripe
    | Rebuild
    | OpenStore
    | Start
    | Ask
    | ChangeLayout
    | Speeds
    | End
    | WriteStacks
    | ReadRings
    | Leave,
    Field(discriminator="kind"),
]
ToAgentAdapter: TypeAdapter[ToAgent] = TypeAdapter(ToAgent)
