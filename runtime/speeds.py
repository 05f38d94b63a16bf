"""How fast ranks are, as whoever watches them has found: from an announced step on plans give slow ones less to do."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from evermesh.parallelism.layout import Layout
from evermesh.parallelism.mesh import Mesh
from evermesh.parallelism.planner import HybridPlanner

if TYPE_CHECKING:
    from evermesh.runtime.trainer import Trainer


class RankSpeeds:
    """The speeds that the planner of a trainer counts with. Only rank 0 plans, and only it is told."""

    def __init__(self, trainer: "Trainer") -> None:
        self._trainer = trainer
        self.told: Callable[[], Mapping[int, float] | None] = lambda: None
        """Polled on rank 0 before every plan: speeds of the ranks that are not nominal, by rank; None: nothing new."""
        self._speeds: Mapping[int, float] = {}
        self._version = 0

    def apply(self) -> None:
        """Have the next plan count with what was told. Called by the feed while no batch is being planned."""
        trainer, planner = self._trainer, self._trainer.planner
        told = self.told() if trainer.groups.control.rank == 0 else None
        if told is not None:
            self._take(told)
        if isinstance(planner, HybridPlanner) and planner.pool is not None and planner.speeds_version != self._version:
            speeds = hdp_speeds(self._speeds, trainer.config.layout)
            planner.pool, planner.speeds_version = dataclasses.replace(planner.pool, speeds=speeds), self._version

    def _take(self, told: Mapping[int, float]) -> None:
        if dict(told) == self._speeds:
            return  # a controller that has taken over says it again
        trainer = self._trainer
        slow = ", ".join(f"rank {rank} {speed:.2f}" for rank, speed in sorted(told.items())) or "all nominal"
        if trainer.config.deterministic or not trainer.plans_itself:
            why = "train.deterministic is on" if trainer.config.deterministic else "the planner was given"
            trainer.reporter.log("speeds refused", f"{slow}: {why}, so plans do not depend on what is measured")
            return
        self._speeds, self._version = dict(told), self._version + 1
        step = trainer.groups.control.moment.step + 1
        text = f"from step {step} on plans count with {slow} (version {self._version})"
        trainer.reporter.log("speeds", text, speeds={str(rank): speed for rank, speed in told.items()}, from_step=step)


def hdp_speeds(speeds: Mapping[int, float], layout: Layout) -> tuple[float, ...]:
    """The speed of every HDP rank: that of the slowest of the ranks that share its part. ``speeds``: by rank, those that are
    not nominal."""
    mesh, found = Mesh.of(layout), [1.0] * layout.hdp
    for rank, speed in speeds.items():
        if rank < mesh.size:
            hdp = mesh.coordinates(rank).hdp
            found[hdp] = min(found[hdp], speed)
    return tuple(found)
