"""The configuration of a job: what to train, with how many workers, and where the run is kept; imports no torch."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

from evermesh.fault.isolation.config import Isolation, IsolationConfig
from evermesh.launcher.ray_config import RayConfig
from evermesh.launcher.tracking.config import TrackerConfig
from evermesh.runtime.config import TrainConfig
from evermesh.runtime.layout import check_layout
from evermesh.runtime.on_or_off import or_default

_LONGEST_NAME = 100


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or len(name) > _LONGEST_NAME:
        raise ValueError(
            f"{name!r} is no name for a run; use up to {_LONGEST_NAME} letters, digits, dots, dashes and underscores, "
            "with a letter or a digit first"
        )
    return name


def _from_switch(value: Any) -> Any:
    """YAML reads ``off`` as false."""
    return {True: "quick", False: "off"}[value] if isinstance(value, bool) else value


class HangConfig(BaseModel):
    """When a rank counts as frozen: all ranks are then ended, with what each was doing written down, and started again."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    stopped_s: PositiveFloat = 2.0
    """Seconds that a rank may be stopped (SIGSTOP). A debugger may hold it as long as it likes."""
    idle_s: PositiveFloat = 3.0
    """Seconds in the middle of a step in which no rank computes anything, at least, and"""
    steps: PositiveFloat = 5.0
    """so many times the longest of the last 32 steps. Only on CPU: a rank that waits for a GPU computes nothing either."""


class ApiConfig(BaseModel):
    """Where the controller answers agents, people and Prometheus, and what they show it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str | None = None
    """Name or address of its machine on which it listens; on one machine agents serve their numbers there, too. null: the
    loopback, or, with other machines, the address by which they reach it."""
    port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    """null: any that is free. The job does not begin where somebody has this one; later, a controller that is started again
    takes another then."""
    token_file: Path | None = None
    """File with what every request must show, of 32 characters or more; null: a token is made for every run."""
    targets: Path | None = None
    """Folder in which the file RUN.json tells Prometheus where controller and agents serve numbers; null: it is
    prometheus.json in the directory of the run."""


class JobConfig(BaseModel):
    """One job as its file describes it; every default is filled in and ``train.layout`` uses every worker."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, AfterValidator(_checked_name)] = "run"
    """Name of the run's directory; a run that finds it taken is called NAME-2, NAME-3, ..."""
    runs: Path = Path("runs")
    """Folder that holds the run directories, relative to where the command is given."""
    workers: PositiveInt = 1
    """Worker processes, on all nodes together: one per CPU slot or GPU."""
    nodes: PositiveInt = 1
    """Nodes that share the workers equally; on one machine: agents, each with workers of its own."""
    min_nodes: PositiveInt | None = None
    """Nodes with which the job goes on, on fewer workers, when others are lost; None: all of them. Batches stay as they
    are, so losses do too. It takes nodes that have come back at the next restart, or after ``grow_after_s``."""
    shrink_after_s: PositiveFloat = 5.0
    """How long to wait for a lost node to be replaced before going on without it, seconds."""
    grow_after_s: PositiveFloat | None = 300.0
    """Seconds for which enough nodes must be there without a break until a job on fewer than ``nodes`` stops behind a step
    and goes on with them, from memory; null: they wait for the next restart."""
    spares: NonNegativeInt = 0
    """Nodes beyond those, which wait to take the place of a lost one."""
    racks: dict[str, str] = {}
    """Rack of each host, by host name (on one machine of each node: ``node-0``, ``node-1``, ...). Nodes of one rack
    protect each other's snapshots as little as can be; a host that is not named counts as a rack of its own."""
    topology: Path | None = None
    """File that describes the cluster: racks, cards and switches of nodes, by host name (on one machine ``node-0``, ...), as
    in ``deploy/topologies``. None, or for nodes that it lacks: what agents find out. Nodes take places such that least
    is sent between racks and classes of cards."""
    on: str = "local"
    """Where the nodes are: ``local`` (this machine), ``ray`` (the cluster that RAY_ADDRESS or this machine belongs to),
    ``ray://HOST:PORT``, ``slurm`` (the allocation in which it is launched; nodes of it beyond ``nodes`` are spares), or
    ``auto``: Slurm inside an allocation, else the Ray cluster of RAY_ADDRESS or of this machine, else this machine."""
    ray: RayConfig = RayConfig()
    """What is asked of a Ray cluster besides nodes."""
    restarts: NonNegativeInt = 3
    """Times that all workers are started again, from the newest checkpoint, after one died or raised."""
    hang: Annotated[HangConfig | None, or_default(HangConfig)] = HangConfig()
    """Find ranks that are stopped or hang from outside: on, or when; null or off: only when a collective times out
    (train.timeout_s)."""
    record: bool = True
    """Every collective and message of every rank leaves a record in shared memory, 1.3 MiB per rank, which others can read
    whatever the rank is doing: `evermesh records`."""
    metrics: bool = True
    """Every agent serves numbers of its node to Prometheus, on a free port of the node's address, to who shows the token of
    the run. The controller tells of the job as a whole, and where they are, under ``/api/metrics`` either way."""
    api: ApiConfig = ApiConfig()
    """Where the controller is reached."""
    trackers: tuple[TrackerConfig, ...] = ()
    """Experiment trackers that are told of every step and event: ``tensorboard``, ``wandb``, ``mlflow``, or one of them with
    settings of its own. A process beside the job does it; a tracker that fails costs no step."""
    preflight: Annotated[Literal["quick", "full", "off"], BeforeValidator(_from_switch)] = "quick"
    """What every node is asked before it is used, while it starts: ``quick`` (memory, disks, network, GPUs; milliseconds),
    ``full`` (also arithmetic, copies, disk and collectives, ten seconds and more), or ``off``. A node that is not fit is
    refused, and a spare takes its place: `evermesh doctor` tells what it would find."""
    health_every_s: PositiveFloat | None = 30.0
    """How often a node is looked at while the job runs, seconds; what has changed becomes an event; null: never."""
    join_timeout_s: PositiveFloat = 60.0
    """How long to wait for enough nodes, seconds; then the job ends with 75 (requeue)."""
    grace_s: PositiveFloat = 25.0
    """From SIGTERM to the end of all workers, seconds: the time for the step and its checkpoint."""
    journal_copies: NonNegativeInt = 2
    """Other nodes that keep a copy of the controller's journal, so that one of them takes over if the node of the controller
    is lost. It needs three nodes, spares included, of which more than half are left; 0: nobody takes over."""
    journal_folder: Path | None = None
    """Folder for these copies, on a disk that every node has of its own; by default below ``/var/tmp``."""
    requeue_on_term: bool = False
    """End with 75 (requeue) instead of 143 after SIGTERM. On Slurm it always does: there the nodes are taken away."""
    requeue: bool = False
    """On Slurm: put the batch job back into the queue when it ends with 75, so that its next start goes on with the run; not
    after three starts in a row that left no newer checkpoint (93)."""
    isolation: Isolation = IsolationConfig()
    """What is done about nodes that evidence speaks against: off, advise (decisions are told), act (they are carried out),
    or numbers of one's own."""
    cluster: str | None = None
    """Folder or URL of the cluster store, which keeps evidence about nodes and cordons beyond jobs; None: what
    EVERMESH_CLUSTER says when the job is launched, else a folder of this user."""
    train: TrainConfig
    """What the workers compute."""

    @field_validator("trackers")
    @classmethod
    def _trackers_differ(cls, trackers: tuple[TrackerConfig, ...]) -> tuple[TrackerConfig, ...]:
        kinds = [tracker.kind for tracker in trackers]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"each tracker can be named once: {', '.join(kinds)}")
        return trackers

    @field_validator("nodes")
    @classmethod
    def _workers_fill_nodes(cls, nodes: int, info: ValidationInfo) -> int:
        workers = info.data.get("workers")
        if workers is not None and workers % nodes:
            fitting = [count for count in range(1, workers + 1) if workers % count == 0]
            raise ValueError(
                f"{workers} workers cannot be shared equally by {nodes} nodes; use {', '.join(map(str, fitting))} nodes, "
                f"or {nodes * max(1, workers // nodes)} workers"
            )
        return nodes

    @field_validator("min_nodes")
    @classmethod
    def _fewer_than_nodes(cls, least: int | None, info: ValidationInfo) -> int | None:
        nodes = info.data.get("nodes")
        if least is not None and nodes is not None and least > nodes:
            raise ValueError(f"{least} nodes at least, but the job has {nodes}; use 1 to {nodes}, or more nodes")
        return least

    @field_validator("on")
    @classmethod
    def _known_place(cls, on: str) -> str:
        if not re.fullmatch(r"local|auto|slurm|ray|ray://[^/\s]+:\d+", on):
            raise ValueError(f"{on!r} is neither local, slurm, ray, ray://HOST:PORT, nor auto")
        return on

    @field_validator("train")
    @classmethod
    def _layout_uses_all_workers(cls, train: TrainConfig, info: ValidationInfo) -> TrainConfig:
        workers = info.data.get("workers")
        if workers is None:  # refused already
            return train
        if "hdp" in train.layout.model_fields_set:
            train.layout.check_world(workers)
        else:
            train = train.model_copy(update={"layout": train.layout.fitted_to(workers)})
        check_layout(train)
        return train

    @field_validator("train")
    @classmethod
    def _nodes_suffice_for_code(cls, train: TrainConfig, info: ValidationInfo) -> TrainConfig:
        nodes, code = info.data.get("nodes"), train.snapshot.code if train.snapshot else "none"
        if nodes is not None and "+" in code and int(code.partition("+")[2]) >= nodes:
            raise ValueError(
                f"train.snapshot.code {code} keeps parity on {code.partition('+')[2]} other nodes, but there are {nodes} "
                "nodes in all; use fewer parity parts, more nodes, or auto"
            )
        return train
