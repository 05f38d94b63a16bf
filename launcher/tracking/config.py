"""Trackers as the job file names them; imports none of them."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from evermesh.launcher.errors import TrackerMissing


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorBoardConfig(_Frozen):
    """Event files, which ``tensorboard --logdir`` shows."""

    kind: Literal["tensorboard"] = "tensorboard"
    folder: Path | None = None
    """Where to write them; by default ``tensorboard`` in the run's directory."""


class WandbConfig(_Frozen):
    """Weights & Biases. It finds its key as always: WANDB_API_KEY, or after `wandb login`."""

    kind: Literal["wandb"] = "wandb"
    project: str = "evermesh"
    """Project that the run is listed in."""
    entity: str | None = None
    """User or team; None: what W&B takes."""
    mode: Literal["online", "offline"] = "online"
    """``offline`` writes below the run's directory; `wandb sync` uploads it later."""


class MlflowConfig(_Frozen):
    """MLflow. It finds user and password as always (MLFLOW_TRACKING_USERNAME, ...)."""

    kind: Literal["mlflow"] = "mlflow"
    uri: str | None = None
    """Address of the tracking server; None: MLFLOW_TRACKING_URI."""
    experiment: str = "evermesh"
    """Experiment that the run is listed in."""


def _from_name(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


AnyTracker = TensorBoardConfig | WandbConfig | MlflowConfig
TrackerConfig = Annotated[Annotated[AnyTracker, Field(discriminator="kind")], BeforeValidator(_from_name)]
"""One of them, or its name alone."""

_INSTALLED_BY = {"tensorboard": "evermesh", "wandb": "evermesh[wandb]", "mlflow": "evermesh[mlflow]"}


def check_tracker(config: AnyTracker) -> None:
    """Raise ``TrackerMissing`` if the package for it is not installed here."""
    if find_spec(config.kind) is None:
        way_out = f"pip install '{_INSTALLED_BY[config.kind]}'"
        raise TrackerMissing(f"the tracker {config.kind} is not installed here: {way_out}.")
