"""Configuration of the step guard; imports no torch."""

from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from evermesh.runtime.on_or_off import or_default


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SpikePolicy(_Frozen):
    """When a finite loss or gradient norm is too far above those of the last accepted steps.

    The limit is the median of a window plus so many deviations; a deviation is 1.4826 times the median absolute deviation
    (MAD), which is the standard deviation of a normal distribution.
    """

    window: Annotated[int, Field(ge=8)] = 64
    """Accepted steps that are looked back at."""
    armed_after: Annotated[int, Field(ge=8)] = 64
    """Accepted steps before any is judged; at most ``window``."""
    loss_deviations: PositiveFloat = 6.0
    """Deviations above the median at which a loss is a spike."""
    loss_floor: NonNegativeFloat = 0.02
    """Least deviation that counts for a loss, as a share of the median, so that a flat loss trips nothing."""
    norm_deviations: PositiveFloat = 12.0
    """Deviations above the median at which a gradient norm is a spike."""
    norm_floor: NonNegativeFloat = 0.25
    """Least deviation that counts for a gradient norm, as a share of the median."""

    @model_validator(mode="after")
    def _window_can_arm(self) -> Self:
        if self.armed_after > self.window:
            raise ValueError(
                f"armed_after is {self.armed_after}, but only {self.window} accepted steps are looked back at. "
                f"Set window to {self.armed_after} or more."
            )
        return self


class ProbePolicy(_Frozen):
    """When a block is computed a second time, to find hardware that computes wrongly without saying so."""

    every: PositiveInt = 100
    """Steps between two probes. One block of every rank is computed once more for all micro-batches of the step."""
    on_mismatch: Literal["continue", "skip", "stop"] = "skip"
    """What all ranks do when two results of any rank differ: make the update all the same, treat the step as a bad one, or
    end with an error before the update."""


class ReplicaPolicy(_Frozen):
    """When parameters that several ranks hold alike are compared."""

    every: PositiveInt = 100
    """Steps between two comparisons. Every rank hashes all bytes of the parameters that it holds."""
    on_mismatch: Literal["continue", "stop"] = "stop"
    """What all ranks do when copies differ: go on, or end with an error before the update."""


class GuardConfig(_Frozen):
    """Which steps update nothing, what becomes of their samples, and how computations are checked."""

    spikes: Annotated[SpikePolicy | None, or_default(SpikePolicy)] = SpikePolicy()
    """Skip steps whose loss or gradient norm is far above the last ones: on, off, or when. Steps with values that are not
    finite are always skipped."""
    max_retries: NonNegativeInt = 2
    """Times that a sequence of skipped steps is tried again before it is set aside; 0: it is set aside at once. Sequences
    that were skipped together are first tried together, then in halves, and only one by itself is ever set aside."""
    retry_within: PositiveInt = 16
    """Steps among which the one is drawn in which samples are tried again."""
    lower_lr_after: PositiveInt | None = 3
    """Bad steps in a row after which updates are made with half the learning rate until a step is as usual, those of finite
    spikes too; null: never, spikes are skipped until ``max_skipped_steps`` ends the run."""
    probe: Annotated[ProbePolicy | None, or_default(ProbePolicy)] = None
    """Compute a block again now and then and compare all bits; null or off: not."""
    replicas: Annotated[ReplicaPolicy | None, or_default(ReplicaPolicy)] = None
    """Compare the parameters that ranks hold alike now and then; null or off: not."""
