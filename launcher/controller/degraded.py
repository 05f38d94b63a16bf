"""Nodes whose ranks get less to do, because they were measured to be slow: rank 0, which plans, is told their speeds."""

import time

from evermesh.launcher.controller.job import Job
from evermesh.launcher.controller.record import Slowed
from evermesh.launcher.messages import Speeds

_VALID_S = 900.0
"""For which a measurement counts."""
_SLOWEST = 0.1


class Degraded:
    """The speeds of the nodes of ``job``: which shares are degraded is in its record, so the next controller knows it."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._slow: dict[str, tuple[float, float]] = {}
        """By node: how many times as long as others it takes, and when that was found."""
        self._sent: tuple[int, dict[int, float]] | None = None
        """Generation, and what its rank 0 was told; None: an earlier controller may have told it something."""
        self._through: object = None
        """The connection that took it."""

    def note_slow(self, node: str, times: float) -> None:
        """A detector has found that its ranks take so many times as long as others for the same work."""
        self._slow[node] = (times, time.monotonic())

    def slowdown_of(self, node: str) -> float:
        """The last that was found; 1: nothing, or long ago. While its share is degraded that with which it was."""
        if node in self._job.record.slowed:
            return self._job.record.slowed[node].slowdown
        times, found_s = self._slow.get(node, (1.0, 0.0))
        return times if time.monotonic() - found_s < _VALID_S else 1.0

    def degraded_for_s(self, node: str) -> float | None:
        """Since when its share is degraded; None: it is not."""
        slowed = self._job.record.slowed.get(node)
        return None if slowed is None else max(0.0, time.time() - slowed.since_s)

    def degrade(self, node: str) -> None:
        """Degrade the share of a node to what was found; the journal has it."""
        self._job.record.slowed.setdefault(node, Slowed(self.slowdown_of(node), time.time()))

    def restore(self, node: str) -> None:
        """Give a node its whole share again; the journal has it."""
        self._job.record.slowed.pop(node, None)

    def look(self) -> None:
        """Tell the ranks that train what they do not know yet."""
        job, life = self._job, self._job.life
        if life is None or job.state != "training" or not job.record.drained.keys().isdisjoint(life.nodes):
            return  # ranks that are about to leave need no other plans
        wanted = {
            rank: max(_SLOWEST, 1 / slowed.slowdown)
            for node, slowed in job.record.slowed.items()
            for rank in life.ranks_of(node)
        }
        planning = job.nodes[life.nodes[0]]
        if planning.outbox is not None and wanted != self._known(planning.outbox):
            self._sent, self._through = (job.generation, wanted), planning.outbox
            planning.send(Speeds(generation=job.generation, speeds=wanted))

    def _known(self, connection: object) -> dict[int, float] | None:
        """What rank 0 was told; None: nobody knows, for another controller may have told it, or the connection was lost
        meanwhile."""
        assert self._job.life is not None
        if self._sent is not None and self._sent[0] == self._job.generation:
            return self._sent[1] if self._through is connection else None
        return None if self._job.life.is_taken_over else {}
