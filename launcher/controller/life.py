"""What the controller knows of the current attempt."""

import time
from typing import Any

from evermesh.launcher.config import JobConfig
from evermesh.launcher.controller.machine import Attempt
from evermesh.launcher.controller.record import Record
from evermesh.launcher.messages import Outcome, Place, RankBeat
from evermesh.launcher.policy import FailedAttempt, Failure
from evermesh.parallelism.layout import Layout


class Life:
    """One life of all ranks, as agents tell of it."""

    def __init__(self, nodes: tuple[str, ...], config: JobConfig, began_at: int | None) -> None:
        self.nodes, self.began_at = nodes, began_at
        """``began_at``: step of the newest checkpoint or snapshot when it began."""
        self.remembered: int | None = None
        """Step of the newest snapshot then."""
        self.layout: Layout | None = None
        """Of its ranks; None: they have not been told to start by this controller."""
        self.ranks_per_node = config.workers // config.nodes
        self.world_size = self.ranks_per_node * len(nodes)
        self.is_counted = self.is_ending = False
        self.is_started = False
        """Its ranks have been told to start, or an agent tells of them."""
        self.is_taken_over = False
        """An earlier controller began it."""
        self.has_reported = False
        """Rank 0 has reported a step, to this controller or to an earlier one."""
        self.saving_behind: int | None = None
        """The last step when a checkpoint was asked for; None: none was."""
        self.done: dict[int, dict[str, Any]] = {}
        self.failures: dict[int, Failure] = {}
        self.failed_s: float | None = None
        self.over: set[str] = set()
        self.lost: set[str] = set()
        self.pids: dict[int, int] = {}
        self.beats: dict[int, RankBeat] = {}

    @classmethod
    def from_record(cls, record: Record, config: JobConfig) -> "Life | None":
        """The attempt that an earlier controller began; its agents tell the rest."""
        if not record.attempt_nodes:
            return None
        life = cls(record.attempt_nodes, config, record.began_at)
        life.is_counted, life.is_ending = record.is_counted, record.is_ending
        life.has_reported, life.is_taken_over = record.has_stepped, True
        return life

    @property
    def has_stepped(self) -> bool:
        """Whether a rank has finished a step."""
        return self.has_reported or any(beat.step > 0 for beat in self.beats.values())

    @property
    def step_s(self) -> float:
        """Time of a step, seconds; 0 while unknown."""
        return max((beat.step_s for beat in self.beats.values()), default=0.0)

    def place(self, number: int) -> Place:
        """The ranks of the node with this number."""
        return Place(
            first_rank=number * self.ranks_per_node,
            ranks=self.ranks_per_node,
            world_size=self.world_size,
            node_rank=number,
            nodes=len(self.nodes),
        )

    def ranks_of(self, node: str) -> tuple[int, ...]:
        """The ranks of ``node``; none if it does not take part."""
        if node not in self.nodes:
            return ()
        first = self.nodes.index(node) * self.ranks_per_node
        return tuple(range(first, first + self.ranks_per_node))

    def take(self, node: str, outcome: Outcome) -> None:
        """Add what an agent tells; it may tell it again."""
        self.is_started = True
        self.done |= outcome.done
        for failure in outcome.failures:
            self.fail(failure)
        if outcome.is_over:
            self.over.add(node)

    def fail(self, failure: Failure) -> None:
        """A rank has failed; what was known of it first counts."""
        self.failures.setdefault(failure.rank, failure)
        self.failed_s = self.failed_s or time.monotonic()

    def view(self) -> Attempt:
        """What the machine decides upon."""
        return Attempt(
            nodes=self.nodes,
            world_size=self.world_size,
            done=self.done,
            failures=tuple(self.failures.values()),
            failed_s=self.failed_s,
            over=frozenset(self.over),
            has_stepped=self.has_stepped,
            is_ending=self.is_ending,
            is_counted=self.is_counted,
            lost=frozenset(self.lost),
            is_started=self.is_started,
        )

    def failed(self, reason: str, *, progressed: bool) -> FailedAttempt:
        """The attempt for the history. What ranks said after a node was lost was only a consequence.

        ``reason`` stands in where no rank has failed: a node could not start its ranks, or an earlier controller alone
        knew which one had.
        """
        lost = tuple(self._lost_failure(node) for node in sorted(self.lost))
        unknown = Failure(rank=0, time_s=time.monotonic(), how=reason, cause="died")
        failures = lost or tuple(self.failures.values()) or (unknown,)
        return FailedAttempt(failures=failures, progressed=progressed, has_stepped=self.has_stepped)

    def _lost_failure(self, node: str) -> Failure:
        """Stands for all ranks of a lost node."""
        first = self.ranks_of(node)[0]
        return Failure(rank=first, time_s=time.monotonic(), how=f"was lost with {node}", cause="died")
