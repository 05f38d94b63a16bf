"""What agents tell of the snapshots in the memory of their nodes, and which one a job can go on from."""

from collections.abc import Sequence

from evermesh.launcher.config import JobConfig
from evermesh.launcher.controller.nodes import Nodes
from evermesh.launcher.controller.recovery import Group, find_recovery, groups_of
from evermesh.launcher.controller.work import launch_of
from evermesh.launcher.messages import InMemory


def remembered_step(nodes: Nodes, chosen: Sequence[str], config: JobConfig, since_s: float) -> int | None:
    """Step of the newest snapshot of which the ranks on the nodes ``chosen``, in this order, all have their part in the
    memory of their own node, or will have when it is rebuilt. None: there is none.

    The ranks choose by themselves once more when they start, by the same rule: they see what was damaged, or sealed since.
    """
    groups, memories = job_groups(config, len(chosen)), memories_of(nodes, chosen, launch_of(since_s))
    found = find_recovery(groups, memories, config.workers // config.nodes)
    return found.version.step if found is not None else None


def job_groups(config: JobConfig, nodes: int) -> tuple[Group, ...]:
    """The stripes of an attempt on so many nodes."""
    return groups_of(nodes, config.train.snapshot.code if config.train.snapshot else "none")


def memories_of(nodes: Nodes, chosen: Sequence[str], launch: str) -> list[InMemory | None]:
    """What the nodes ``chosen`` hold of a launch, as far as it is known."""
    told = [nodes[name].in_memory for name in chosen]
    return [found if found is not None and found.launch == launch else None for found in told]


def newest_of(saved: int | None, remembered: int | None) -> int | None:
    """The later of the steps of a checkpoint and of a snapshot; None without both."""
    return max((step for step in (saved, remembered) if step is not None), default=None)
