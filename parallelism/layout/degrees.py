"""The static part of a plan: degrees of parallelism, capacity, and what becomes of activations."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.pipeline.schedule import PipelineSchedule, ScheduleName
from evermesh.parallelism.sharding import AnySharding, DeepSpeed
from evermesh.parallelism.tiers import Division, Tiers

ActivationPolicy = Literal["keep", "recompute", "offload"]


class Layout(BaseModel):
    """Degrees of every mesh axis and the memory policy; fixed for one attempt.

    The attention side factors the ranks as ``pp x hdp x tp``; the expert side as ``pp x edp x ep x etp``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    hdp: PositiveInt = 1
    """Hybrid data-parallel ranks: data and context parallelism are the same ranks, used per sequence."""
    tp: PositiveInt = 1
    """Tensor-parallel degree."""
    tp_chunks: PositiveInt = 1
    """Parts in which the ranks that share a model run feed-forwards and shared experts: while one is computed, the tokens of
    the next are gathered and the results of the one before are scattered. 1: nothing is hidden."""
    pp: PositiveInt = 1
    """Pipeline-parallel degree."""
    ep: PositiveInt = 1
    """Expert-parallel degree."""
    etp: PositiveInt = 1
    """Tensor-parallel degree inside an expert."""
    hot_experts: NonNegativeInt = 0
    """Copies of overloaded experts that a rank may hold of each layer, for the length of a step; never changes the result."""
    schedule: ScheduleName = "1f1b"
    """In which order pipeline ranks run micro-batches forward and backward."""
    virtual_stages: PositiveInt = 1
    """Pipeline stages of every rank; more make smaller bubbles and more messages."""
    split: Literal["flops", "measured"] | tuple[PositiveInt, ...] = "flops"
    """How layers are divided among pipeline stages: evenly by the FLOPs of a token, or by times that rank 0 measures when an
    attempt starts; or the number of layers of every stage."""
    capacity: PositiveInt = 2048
    """Tokens that one HDP rank holds in one micro-batch (bounds the activation memory)."""
    keep_capacity: PositiveInt | None = None
    """Where blocks are computed again or offloaded: micro-batches with at most so many tokens keep all their activations
    instead. None: no micro-batch does."""
    ulysses: PositiveInt = 1
    """Most neighbours in a ring that may divide the heads of attention among them, inside a node; any divisor of it may. 1:
    rings only pass keys and values around; more: every sequence gets what costs it least."""
    gathers_keys: bool = False
    """Whether a sequence may gather all its keys and values at once instead of passing them around. It then exchanges
    messages with all ranks of its ring, so ``most_peers`` cannot be bounded."""
    most_peers: PositiveInt | None = Field(default=None, ge=4)
    """With how many ranks at most a rank passes keys and values around in one batch: connections, each with its buffers.
    4 is enough for the planner's rings of neighbours that divide no heads. None: any number."""
    sharding: AnySharding = Tiers()
    """What the HDP ranks divide among them of parameters, gradients and optimizer states; by default the states (ZeRO-1).
    With kind deepspeed, that library does it."""
    activations: ActivationPolicy | tuple[ActivationPolicy, ...] = "keep"
    """What becomes of the activations of a transformer block until its backward pass: they stay on the device (keep), are
    computed again from the block's input (recompute), or wait in host memory as far as ``offload`` says (offload). One word
    for all blocks, or one for each."""
    offload: Annotated[float, Field(ge=0.0, le=1.0)] | Literal["auto"] = 0.0
    """Of blocks that offload: fraction of the tokens whose matrix products wait in host memory; those of the others are
    computed again. What a block and its attention gave is always moved, and attention never computed again. auto: the planner
    chooses for each micro-batch what takes least time by the cost model."""

    @model_validator(mode="after")
    def _schedule_exists(self) -> Self:
        PipelineSchedule(self.schedule, self.pp, self.virtual_stages)
        if self.pp == 1 and self.virtual_stages > 1:
            raise LayoutDoesNotFit(
                f"{self.virtual_stages} virtual stages per rank, but pp 1: there is no pipeline to fill. "
                "Set layout.virtual_stages to 1, or layout.pp to at least 2.",
                "virtual_stages",
            )
        return self

    @model_validator(mode="after")
    def _something_is_offloaded(self) -> Self:
        if self.offload != 0 and "offload" not in self.activation_policies:
            raise LayoutDoesNotFit(
                f"layout.offload is {self.offload}, but no block offloads: layout.activations is {self.activations}. "
                "Set layout.activations to offload, or leave layout.offload out.",
                "offload",
            )
        return self

    @model_validator(mode="after")
    def _peers_can_be_bounded(self) -> Self:
        if self.most_peers is None:
            return self
        if self.pp > 1 or self.ep * self.etp > self.tp or self.sharding.in_lock_step:
            raise LayoutDoesNotFit(
                f"layout.most_peers is {self.most_peers}, but rings of pipelines, and of ranks that share experts or gather "
                "parameters, may join any ranks. Leave layout.most_peers out.",
                "most_peers",
            )
        if self.gathers_keys:
            raise LayoutDoesNotFit(
                f"layout.most_peers is {self.most_peers}, but a sequence that gathers its keys and values exchanges messages "
                "with all ranks of its ring. Leave layout.most_peers or layout.gathers_keys out.",
                "most_peers",
            )
        if self.most_peers < 4 * self.ulysses:
            raise LayoutDoesNotFit(
                f"layout.most_peers is {self.most_peers}, but rings of ranks that divide heads have up to 4 x ulysses = "
                f"{4 * self.ulysses}. Set layout.most_peers to at least that, or leave it out.",
                "most_peers",
            )
        return self

    @property
    def activation_policies(self) -> frozenset[ActivationPolicy]:
        """Those that some block has."""
        return frozenset((self.activations,) if isinstance(self.activations, str) else self.activations)

    def activations_of(self, layer: int) -> ActivationPolicy:
        """The policy of the block of ``layer``, which the model has."""
        return self.activations if isinstance(self.activations, str) else self.activations[layer]

    @property
    def most_offload(self) -> float:
        """The largest fraction of tokens whose products may wait in host memory."""
        return 1.0 if self.offload == "auto" else self.offload

    @property
    def recompute(self) -> Literal["none", "block"]:
        """What a plan says of its micro-batches: "block" where blocks do as ``activations`` says, "none" where all keep."""
        return "none" if self.activation_policies <= {"keep"} else "block"

    @property
    def deepspeed(self) -> DeepSpeed | None:
        """What DeepSpeed is told; None: it is not used."""
        return self.sharding if isinstance(self.sharding, DeepSpeed) else None

    @property
    def tiers(self) -> Tiers:
        """Our own sharding, of whatever DeepSpeed leaves to it."""
        return self.sharding if isinstance(self.sharding, Tiers) else Tiers()

    @property
    def keeps_gradients(self) -> bool:
        """Whether whole gradients add up until the end of a step, where our own tiers divide them.

        A schedule that computes the gradients of weights behind the backward pass has them together only then.
        """
        return not self.tiers.in_lock_step or self.pipeline.splits_backward

    @property
    def pipeline(self) -> PipelineSchedule:
        """The order in which the pipeline ranks work; without a pipeline, every micro-batch forward and backward at once."""
        if self.pp == 1:
            return PipelineSchedule()
        return PipelineSchedule(self.schedule, self.pp, self.virtual_stages)

    @property
    def lock_step_groups(self) -> tuple[tuple[int, ...], ...]:
        """The sets of HDP ranks that communicate in every micro-batch and therefore run all of them together; no set of one.

        They share experts, ``ep x etp`` consecutive ranks of a pipeline stage, or exchange parameters and gradients.

        Raises:
            LayoutDoesNotFit: they do not divide the ranks of a stage.
        """
        check_folding(self.hdp, self.tp, self.ep, self.etp)
        size = self.ep * self.etp
        if self.tp % size == 0 and not self.sharding.in_lock_step:
            return ()  # each set is of one; asked for in every step, so thousands of sets are not made
        sharing = [
            {rank // self.tp for rank in range(first, first + size)} for first in range(0, self.stage_size, size)
        ]
        together = list(sharing)
        if self.sharding.in_lock_step:
            if self.deepspeed is not None:
                return (tuple(range(self.hdp)),) if self.hdp > 1 else ()
            dense, experts = self.division.gradients, self.expert_division.gradients
            together += [set(range(first, first + dense)) for first in range(0, self.hdp, dense)]
            together += [set().union(*sharing[first : first + experts]) for first in range(0, self.edp, experts)]
        return tuple(tuple(sorted(group)) for group in _merged(together) if len(group) > 1)

    @property
    def stage_size(self) -> int:
        """Ranks of a pipeline stage."""
        return self.hdp * self.tp

    @property
    def edp(self) -> int:
        """Ranks of a stage that hold the same part of the same experts."""
        return self.stage_size // (self.ep * self.etp)

    @property
    def division(self) -> Division:
        """How the HDP ranks divide what all of them train.

        Raises:
            LayoutDoesNotFit: ``sharding`` does not fit ``hdp``.
        """
        return self.tiers.division(self.hdp)

    @property
    def expert_division(self) -> Division:
        """How the ranks that hold the same experts divide them; raises as ``division`` does."""
        return self.tiers.expert_division(self.hdp, self.edp)

    @property
    def runs_in_waves(self) -> bool:
        """Whether a plan has to put what runs together at one index on all HDP ranks."""
        return self.pp > 1 or bool(self.lock_step_groups)

    @property
    def world_size(self) -> int:
        """Ranks that the layout uses."""
        return self.pp * self.hdp * self.tp

    def fitted_to(self, world_size: int) -> Self:
        """The same layout with as many HDP ranks as ``world_size`` allows.

        Raises:
            LayoutDoesNotFit: ``world_size`` is not a multiple of pp x tp.
        """
        fixed = self.pp * self.tp
        if world_size % fixed:
            fitting = sorted({max(1, world_size // fixed) * fixed, (world_size // fixed + 1) * fixed})
            raise LayoutDoesNotFit(
                f"pp {self.pp} x tp {self.tp} = {fixed} ranks per model replica do not divide {world_size} workers. "
                f"Start {' or '.join(map(str, fitting))} workers."
            )
        return self.model_copy(update={"hdp": world_size // fixed})

    def check_world(self, world_size: int) -> None:
        """Raise ``LayoutDoesNotFit`` unless the degrees multiply to ``world_size``."""
        if self.world_size != world_size:
            fixed = self.pp * self.tp
            way_out = f"Set layout.hdp to {world_size // fixed}, or s" if world_size % fixed == 0 else "S"
            raise LayoutDoesNotFit(
                f"pp {self.pp} x hdp {self.hdp} x tp {self.tp} = {self.world_size} ranks, but {world_size} were started. "
                f"{way_out}tart {self.world_size} ranks."
            )


def _merged(groups: list[set[int]]) -> list[set[int]]:
    """Sets without common members, in order: those with one are joined."""
    set_of: dict[int, set[int]] = {}
    for group in groups:
        union = group.union(*(set_of[member] for member in group if member in set_of))
        set_of.update(dict.fromkeys(union, union))
    return sorted({id(found): found for found in set_of.values()}.values(), key=min)


def check_folding(hdp: int, tp: int, ep: int, etp: int) -> None:
    """Raise ``LayoutDoesNotFit`` unless the ranks that share experts divide those of a pipeline stage."""
    size, ranks = ep * etp, hdp * tp
    if ranks % size:
        legal = ", ".join(str(number) for number in range(1, ranks + 1) if ranks % number == 0)
        raise LayoutDoesNotFit(
            f"ep {ep} x etp {etp} = {size} ranks that share experts do not divide the hdp {hdp} x tp {tp} = {ranks} ranks of "
            f"a pipeline stage. Their product can be {legal}.",
            axis="ep" if ep > 1 else "etp",
        )
