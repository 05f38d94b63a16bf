"""What agents tell of the snapshots in the memory of their nodes, and which one a job can go on from."""

from collections import Counter
from collections.abc import Sequence

from evermesh.launcher.config import JobConfig
from evermesh.launcher.controller.nodes import Nodes
from evermesh.launcher.controller.racks import code_for_racks
from evermesh.launcher.controller.recovery import Group, Recovery, complete_version, find_recovery, groups_of
from evermesh.launcher.controller.work import launch_of
from evermesh.launcher.messages import InMemory


def remembered_step(nodes: Nodes, chosen: Sequence[str], config: JobConfig, since_s: float) -> int | None:
    """Step of the newest snapshot of which the ranks on the nodes ``chosen``, in this order, all have their part in the
    memory of their own node, or will have when it is rebuilt; or which is complete elsewhere. None: there is none.

    The ranks choose by themselves once more when they start: they see what was damaged, or sealed since, what keepers have
    whose agents are gone, and where copies make up for a part.
    """
    found = recovery_of(nodes, chosen, config, since_s)
    rebuilt = found.version.step if found is not None else None
    return newest_of(rebuilt, complete_step(nodes, config, since_s))


def recovery_of(nodes: Nodes, chosen: Sequence[str], config: JobConfig, since_s: float) -> Recovery | None:
    """The newest snapshot of an attempt on as many nodes that those ``chosen``, in this order, hold or can rebuild."""
    memories = memories_of(nodes, chosen, launch_of(since_s))
    return find_recovery(job_groups(config, len(chosen)), memories, config.workers // config.nodes)


def complete_step(nodes: Nodes, config: JobConfig, since_s: float) -> int | None:
    """Step of the newest snapshot of which the parts of all ranks are in the memory of nodes that are there, in whatever
    layout and wherever. None: there is none."""
    found = complete_version(nodes.memories(launch_of(since_s)).values(), config.workers)
    return found.step if found is not None else None


def job_groups(config: JobConfig, nodes: int) -> tuple[Group, ...]:
    """The stripes of an attempt on so many nodes."""
    code = config.train.snapshot.code if config.train.snapshot else "none"
    if code == "auto" and config.racks and nodes > 1:
        code = code_for_racks(nodes, tuple(sorted(Counter(config.racks.values()).values(), reverse=True)))
    return groups_of(nodes, code)


def memories_of(nodes: Nodes, chosen: Sequence[str], launch: str) -> list[InMemory | None]:
    """What the nodes ``chosen`` hold of a launch, as far as it is known."""
    told = [nodes[name].in_memory for name in chosen]
    return [found if found is not None and found.launch == launch else None for found in told]


def newest_of(saved: int | None, remembered: int | None) -> int | None:
    """The later of the steps of a checkpoint and of a snapshot; None without both."""
    return max((step for step in (saved, remembered) if step is not None), default=None)
