"""The configuration of one training process group, composed from every room's own; imports no torch."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PlainSerializer,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    WithJsonSchema,
    model_validator,
)

from evermesh.checkpoint.retention import Retention
from evermesh.checkpoint.stores.places import ObjectPath, Place, place_of
from evermesh.parallelism.calibration.policy import CalibrationPolicy
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.layout.policy import SwitchingPolicy
from evermesh.runtime.data.config import DataConfig
from evermesh.runtime.deepspeed_engine.checks import check_config
from evermesh.runtime.guard.config import GuardConfig
from evermesh.runtime.layout import check_compile, check_model
from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.on_or_off import or_default
from evermesh.runtime.optimizer_config import AdamWConfig, AnyOptimizer


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _as_place(value: Any) -> Place:
    if not isinstance(value, str | Path | ObjectPath):
        raise ValueError(f"{value!r} is neither a path nor a URL such as s3://BUCKET/PREFIX")
    return place_of(value)


_AnyPlace = Annotated[
    Path | ObjectPath, PlainValidator(_as_place), PlainSerializer(str, str), WithJsonSchema({"type": "string"})
]
"""A path, or the URL of an object store."""


_Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class CheckpointConfig(_Frozen):
    """When checkpoints are written and how many stay."""

    every: PositiveInt | None = 50
    """Optimizer steps between two checkpoints; null: only at the end and when stopped."""
    keep: PositiveInt = 2
    """Newest committed checkpoints that stay on disk."""
    keep_every: PositiveInt | None = None
    """Checkpoints of steps that are a multiple of it stay too; null: no such rule."""
    keep_younger_h: PositiveFloat | None = None
    """Checkpoints that were written less than so many hours ago stay too; null: no such rule."""
    asynchronous: bool | None = None
    """Whether training goes on while a checkpoint is written: it stops for one copy of a rank's part of the state to shared
    memory, and another process does the rest. null: where host memory has room for that copy, and the event log tells where
    it has not; on: without that room the run is refused."""
    incremental: bool = True
    """Of checkpoints that are written while training goes on: files whose bytes an older checkpoint of the run holds are
    hard links to it instead of written again, where the file system has such links."""
    parity: PositiveInt | None = None
    """So many ranks protect each other's files: those of any one of them can be made again, for one part of parity more.
    null: nothing protects them."""

    store: str | None = None
    """Where checkpoints are written instead of into the directory of the run: the URL of an object store such as
    ``s3://BUCKET/PREFIX``, or an absolute path. A folder with the name of the run is made there. Endpoint and credentials
    are those of the environment of the workers, never of this file."""
    store_patience_s: PositiveFloat = 120.0
    """How long a request to an object store is tried again before a save or a load has failed, seconds."""

    @model_validator(mode="after")
    def _store_is_a_place(self) -> Self:
        if self.store is not None:
            place = place_of(self.store)
            if isinstance(place, Path) and not place.is_absolute():
                raise ValueError(
                    f"store {self.store!r} is neither a URL such as s3://BUCKET/PREFIX nor an absolute path"
                )
            if isinstance(place, ObjectPath) and "@" in place.bucket:
                raise ValueError("store has a user or a password in its URL; leave them to the environment")
            if isinstance(place, ObjectPath) and self.parity is not None:
                raise ValueError(
                    f"parity is {self.parity}, but store is an object store, which keeps every object in several places "
                    "itself. Leave parity out."
                )
        return self

    def directory(self, run: Path) -> Place:
        """Where the checkpoints of the run whose directory is ``run`` are."""
        if self.store is None:
            return run / "checkpoints"
        place = place_of(self.store) / run.name
        return place.with_patience(self.store_patience_s) if isinstance(place, ObjectPath) else place

    @property
    def retention(self) -> Retention:
        """Which checkpoints stay."""
        age_s = None if self.keep_younger_h is None else self.keep_younger_h * 3600
        return Retention(self.keep, self.keep_every, age_s)


class SnapshotConfig(_Frozen):
    """How often the state is copied to host memory that outlives the workers; it needs twice what the ranks hold."""

    every: PositiveInt | None = None
    """Optimizer steps between two snapshots; null: so often that the least time is expected to be lost by copies and failures
    together, by what is measured. The event log tells what was chosen."""
    most_cost: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
    """Without ``every``: part of the time for which training may stand still for the copies, at most."""
    node_mtbf_h: PositiveFloat = 2000.0
    """Hours between two failures of a node, hardware or software, as believed before the run has seen any; from those it
    learns. Published for large clusters: 3,700 to 6,300."""
    code: Annotated[str, Field(pattern=r"^(auto|none|[1-9]\d{0,2}\+[1-9]\d{0,2})$")] = "auto"
    """How nodes protect each other's snapshots, as data + parity parts of an erasure code, such as ``6+2``: as many lost
    nodes of a stripe of 8 as it has parity parts cost no read of storage. Each node needs 2/6 more memory for each of its two
    snapshots then. ``auto``: one parity part, two from 6 nodes on, up to 8 parts, and where the job names racks as many as
    survive the loss of one, up to as much as data; 2 nodes keep copies. ``none``: no
    protection, and no memory for it."""
    bytes_per_s: PositiveFloat | None = None
    """What a node sends to the others at most to protect snapshots; null: as much as it can."""
    rebuild_timeout_s: PositiveFloat = 300.0
    """How long lost parts may take to be rebuilt before storage is read instead."""


class EvaluationConfig(_Frozen):
    """When a run is evaluated, and on how much."""

    every: PositiveInt = 50
    """Optimizer steps between two evaluations; there is one after the last step too."""
    tokens: PositiveInt = 65_536
    """Tokens that are held out of the corpora, of each by its weight; with their documents, which are never trained on."""


class CpuDevice(_Frozen):
    """Workers compute on CPU cores and talk through gloo."""

    kind: Literal["cpu"] = "cpu"
    threads: PositiveInt = 1
    """Threads of each worker."""


class CudaDevice(_Frozen):
    """Workers compute on one GPU each and talk through NCCL."""

    kind: Literal["cuda"] = "cuda"


class CompileConfig(_Frozen):
    """Blocks are compiled, for few numbers of tokens; micro-batches are padded to them."""

    buckets: tuple[PositiveInt, ...] | None = None
    """Numbers of tokens, ascending, the last at least ``layout.capacity``; null: from 1/32 of the capacity up to all of it,
    each sqrt(2) times the one before, so that a micro-batch is padded by at most that factor above the first."""

    @model_validator(mode="after")
    def _buckets_ascend(self) -> Self:
        if self.buckets is not None and list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError(f"buckets {list(self.buckets)} do not ascend")
        return self

    def of_capacity(self, capacity: int) -> tuple[int, ...]:
        """The buckets, given or not, for micro-batches of at most ``capacity`` tokens."""
        if self.buckets is not None:
            return self.buckets
        return tuple(sorted({max(1, round(capacity / math.sqrt(2) ** step)) for step in range(11)}))


class AdoptConfig(_Frozen):
    """A checkpoint of another library that a new run goes on from, with its weights and the states of its optimizer."""

    path: _AnyPlace
    """Of DeepSpeed, ZeRO 1, 2, 3 or universal: the folder of a tag, or the one with ``latest``; a path, or a URL such as
    ``s3://BUCKET/PREFIX``."""
    names: Literal["own", "hugging_face"] = "own"
    """What its parameters are called: as ours are, or as in a Hugging Face model of this kind."""
    updates: PositiveInt | None = None
    """Updates of the optimizer that it has made; null: what the checkpoint says."""


class TrainConfig(_Frozen):
    """Everything that decides what a training run computes."""

    model: ModelConfig = ModelConfig()
    init_from: _AnyPlace | None = None
    """Hugging Face directory whose weights a new run starts from, a path, or a URL such as ``s3://BUCKET/PREFIX``;
    ``model`` is then the one of its config.json, and need not be given. null: random weights."""
    adopt: AdoptConfig | None = None
    """Checkpoint of DeepSpeed that a new run goes on from, on any layout: weights and moments, while the data and the
    schedule begin anew. null: none."""
    data: DataConfig
    layout: Layout = Layout()
    cost: CostModel | None = None
    """Coefficients for the planner; null: derived from the model's sizes."""
    calibrate: Annotated[CalibrationPolicy | None, or_default(CalibrationPolicy)] = None
    """Fit the coefficients for the planner to the times that ranks measure, while the run goes on: on, or when to do so; null
    or off: not. Plans then depend on the clock, so two runs no longer add in the same order."""
    optimizer: AnyOptimizer = AdamWConfig()
    """How gradients become updates; AdamW where ``kind`` is not given."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    snapshot: Annotated[SnapshotConfig | None, or_default(SnapshotConfig)] = SnapshotConfig()
    """Under the launcher, go on from the memory of the nodes after workers have died, without reading storage: on, or how
    often the state is copied there; null or off: not. Where memory has no room the event log tells, and training goes on
    without."""
    evaluation: EvaluationConfig | None = None
    """The loss on held-out documents; null: no document is held out."""
    steps: PositiveInt = 100
    """Optimizer steps of the whole run; also the length of the learning rate schedule."""
    stop_at: PositiveInt | None = None
    """Stop after this step, with a checkpoint, although the run is longer; null: run to the end."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Type of parameters, gradients and activations; optimizer states are at least float32."""
    device: Annotated[CpuDevice | CudaDevice, Field(discriminator="kind")] = CpuDevice()
    compile: CompileConfig | None = None
    """Compile what blocks do with tokens one by one; null: everything runs as it is written."""
    advise_layout: Annotated[SwitchingPolicy | None, or_default(SwitchingPolicy)] = None
    """Watch the lengths of batches, and log when another layout would be worth a switch: true, or when it is worth it; null
    or false: not. Only with its ``moves`` on the run then goes on with the other layout, without a restart; else it goes
    on as it is. A window costs rank 0 a search in the background, milliseconds of one core on a few nodes, seconds on
    thousands."""
    seed: NonNegativeInt = 0
    """Seed of the initial weights and of the order of the data."""
    deterministic: bool = False
    """Use only algorithms that give the same bits every time, at some cost in speed: two runs with one configuration then end
    with the same digest of their parameters, which a run tells in its event log."""
    timeout_s: PositiveFloat = 120.0
    """Seconds after which a collective without answer fails."""
    max_skipped_steps: PositiveInt = 10
    """Consecutive bad steps, see ``guard``, after which the run ends with an error."""
    guard: GuardConfig = GuardConfig()
    """Which steps update nothing, what becomes of their samples, and how computations are checked."""

    @model_validator(mode="after")
    def _ranks_can_share_the_model(self) -> Self:
        check_model(self.layout, self.model)
        check_config(self)
        self._check_calibration()
        self._check_moves()
        self._check_guard()
        if self.init_from is not None and self.adopt is not None:
            raise ValueError(
                f"init_from gives the weights of {self.init_from} to the run, and adopt those of {self.adopt.path}. "
                "Leave one out."
            )
        if self.compile is not None:
            check_compile(self.layout, self.buckets)
        return self

    def _check_moves(self) -> None:
        if self.deterministic and self.advise_layout is not None and self.advise_layout.moves:
            raise ValueError(
                "advise_layout.moves is on, so the clock decides when the layout changes, but deterministic asks for the "
                "same bits every time. Set train.advise_layout.moves to off, or leave train.deterministic out."
            )

    def _check_guard(self) -> None:
        probe, offloads = self.guard.probe is not None, "offload" in self.layout.activation_policies
        if self.layout.deepspeed is not None and (probe or self.guard.replicas is not None):
            raise ValueError(
                "guard.probe or guard.replicas is on, but layout.sharding is deepspeed, which holds parameters and gradients "
                "itself. Set both to off, or leave layout.sharding out."
            )
        if probe and (offloads or self.calibrate is not None):
            is_set = (
                "layout.activations offloads, so products are computed in other parts the second time"
                if offloads
                else "calibrate is on, and would measure the probe"
            )
            raise ValueError(f"guard.probe is on, but {is_set}. Leave one of them out.")

    def _check_calibration(self) -> None:
        if self.calibrate is None:
            return
        if self.deterministic:
            raise ValueError(
                "calibrate is on, so plans depend on measured times, but deterministic asks for the same bits every time. "
                "Set train.calibrate to off, and train.cost to the coefficients that a calibrated run has logged."
            )
        if self.layout.pp > 1 or self.layout.deepspeed is not None:
            found = f"layout.pp is {self.layout.pp}" if self.layout.pp > 1 else "layout.sharding is deepspeed"
            raise ValueError(
                f"calibrate is on, but {found}: a micro-batch then has no time of its own that ranks could measure. "
                "Set train.calibrate to off."
            )

    @property
    def buckets(self) -> tuple[int, ...]:
        """Numbers of tokens that micro-batches are padded to; none: as few as the ranks that share them need."""
        return self.compile.of_capacity(self.layout.capacity) if self.compile is not None else ()
