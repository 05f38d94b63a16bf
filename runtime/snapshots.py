"""The snapshots of a run: how often the state goes into the memory of the keepers, and how an attempt goes on from there."""

import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from evermesh import checkpoint
from evermesh.checkpoint.agreement import RankFailure, together
from evermesh.fault.errors import KeeperRefused
from evermesh.fault.snapshot.choosing import Version, common_versions
from evermesh.fault.snapshot.keeper.slots import NUM_SLOTS
from evermesh.fault.snapshot.snapshots import Keeping, Snapshots, ranks_of_node
from evermesh.fault.snapshot.source import slot_with, source_of_node, versions_of
from evermesh.parallelism.collectives import Communicator
from evermesh.runtime.config import SnapshotConfig

if TYPE_CHECKING:
    from evermesh.runtime.trainer import Trainer

_CALL_SITE = "checkpoint"


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
        """Take over the newest snapshot that all ranks hold and that no checkpoint is newer than; whether there was one.
        Collective.

        Every rank reads the memory of its own node. A snapshot that is damaged on any rank is told in the event log, and
        the one before it is tried. Where none can be used, the state is as it was.
        """
        if self._keeping is None:
            return False
        trainer, newest = self._trainer, -1 if self._keeping.newest is None else self._keeping.newest
        versions = _agreed(self._keeping, trainer.shards.digest(), trainer.groups.host)
        is_touched = False
        for version in versions:
            if version.step < newest:
                break
            try:
                self._restore(version)
            except RankFailure as failure:
                is_touched = True
                text = f"the snapshot of step {version.step} cannot be used: {failure}"
                trainer.reporter.log("snapshot damaged", text, step=version.step, rank=failure.rank)
                continue
            return True
        if is_touched and newest < 0:  # what was read of it must not stay
            groups = trainer.groups
            trainer.dismantle()
            gc.collect()
            trainer.build(trainer.config, initialize=True, before=groups)
            groups.leave(trainer.groups)
        return False

    def _restore(self, version: Version) -> None:
        trainer, began_s = self._trainer, time.monotonic()
        assert self._keeping is not None
        area, state = self._keeping.area, trainer.state
        if trainer.faults is not None:
            trainer.faults.reach("restore", version.step)
        mates = ranks_of_node(trainer.groups.host)

        def load() -> checkpoint.LoadResult:
            source = source_of_node(area, mates, version, trainer.shards, trainer.workers)
            return state.load_snapshot(source)

        loaded = together(trainer.groups.host, load)
        self._restored = slot_with(area, trainer.rank, version)
        state.take_objects(loaded)
        seconds = time.monotonic() - began_s
        text = f"from memory, step {version.step} of attempt {version.generation}, on {trainer.workers} workers"
        trainer.reporter.log(
            "resumed", text, step=version.step, load_s=seconds, source="memory", bytes_read=loaded.bytes_read
        )

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


def _agreed(keeping: Keeping, digest: str, communicator: Communicator) -> list[Version]:
    """The snapshots in this layout of which every rank holds its part, newest first. Collective."""
    own = [version for version in versions_of(keeping.area, communicator.rank) if version.shard_map == digest]
    rows = [(version.generation, version.step) for version in own]
    told = torch.tensor(rows + [(-1, -1)] * (NUM_SLOTS - len(rows)), dtype=torch.int64).flatten()
    gathered = torch.empty(communicator.size * len(told), dtype=torch.int64)
    communicator.all_gather(gathered, told, _CALL_SITE)
    held = {
        rank: [Version(generation, step, digest) for generation, step in of_rank if generation >= 0]
        for rank, of_rank in enumerate(gathered.view(communicator.size, NUM_SLOTS, 2).tolist())
    }
    return common_versions(held, communicator.size)
