"""Models, data, optimizers, memory, telemetry, and the training loop of one process.

``Trainer`` needs torch and is imported when it is first used.
"""

from typing import TYPE_CHECKING, Any

from evermesh.runtime.config import TrainConfig
from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.optimizer_config import AdamWConfig, LambConfig
from evermesh.runtime.telemetry import PlanSummary, StepReport, read_telemetry

if TYPE_CHECKING:
    from evermesh.runtime.trainer import FitResult, Trainer

__all__ = [
    "AdamWConfig",
    "FitResult",
    "LambConfig",
    "ModelConfig",
    "PlanSummary",
    "StepReport",
    "TrainConfig",
    "Trainer",
    "read_telemetry",
]


def __getattr__(name: str) -> Any:
    if name in ("FitResult", "Trainer"):
        from evermesh.runtime import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
