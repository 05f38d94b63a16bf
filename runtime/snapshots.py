"""The snapshots of a run: how often the state goes into the memory of the keepers, and how an attempt goes on from there."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

from evermesh.fault.errors import KeeperRefused
from evermesh.fault.snapshot.frequency import Failures
from evermesh.fault.snapshot.snapshots import Counts, Keeping, Snapshots
from evermesh.runtime.config import SnapshotConfig
from evermesh.runtime.restoring import Restoring
from evermesh.runtime.snapshot_schedule import SnapshotSchedule
from evermesh.runtime.telemetry import SnapshotReport

if TYPE_CHECKING:
    from evermesh.runtime.trainer import Trainer

_FINISH_S = 60.0
"""How long keepers may take to complete a snapshot that is waited for; they give up a silent peer after half of that."""
_LOOK_S = 0.005


class Remembered(NamedTuple):
    """A snapshot."""

    step: int | None = None
    """None: there is none."""
    began_s: float = 0.0
    """Monotonic clock: when it was copied, or the state was restored from it."""


class RunSnapshots:
    """Snapshots of the state of a trainer, if there are keepers (``keeping``) and its configuration wants them."""

    def __init__(self, trainer: "Trainer", keeping: Keeping | None) -> None:
        self._trainer = trainer
        self._keeping = keeping if trainer.config.snapshot is not None else None
        if trainer.faults is not None and self._keeping is not None:
            trainer.faults.memory = self._keeping.area
        self._snapshots: Snapshots | None = None
        self._restored: int | None = None
        """Slot of this rank that the state came from."""
        self._schedule = self._scheduled(trainer)
        self._is_due = self.is_touched = False
        self._newest = self._begun = Remembered()
        self._told_stop_s = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Training goes on inside the block. Collective at its beginning. Without memory for snapshots it goes on without."""
        if self._keeping is None:
            yield
            return
        trainer = self._trainer
        try:
            state = trainer.state.registry
            self._snapshots = Snapshots(
                self._keeping, trainer.shards, state.tensors, trainer.groups.host, self._restored
            )
        except KeeperRefused as error:
            trainer.reporter.log("memory", f"no snapshots are made, so a restart goes on from a checkpoint: {error}")
        try:
            yield
        finally:
            self._close()

    @property
    def newest_step(self) -> int | None:
        """Of the newest snapshot that all ranks have in memory; None: there is none."""
        return self._newest.step

    def vote(self) -> float:
        """What this rank adds to the sum of a step. Not collective."""
        if self._snapshots is None:
            return 0.0
        is_due = self._schedule.is_due(self._trainer.progress.step)
        return self._snapshots.vote(is_due=is_due and not (self._snapshots.is_pending and self._schedule.chooses))

    def count(self, votes: float) -> None:
        """Take the sum over all ranks."""
        if self._snapshots is not None:
            outcome, self._is_due = self._snapshots.count(votes)
            if outcome == "committed":
                self._newest = self._begun
                self._schedule.note_committed()

    def take(self) -> None:
        """Behind a step: copy the state, if all ranks are to. Returns after the copy."""
        if self._snapshots is None or not self._is_due:
            return
        state, began_s, step = self._trainer.state, time.monotonic(), self._trainer.progress.step
        if self._snapshots.begin(step, state.objects(), state.identity):
            self._begun = Remembered(step, began_s)
            self._schedule.note_taken(step, time.monotonic() - began_s)

    def finish(self) -> bool:
        """Behind a step: return when a snapshot of it is complete on all ranks; whether it is. Collective.

        Without keepers, or if one is lost or takes a minute, it is not: only a checkpoint keeps the state then.
        """
        if self._snapshots is None:
            return False
        trainer, step = self._trainer, self._trainer.progress.step
        trainer.groups.moment.phase = "checkpoint"
        if self._begun.step != step:
            self._settle(self._snapshots)  # an older one may be under way
            self._is_due = True
            self.take()
        self._settle(self._snapshots)
        return self._newest.step == step

    def _settle(self, snapshots: Snapshots) -> None:
        """Vote as in the sums of steps until no snapshot is under way."""
        until = time.monotonic() + _FINISH_S
        while snapshots.is_pending:
            if time.monotonic() > until:
                snapshots.give_up()
            votes = torch.tensor([snapshots.vote(is_due=False)], dtype=torch.float64)
            self._trainer.groups.host.all_reduce(votes, "checkpoint")
            self.count(float(votes))
            time.sleep(_LOOK_S if snapshots.is_pending else 0.0)

    def told(self) -> SnapshotReport:
        """How it stands with them behind a step; on rank 0. ``stop_s`` counts from the call before."""
        counts = self._snapshots.counts if self._snapshots is not None else Counts()
        stop_s, self._told_stop_s = counts.stop_s - self._told_stop_s, counts.stop_s
        chosen, newest = self._schedule.chosen, self._newest
        return SnapshotReport(
            step=newest.step,
            age_s=0.0 if newest.step is None else time.monotonic() - newest.began_s,
            every=chosen.steps if chosen is not None else None,
            committed=counts.committed,
            skipped=counts.skipped,
            lost=counts.lost,
            stop_s=stop_s,
        )

    def restore(self) -> bool:
        """Take over the newest snapshot that no checkpoint is newer than; whether there was one. Collective.

        In the layout in which it was made, every rank reads the memory of its own node. In another one, or where nodes have
        changed, it is put together from the memory of all nodes that can be reached. A snapshot that is damaged for any
        rank is told in the event log, and the one before it is tried. Where none can be used, the state is as it was, or
        ``is_touched``.
        """
        if self._keeping is None:
            return False
        restoring = Restoring(self._trainer, self._keeping)
        if restoring.run():
            assert restoring.version is not None
            self._restored = restoring.slot
            self._newest = Remembered(restoring.version.step, restoring.began_s)
            if restoring.is_elsewhere:
                self._schedule.hurry()  # what came from another layout, or from other nodes, is to be here soon
            return True
        self.is_touched = restoring.is_touched
        return False

    def _scheduled(self, trainer: "Trainer") -> SnapshotSchedule:
        seen = Failures(0, 0.0, len(set(trainer.groups.world.nodes)) or 1)
        if self._keeping is not None:
            seen = seen._replace(failed=self._keeping.failures, running_s=self._keeping.running_s)
        log = lambda kind, text, **fields: trainer.reporter.log(kind, text, **fields)  # noqa: E731  it has none yet
        return SnapshotSchedule(trainer.config.snapshot or SnapshotConfig(), seen, log)

    def _close(self) -> None:
        snapshots, self._snapshots, self._restored, self._is_due = self._snapshots, None, None, False
        self._newest, self._told_stop_s = Remembered(), 0.0
        self._schedule.hurry()  # what follows in this attempt has another layout, and nothing in memory yet
        if snapshots is None:
            return
        snapshots.close()
        found = snapshots.counts
        if found.committed or found.skipped or found.lost:
            text = (
                f"{found.committed} in memory on all ranks, {found.skipped} skipped, {found.lost} lost with a keeper; "
                f"training stood still for {found.stop_s:.3f} s"
            )
            self._trainer.reporter.log(
                "snapshots",
                text,
                committed=found.committed,
                skipped=found.skipped,
                lost=found.lost,
                stop_s=found.stop_s,
            )
