"""The configuration of a job: what to train, with how many workers, and where the run is kept; imports no torch."""

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationInfo, field_validator

from evermesh.runtime.config import TrainConfig


class JobConfig(BaseModel):
    """One job as its file describes it; every default is filled in and ``train.layout`` uses every worker."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = "run"
    """Name of the run's directory; a run that finds it taken is called NAME-2, NAME-3, ..."""
    runs: Path = Path("runs")
    """Folder that holds the run directories, relative to where the command is given."""
    workers: PositiveInt = 1
    """Worker processes: one per CPU slot or GPU."""
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


def write_job(config: JobConfig, path: Path) -> None:
    """Write every value of ``config`` to ``path`` as YAML; ``load_job`` reads the same configuration back."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
