"""When a switch to another layout is worth it; imports no torch."""

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt


class SwitchingPolicy(BaseModel):
    """When a switch is worth it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    window: PositiveInt = 16
    """Batches that are looked at together."""
    in_sight: PositiveInt = 1000
    """Batches that a switch has to pay off in: the lengths are expected to stay as they are for so long."""
    least_gain: float = Field(default=0.05, gt=0.0, lt=1.0)
    """Share of a step that a switch has to save; below it, estimates are no reason to move."""
    patience: PositiveInt = 3
    """Windows in a row that have to say so."""
    restart_s: NonNegativeFloat = 10.0
    """Fixed seconds of a switch: groups are made anew, code is compiled, caches are cold."""
    moves: bool = False
    """Whether the run then goes on with the other layout; off: it is only told."""


__all__ = ["SwitchingPolicy"]
