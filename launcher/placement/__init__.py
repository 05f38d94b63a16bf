"""Where the nodes of a job come from: processes of this machine, actors of a Ray cluster, or steps of a Slurm job."""

from collections.abc import Sequence
from typing import Protocol

from evermesh.launcher.config import JobConfig
from evermesh.launcher.run_directory import Run


class Placement(Protocol):
    """Starts one agent per node and says what it knows about them. Used from one thread."""

    @property
    def address(self) -> str:
        """Where the controller must listen so that the agents reach it."""

    def start(self, nodes: Sequence[str]) -> None:
        """Start an agent for each of these nodes; they report to the controller when they are ready."""

    def adopt(self, pids: dict[str, int]) -> None:
        """Take over agents that an earlier controller started; ``pids`` are their processes by node."""

    def is_alive(self, node: str) -> bool | None:
        """Whether the agent's process lives; None where that cannot be seen from here, or it is stopped."""

    def replace(self, node: str) -> bool:
        """Start another agent for a node whose agent is lost, if the place can have one; whether one was started."""

    def shortage(self) -> str:
        """Why nodes are missing, in a sentence, as far as it is known; empty if nothing is."""

    def time_left_s(self) -> float | None:
        """Seconds until the place takes the nodes away; None: it does not. May take a while; any thread may ask."""

    def end(self, joining: Sequence[str] = ()) -> None:
        """End every agent that is left, and give the nodes back; those of ``joining`` nodes cannot be told to leave."""


def placement_for(run: Run, config: JobConfig, token: str) -> Placement:
    """What ``config.on`` asks for."""
    if config.on == "local":
        from evermesh.launcher.placement.local import LocalPlacement

        return LocalPlacement(run, config)
    if config.on == "slurm":
        from evermesh.launcher.placement.slurm import SlurmPlacement

        return SlurmPlacement(run, config, token)
    from evermesh.launcher.placement.ray import RayPlacement

    return RayPlacement(run, config, token)
