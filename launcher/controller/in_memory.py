"""What agents tell of the snapshots in the memory of their nodes, and which one a job can go on from."""

from evermesh.fault.snapshot.choosing import Version
from evermesh.launcher.config import JobConfig
from evermesh.launcher.controller.nodes import Nodes
from evermesh.launcher.controller.work import launch_of


def remembered_step(nodes: Nodes, config: JobConfig, since_s: float) -> int | None:
    """Step of the newest snapshot of which the parts of all ranks are in the memory of nodes that are there, in whatever
    layout and wherever. None: there is none.

    The ranks choose by themselves once more when they start: they see what was damaged, or sealed since, what keepers have
    whose agents are gone, and where copies make up for a part.
    """
    held: dict[Version, set[int]] = {}
    worlds: dict[Version, int] = {}
    for node in nodes:
        found = node.in_memory
        if found is None or found.launch != launch_of(since_s) or node.state != "ready":
            continue
        for part in found.parts:
            version = Version(part.generation, part.step, part.shard_map)
            held.setdefault(version, set()).add(part.rank)
            worlds[version] = part.world_size or config.workers
    complete = [version for version, ranks in held.items() if len(ranks) == worlds[version]]
    return max(complete).step if complete else None


def newest_of(saved: int | None, remembered: int | None) -> int | None:
    """The later of the steps of a checkpoint and of a snapshot; None without both."""
    return max((step for step in (saved, remembered) if step is not None), default=None)
