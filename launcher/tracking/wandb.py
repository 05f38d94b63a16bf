"""Weights & Biases. Steps are an axis of their own, for its own counter never goes back."""

from collections.abc import Mapping
from typing import Any

import wandb

from evermesh.fault.events import Event
from evermesh.launcher.tracking.config import WandbConfig
from evermesh.launcher.tracking.tracker import Tracked

_FAILED = 1


class Wandb:
    """Tells W&B; see ``Tracker``."""

    def __init__(self, config: WandbConfig, run: Tracked, key: str | None) -> None:
        offline: dict[str, Any] = {} if config.mode == "online" else {"dir": str(run.directory)}
        settings = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, x_disable_stats=True)
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            mode=config.mode,
            name=run.name,
            id=key,
            resume="allow" if key else None,
            config=dict(run.settings),
            settings=settings,
            **offline,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    @property
    def key(self) -> str | None:
        return str(self._run.id)

    def step(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, "time_s": time_s} | dict(values))

    def event(self, step: int, event: Event) -> None:
        self._run.log({"step": step, f"events/{event.kind}": 1})

    def flush(self) -> None:
        """W&B writes by itself; what is lost with this process is at most what it held for a moment."""

    def close(self, state: str) -> None:
        self._run.finish(exit_code=_FAILED if state == "failed" else 0)
        wandb.teardown()  # only when its process has ended is all of it in the file
