"""Nodes whose ranks get less to do, because they were measured to be slow: rank 0, which plans, is told their speeds."""

import time

from evermesh.launcher.controller.job import Job
from evermesh.launcher.messages import Speeds

_VALID_S = 900.0
"""For which a measurement counts."""
_SLOWEST = 0.1


class Degraded:
    """The speeds of the nodes of ``job``."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._slow: dict[str, tuple[float, float]] = {}
        """By node: how many times as long as others it takes, and when that was found."""
        self._since_s: dict[str, float] = {}
        """Nodes whose share is degraded."""
        self._speeds: dict[str, float] = {}
        self._sent: tuple[int, dict[int, float]] = (0, {})
        """Generation, and what its rank 0 was told."""

    def note_slow(self, node: str, times: float) -> None:
        """A detector has found that its ranks take so many times as long as others for the same work."""
        self._slow[node] = (times, time.monotonic())

    def slowdown_of(self, node: str) -> float:
        """The last that was found; 1: nothing, or long ago. While its share is degraded that with which it was."""
        if node in self._speeds:
            return 1 / self._speeds[node]
        times, found_s = self._slow.get(node, (1.0, 0.0))
        return times if time.monotonic() - found_s < _VALID_S else 1.0

    def degraded_for_s(self, node: str) -> float | None:
        """Since when its share is degraded; None: it is not."""
        since_s = self._since_s.get(node)
        return None if since_s is None else time.monotonic() - since_s

    def set(self, node: str, *, is_slow: bool) -> None:
        """Degrade the share of a node to what was found, or give it its whole share again."""
        if is_slow:
            self._speeds[node] = max(_SLOWEST, 1 / self.slowdown_of(node))
            self._since_s.setdefault(node, time.monotonic())
        else:
            self._speeds.pop(node, None)
            self._since_s.pop(node, None)

    def look(self) -> None:
        """Tell the ranks that train what they do not know yet."""
        job, life = self._job, self._job.life
        if life is None or job.state != "training":
            return
        wanted = {rank: speed for node, speed in self._speeds.items() for rank in life.ranks_of(node)}
        known = self._sent[1] if self._sent[0] == job.generation else {}
        if wanted != known:
            self._sent = (job.generation, wanted)
            job.nodes[life.nodes[0]].send(Speeds(generation=job.generation, speeds=wanted))
