"""The configuration of a job: what to train, with how many workers, and where the run is kept; imports no torch."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationInfo, field_validator

from evermesh.runtime.config import TrainConfig

_LONGEST_NAME = 100


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or len(name) > _LONGEST_NAME:
        raise ValueError(
            f"{name!r} is no name for a run; use up to {_LONGEST_NAME} letters, digits, dots, dashes and underscores, "
            "with a letter or a digit first"
        )
    return name


class JobConfig(BaseModel):
    """One job as its file describes it; every default is filled in and ``train.layout`` uses every worker."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, AfterValidator(_checked_name)] = "run"
    """Name of the run's directory; a run that finds it taken is called NAME-2, NAME-3, ..."""
    runs: Path = Path("runs")
    """Folder that holds the run directories, relative to where the command is given."""
    workers: PositiveInt = 1
    """Worker processes: one per CPU slot or GPU."""
    restarts: NonNegativeInt = 3
    """Times that all workers are started again, from the newest checkpoint, after one died or raised."""
    train: TrainConfig
    """What the workers compute."""

    @field_validator("train")
    @classmethod
    def _layout_uses_all_workers(cls, train: TrainConfig, info: ValidationInfo) -> TrainConfig:
        workers = info.data.get("workers")
        if workers is None:  # refused already
            return train
        if "hdp" in train.layout.model_fields_set:
            train.layout.check_world(workers)
            return train
        return train.model_copy(update={"layout": train.layout.fitted_to(workers)})
