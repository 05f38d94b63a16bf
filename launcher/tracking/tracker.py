"""What a tracker is asked to do. All calls come from one thread, in the order of what happened."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from evermesh.fault.events import Event
from evermesh.launcher.tracking.config import AnyTracker, MlflowConfig, TensorBoardConfig, WandbConfig


@dataclass(frozen=True, slots=True)
class Tracked:
    """The run as trackers are told of it."""

    name: str
    directory: Path
    settings: Mapping[str, str | int | float | bool] = field(default_factory=dict)


class Tracker(Protocol):
    """One experiment tracker. A call that raises is made again later, from the last ``flush`` on."""

    @property
    def key(self) -> str | None:
        """What it calls the run, so that another process can go on with it; None: it needs nothing."""

    def step(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """A step has ended at that wall clock, seconds since 1970. One that was told before was trained again: what was
        told of it and of later ones does not count any more."""

    def event(self, step: int, event: Event) -> None:
        """Something happened, behind that step."""

    def flush(self) -> None:
        """Whatever was told until now must survive the end of this process when this returns."""

    def close(self, state: str) -> None:
        """Nothing more comes from here; the run is in that state."""


def open_tracker(config: AnyTracker, run: Tracked, key: str | None) -> Tracker:
    """The tracker of a run; ``key`` is what it called the run before."""
    match config:
        case TensorBoardConfig():
            from evermesh.launcher.tracking.tensorboard import TensorBoard

            return TensorBoard(config.folder or run.directory / "tensorboard", run)
        case WandbConfig():
            from evermesh.launcher.tracking.wandb import Wandb

            return Wandb(config, run, key)
        case MlflowConfig():
            from evermesh.launcher.tracking.mlflow import Mlflow

            return Mlflow(config, run, key)
