"""Who divides what is trained among the HDP ranks, as a layout asks for it; imports no torch."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.tiers import Tiers


class DeepSpeed(BaseModel):
    """ZeRO and offload by the library DeepSpeed (Rajbhandari et al., arXiv 1910.02054; Ren et al., arXiv 2101.06840)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["deepspeed"] = "deepspeed"
    stage: Literal[1, 2, 3] = 1
    """What is sharded: 1 the optimizer state, 2 the gradients too, 3 the parameters too. From 2 on the ranks communicate in
    every micro-batch, so that all have equally many."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What is kept, and updated, in host memory: nothing, the optimizer state, or with stage 3 the parameters too."""
    adam: Literal["torch", "deepspeed"] = "torch"
    """Whose AdamW updates what is offloaded. That of DeepSpeed is compiled when it is first used, for some minutes on every
    machine, with a C++ compiler."""
    bucket: PositiveInt = 50_000_000
    """Elements of gradients that are summed at a time; buffers of that size are kept."""
    whole_below: NonNegativeInt = 100_000
    """With stage 3: parameters with fewer elements stay whole on every rank after their first use."""

    @model_validator(mode="after")
    def _offloads_what_is_sharded(self) -> Self:
        if self.offload == "parameters" and self.stage < 3:
            raise LayoutDoesNotFit(
                f"layout.sharding.offload is parameters, but stage {self.stage} keeps them whole on every rank. Set stage to "
                "3, or offload to optimizer.",
                axis="sharding",
            )
        if self.adam == "deepspeed" and self.offload == "none":
            raise LayoutDoesNotFit(
                "layout.sharding.adam is deepspeed, which computes in host memory, but offload is none. Set offload to "
                "optimizer, or leave adam out.",
                axis="sharding",
            )
        return self

    @property
    def in_lock_step(self) -> bool:
        """Whether the ranks communicate in every micro-batch."""
        return self.stage > 1


def _with_kind(value: Any) -> Any:
    return {"kind": "tiers", **value} if isinstance(value, dict) else value


AnySharding = Annotated[Tiers | DeepSpeed, Field(discriminator="kind"), BeforeValidator(_with_kind)]
"""Our own tiers, where no kind is given."""
