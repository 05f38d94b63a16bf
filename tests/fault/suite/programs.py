"""What the ranks of the suite's jobs do in a step, as lists of actions, so that a fault is a change of such a list."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

What = Literal["load", "compute", "collective", "send", "receive", "optimize", "fault"]
_ACTIVATIONS, _GRADIENTS = 2048, (16384, 4096)
_LOAD_S = 0.002


class Action(NamedTuple):
    """One thing that a rank does."""

    what: What
    axis: str = ""
    """Of a collective or message: ``world``, ``dp``, ``tp`` or ``pp``."""
    operation: str = ""
    """Of a collective: ``all_reduce``, ``all_gather`` or ``broadcast``."""
    elements: int = 0
    dtype: str = "float32"
    peer: int = -1
    """Of a message: global rank."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Job:
    """A job: its ranks, tensor parallelism innermost, pipeline stages outermost, and what they do."""

    dp: int
    tp: int
    pp: int
    flavour: Literal["runtime", "script", "bare"] = "runtime"
    """Declares step and phase as the runtime does; is armed as a script and counted by its optimizer; or has none either."""
    is_plain: bool = False
    """One sum of gradients in a step and nothing else."""
    micro_batches: int = 2
    compute_s: float = 0.004
    """Of half a forward pass of a micro-batch: a wait, as for a device; cores for all ranks there are not."""
    ranks_per_node: int = 2

    @property
    def world_size(self) -> int:
        return self.dp * self.tp * self.pp

    def node(self, rank: int) -> str:
        return f"node-{rank // self.ranks_per_node}"

    def place(self, rank: int) -> tuple[int, int, int]:
        """Of a rank in pp, dp and tp."""
        return rank // (self.dp * self.tp), rank // self.tp % self.dp, rank % self.tp

    def groups(self) -> list[tuple[str, tuple[int, ...]]]:
        """Axis and ranks of all groups besides the world, in the order in which they are made."""
        ranks = np.arange(self.world_size).reshape(self.pp, self.dp, self.tp)
        found: list[tuple[str, tuple[int, ...]]] = []
        for axis, at in (("tp", 2), ("dp", 1), ("pp", 0)):
            if ranks.shape[at] > 1:
                rows = np.moveaxis(ranks, at, 2).reshape(-1, ranks.shape[at])
                found += [(axis, tuple(row)) for row in rows.tolist()]
        return found

    def group_of(self, rank: int, axis: str) -> tuple[int, ...]:
        """The ranks with which a rank is in a group of ``axis``."""
        if axis == "world":
            return tuple(range(self.world_size))
        return next(ranks for name, ranks in self.groups() if name == axis and rank in ranks)


def program(job: Job, rank: int, step: int = 0) -> list[Action]:
    """What a rank does in a step. ``step`` counts from 1; the same for all steps of a healthy job."""
    load, done = Action("load", seconds=_LOAD_S), Action("optimize")
    if job.is_plain:
        gradients = Action("collective", "world", "all_reduce", _GRADIENTS[0])
        return [load, *[Action("compute", seconds=job.compute_s)] * 3, gradients, done]
    stage, _, _ = job.place(rank)
    of_stage = job.dp * job.tp
    before = rank - of_stage if stage > 0 else None
    behind = rank + of_stage if stage < job.pp - 1 else None
    found = [load]
    for _ in range(job.micro_batches):
        found += _message("receive", before)
        found += 2 * [Action("compute", seconds=job.compute_s), *_sum(job, "tp", _ACTIVATIONS)]
        found += _message("send", behind)
    for _ in range(job.micro_batches):
        found += _message("receive", behind)
        found += [Action("compute", seconds=2 * job.compute_s), *_sum(job, "tp", _ACTIVATIONS)]
        found += _message("send", before)
    for elements in _GRADIENTS:
        found += _sum(job, "dp", elements)
    if job.dp > 1:
        found.append(Action("collective", "dp", "all_gather", 512))
    return [*found, Action("collective", "world", "all_reduce", 2), done]


def _sum(job: Job, axis: str, elements: int) -> list[Action]:
    size = {"tp": job.tp, "dp": job.dp}[axis]
    return [Action("collective", axis, "all_reduce", elements)] if size > 1 else []


def _message(what: Literal["send", "receive"], peer: int | None) -> list[Action]:
    return [Action(what, "pp", elements=_ACTIVATIONS, peer=peer)] if peer is not None else []
