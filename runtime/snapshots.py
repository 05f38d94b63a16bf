"""The snapshots of a run: how often the state goes into the memory of the keepers, and how an attempt goes on from there."""

import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from evermesh.fault.errors import KeeperRefused
from evermesh.fault.snapshot.snapshots import Keeping, Snapshots
from evermesh.runtime.config import SnapshotConfig
from evermesh.runtime.restoring import Restoring

if TYPE_CHECKING:
    from evermesh.runtime.trainer import Trainer


class RunSnapshots:
    """Snapshots of the state of a trainer, if there are keepers (``keeping``) and its configuration wants them."""

    def __init__(self, trainer: "Trainer", keeping: Keeping | None) -> None:
        self._trainer = trainer
        self._keeping = keeping if trainer.config.snapshot is not None else None
        self._snapshots: Snapshots | None = None
        self._restored: int | None = None
        """Slot of this rank that the state came from."""
        self._schedule = _Schedule(trainer.config.snapshot or SnapshotConfig())
        self._is_due = False

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

    def vote(self) -> float:
        """What this rank adds to the sum of a step. Not collective."""
        if self._snapshots is None:
            return 0.0
        return self._snapshots.vote(is_due=self._schedule.is_due(self._trainer.progress.step))

    def count(self, votes: float) -> None:
        """Take the sum over all ranks."""
        if self._snapshots is not None:
            _, self._is_due = self._snapshots.count(votes)

    def take(self) -> None:
        """Behind a step: copy the state, if all ranks are to. Returns after the copy."""
        if self._snapshots is None or not self._is_due:
            return
        state, began_s = self._trainer.state, time.monotonic()
        self._snapshots.begin(self._trainer.progress.step, state.objects(), state.identity)
        self._schedule.note(time.monotonic() - began_s)

    def restore(self) -> bool:
        """Take over the newest snapshot that no checkpoint is newer than; whether there was one. Collective.

        In the layout in which it was made, every rank reads the memory of its own node. In another one, or where nodes have
        changed, it is put together from the memory of all nodes that can be reached. A snapshot that is damaged for any
        rank is told in the event log, and the one before it is tried. Where none can be used, the state is as it was.
        """
        if self._keeping is None:
            return False
        trainer, restoring = self._trainer, Restoring(self._trainer, self._keeping)
        if restoring.run():
            self._restored = restoring.slot
            if restoring.is_elsewhere:
                self._schedule.hurry()  # what came from another layout, or from other nodes, is to be here soon
            return True
        if restoring.is_touched and self._keeping.newest is None:  # what was read of it must not stay
            groups = trainer.groups
            trainer.dismantle()
            gc.collect()
            trainer.build(trainer.config, initialize=True, before=groups)
            groups.leave(trainer.groups)
        return False

    def _close(self) -> None:
        snapshots, self._snapshots, self._restored, self._is_due = self._snapshots, None, None, False
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


class _Schedule:
    """When rank 0 wants a snapshot."""

    def __init__(self, config: SnapshotConfig) -> None:
        self._config = config
        self._since_s, self._stop_s = time.monotonic(), 0.0

    def is_due(self, step: int) -> bool:
        if self._since_s == -math.inf:
            return True
        if self._config.every is not None:
            return step % self._config.every == 0
        pause_s = max(self._config.least_s, self._stop_s / self._config.most_cost)
        return time.monotonic() - self._since_s >= pause_s

    def note(self, stop_s: float) -> None:
        """One was made, for which training stood still."""
        self._since_s, self._stop_s = time.monotonic(), stop_s

    def hurry(self) -> None:
        """The next step is one to make a snapshot behind."""
        self._since_s = -math.inf
