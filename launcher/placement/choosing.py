"""Which place a job gets that leaves the choice, and how many spares there are in it; loads nothing of any place."""

import os

from evermesh.launcher.config import JobConfig
from evermesh.launcher.errors import AllocationMissing
from evermesh.launcher.placement.ray_here import finds_cluster
from evermesh.launcher.placement.slurm_allocation import Allocation


def placed(config: JobConfig) -> JobConfig:
    """``config`` with a place that is not ``auto``; in a Slurm allocation all nodes beyond ``nodes`` are spares.

    Raises:
        AllocationMissing: it is to run in a Slurm allocation, and there is none, or it is too small.
        SlurmSilent: the allocation is not known.
    """
    config = config.model_copy(update={"on": _found()}) if config.on == "auto" else config
    if config.on != "slurm":
        return config
    hosts, least = len(Allocation.current().hosts), config.min_nodes or config.nodes
    if hosts < least:
        raise AllocationMissing(
            f"the job needs {least} nodes, but the Slurm allocation has {hosts}. Submit it with "
            f"`sbatch --nodes={config.nodes}` or more, or launch it with --nodes {hosts}."
        )
    return config.model_copy(update={"spares": max(0, hosts - config.nodes)})


def _found() -> str:
    if "SLURM_JOB_ID" in os.environ:
        return "slurm"
    return "ray" if finds_cluster() else "local"
