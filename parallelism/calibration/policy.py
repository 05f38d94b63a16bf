"""When measured times are looked at, and when they change the cost model."""

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt


class CalibrationPolicy(BaseModel):
    """How a run calibrates its cost model."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    every: PositiveInt = 10
    """Steps between two looks at what the ranks measured."""
    leaves_out: NonNegativeInt = 2
    """First steps of an attempt that are not looked at: memory is allocated and code compiled in them."""
    window: PositiveInt = 512
    """Newest observations that coefficients are fitted to; half as far back, one counts half."""
    least_observations: PositiveInt = Field(default=48, ge=16)
    """Without so many there is no new model, and without a third of them since the last."""
    least_gain: float = Field(default=0.02, gt=0, lt=1)
    """Relative error that a new model takes away, on observations that it was not fitted to and next to the noise that no
    model explains; with less it is not used."""
