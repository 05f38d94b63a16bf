"""What agents tell of the snapshots in the memory of their nodes, and which one a job can go on from."""

from collections.abc import Sequence

from evermesh.fault.snapshot.choosing import Version, common_versions
from evermesh.launcher.config import JobConfig
from evermesh.launcher.controller.nodes import Nodes
from evermesh.launcher.controller.work import launch_of


def remembered_step(nodes: Nodes, chosen: Sequence[str], config: JobConfig, since_s: float) -> int | None:
    """Step of the newest snapshot of which the ranks on the nodes ``chosen``, in this order, all have their part in the
    memory of their own node. None: there is none.

    The ranks choose by themselves once more when they start, by the same rule: they see what was damaged, or sealed since.
    """
    ranks_per_node = config.workers // config.nodes
    held: dict[int, list[Version]] = {}
    for number, name in enumerate(chosen):
        found = nodes[name].in_memory
        if found is None or found.launch != launch_of(since_s):
            return None
        for part in found.parts:
            if part.rank // ranks_per_node == number:
                version = Version(part.generation, part.step, part.shard_map)
                held.setdefault(part.rank, []).append(version)
    versions = common_versions(held, config.workers)
    return versions[0].step if versions else None


def newest_of(saved: int | None, remembered: int | None) -> int | None:
    """The later of the steps of a checkpoint and of a snapshot; None without both."""
    return max((step for step in (saved, remembered) if step is not None), default=None)
