"""The configuration of optimizers and of the learning rate over a run; imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


_Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
_Share = Annotated[float, Field(gt=0.0, le=1.0)]


class CosineSchedule(_Frozen):
    """Half a cosine from the peak down to the final rate (Loshchilov and Hutter, arXiv 1608.03983)."""

    kind: Literal["cosine"] = "cosine"
    final_lr_ratio: NonNegativeFloat = 0.1
    """Learning rate at the last step over the peak."""


class LinearSchedule(_Frozen):
    """A straight line from the peak down to the final rate."""

    kind: Literal["linear"] = "linear"
    final_lr_ratio: NonNegativeFloat = 0.0
    """Learning rate at the last step over the peak."""


class ConstantSchedule(_Frozen):
    """The peak to the end."""

    kind: Literal["constant"] = "constant"


class WsdSchedule(_Frozen):
    """Warm-up, stable, decay: the peak for most of the run, then exponentially down (MiniCPM, arXiv 2404.06395, section 4).

    A longer run shares everything up to the decay with a shorter one, so it may go on from a checkpoint before it.
    """

    kind: Literal["wsd"] = "wsd"
    decay_share: _Share = 0.1
    """Steps of the decay over the steps of the run; it never begins before the warm-up has ended."""
    final_lr_ratio: _Share = 0.1
    """Learning rate at the last step over the peak."""


Schedule = Annotated[
    CosineSchedule | LinearSchedule | ConstantSchedule | WsdSchedule,
    Field(discriminator="kind"),
    BeforeValidator(lambda value: _of_kind(value, "cosine")),
]


class _Optimizer(_Frozen):
    """What all optimizers have: first and second moments, decoupled weight decay, and rates over the run."""

    lr: PositiveFloat = 3e-3
    """Peak learning rate."""
    warmup_steps: NonNegativeInt = 10
    """Updates in which the rate rises from 0 to its peak in a straight line, whatever the schedule."""
    schedule: Schedule = CosineSchedule()
    """The rate behind the warm-up; a cosine where ``kind`` is not given."""
    betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    """How much of the first and of the second moment stays in an update."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices; vectors (norm weights) are not decayed."""
    clip_norm: PositiveFloat | None = 1.0
    """Limit of the global gradient norm; null: no clipping."""


class AdamWConfig(_Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    eps: PositiveFloat = 1e-8
    """What is added to the root of the second moment, which an update is divided by."""


class LambConfig(_Optimizer):
    """LAMB, for large batches: every layer moves by the same share of its norm (You et al., arXiv 1904.00962)."""

    kind: Literal["lamb"] = "lamb"
    eps: PositiveFloat = 1e-6
    """What is added to the root of the second moment, which an update is divided by."""


OptimizerConfig = AdamWConfig | LambConfig
AnyOptimizer = Annotated[
    OptimizerConfig, Field(discriminator="kind"), BeforeValidator(lambda value: _of_kind(value, "adamw"))
]


def _of_kind(value: Any, kind: str) -> Any:
    """A section without a kind has this one."""
    return {"kind": kind, **value} if isinstance(value, dict) else value
