"""What the search for a layout may choose from, and what it takes as given; imports no torch."""

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from evermesh.parallelism.cost import FlopConvention
from evermesh.parallelism.layout.activations import Precision
from evermesh.parallelism.layout.degrees import ActivationPolicy, Layout
from evermesh.parallelism.layout.device import DEVICES, Device
from evermesh.parallelism.pipeline.schedule import ScheduleName
from evermesh.parallelism.tiers import Tiers


class ActivationChoice(BaseModel):
    """What may become of activations."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: ActivationPolicy
    offload: Annotated[float, Field(ge=0.0, le=1.0)] | Literal["auto"] = 0.0


class SearchOptions(BaseModel):
    """Every field has a default that suits most; what is given less is searched sooner."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    device: Device = DEVICES["h100"]
    element_bytes: PositiveInt = 2
    """Of parameters and activations."""
    convention: FlopConvention = "causal"
    """Which FLOPs the model FLOPs utilisation (MFU) counts."""
    top: PositiveInt = 5
    """Layouts to return, each with other degrees."""
    planned: NonNegativeInt = 8
    """Layouts for which the real planner plans the batches, at least ``top``; 0: none, the formula alone ranks."""
    most_tp: PositiveInt | None = None
    """Largest tensor-parallel degree; None: the devices of a node. It never leaves a node."""
    schedules: tuple[tuple[ScheduleName, int], ...] = (
        ("1f1b", 1),
        ("interleaved-1f1b", 2),
        ("interleaved-1f1b", 4),
        ("zero-bubble", 1),
        ("zero-bubble", 2),
        ("zero-bubble-v", 2),
    )
    """Orders of a pipeline, each with its virtual stages."""
    tiers: tuple[Tiers, ...] = (
        Tiers(),
        Tiers(gradients="all"),
        Tiers(parameters="all", gradients="all"),
        Tiers(gradients="all", keep_for="micro_batch"),
        Tiers(parameters="all", gradients="all", keep_for="micro_batch"),
    )
    """Ways to divide parameters, gradients and states. Those that divide within a node are tried besides."""
    activations: tuple[ActivationChoice, ...] = (
        ActivationChoice(policy="keep"),
        ActivationChoice(policy="offload", offload="auto"),
        ActivationChoice(policy="offload", offload=0.5),
        ActivationChoice(policy="offload"),
        ActivationChoice(policy="recompute"),
    )
    tp_chunks: tuple[PositiveInt, ...] = (1, 2, 4)
    """Parts in which ranks that share a model gather tokens while they compute; blocks that offload gather all at once."""
    capacities: tuple[PositiveInt, ...] = ()
    """Tokens of a micro-batch to choose from; empty: powers of two, and the most that fits."""
    imbalance: PositiveFloat = 1.25
    """The most rows that the experts of a rank get, over the mean: bounds memory and the all-to-all."""
    supports: Callable[[Layout], bool] | None = None
    """Whether the runtime can run a layout; None: all that divide the sizes of the model."""

    @property
    def precision(self) -> Precision:
        """How wide numbers are."""
        return Precision(self.element_bytes, self.device.fused_norms)


__all__ = ["ActivationChoice", "SearchOptions"]
