"""The static part of a plan: degrees of parallelism, capacity, recompute and offload policy."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from evermesh.parallelism.errors import LayoutDoesNotFit


class Layout(BaseModel):
    """Degrees of every mesh axis and the memory policy; fixed for one attempt.

    The attention side factors the ranks as ``pp x hdp x tp``; the expert side as ``pp x edp x ep x etp``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    hdp: PositiveInt = 1
    """Hybrid data-parallel ranks: data and context parallelism are the same ranks, used per sequence."""
    tp: PositiveInt = 1
    """Tensor-parallel degree."""
    pp: PositiveInt = 1
    """Pipeline-parallel degree."""
    ep: PositiveInt = 1
    """Expert-parallel degree."""
    etp: PositiveInt = 1
    """Tensor-parallel degree inside an expert."""
    capacity: PositiveInt = 2048
    """Tokens that one HDP rank holds in one micro-batch (bounds the activation memory)."""
    sharding: Literal["optimizer"] = "optimizer"
    """What is sharded over the HDP ranks: the optimizer state (ZeRO-1); parameters and gradients are replicated."""
    recompute: Literal["none", "block"] = "none"
    """What the backward pass computes again instead of keeping: nothing, or every transformer block."""
    offload: float = Field(default=0.0, ge=0.0, le=1.0)
    """Fraction of the activations kept in host memory."""

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
