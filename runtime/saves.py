"""The checkpoints of a run: written while training goes on, or while it stands still, and told about when they are there."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from evermesh.checkpoint.background.saver import BackgroundSaver, SaveReport
from evermesh.checkpoint.errors import CheckpointNotSaved, HostMemoryShort
from evermesh.checkpoint.stores.places import Place

if TYPE_CHECKING:
    from evermesh.runtime.trainer import Trainer

_MOST_SKIPPED = 15
_LAST_WAIT_S = 10.0
"""After an error: how long a checkpoint that is being written may take until it is given up. One rank alone waits for the
end."""


class Saves:
    """Saves the state of a trainer where its configuration says, and logs every checkpoint when ``latest`` names it."""

    def __init__(self, trainer: "Trainer") -> None:
        self._trainer = trainer
        self._saver: BackgroundSaver | None = None
        self._told: int | None = None
        """Step of the last checkpoint that was logged."""
        self._failed = self._skip = 0
        """Saves in a row that storage refused; how many due ones are left out before the next. The same on all ranks."""
        self._stop_s = self._write_s = 0.0

    @contextmanager
    def running(self, last: int) -> Iterator[None]:
        """Training goes on to step ``last`` inside the block. Collective at its beginning.

        Raises:
            HostMemoryShort: on every rank, if the copy of the state that the configuration asks for has no room.
        """
        self._saver = self._background(last)
        try:
            yield
        except BaseException:
            if self._saver is not None:
                self._tell(self._saver.settle(math.inf if self._trainer.workers == 1 else _LAST_WAIT_S))
            raise
        finally:
            if self._saver is not None:
                self._saver.close()
                self._saver = None

    def save(self, *, wait: bool) -> Place | None:
        """Save the state as it is now; returns where, None when the trainer writes nothing. Collective.

        With ``wait`` the checkpoint is durable when this returns; without, it may become so while training goes on.

        Raises:
            CheckpointNotSaved: on every rank, if any of them failed to write this checkpoint or the one before.
        """
        trainer = self._trainer
        if trainer.directory is None:
            return None
        began_s = time.monotonic()
        trainer.groups.moment.phase = "checkpoint"
        trainer.reach("copy")
        if self._saver is None:
            config = trainer.config.checkpoint
            path = trainer.state.save(self._directory, config.retention, config.parity)
            took_s = time.monotonic() - began_s
            self._tell(SaveReport(trainer.progress.step, path, took_s, took_s, trainer.shards.num_bytes))
        else:
            path = trainer.state.begin_save(self._saver, self._tell)
            trainer.reach("write")
            if wait:
                self._tell(self._saver.finish())
        self._stop_s += time.monotonic() - began_s
        return path

    def save_if_possible(self, *, asked: bool) -> Place | None:
        """As ``save``, of a step behind which training goes on: storage that refuses does not end it while the state is
        in memory on all ranks. After failures in a row ever more saves are left out, unless one is ``asked`` for. Collective.

        Raises:
            CheckpointNotSaved: on every rank, if any of them failed and no snapshot is in memory.
        """
        if self._skip and not asked:
            self._skip -= 1
            return None
        was_under_way = self._saver is not None and self._saver.is_busy
        try:
            path = self.save(wait=False)
        except CheckpointNotSaved as error:
            self._bear(error)
            return None
        if was_under_way or self._saver is None:  # that one is durable now, or this one
            self._failed = self._skip = 0
        return path

    def finish_if_possible(self) -> None:
        """As ``finish``; raises as ``save_if_possible`` does. Collective, at any point of a step."""
        moment = self._trainer.groups.moment
        before, moment.phase = moment.phase, "checkpoint"
        try:
            self.finish()
        except CheckpointNotSaved as error:
            self._bear(error)
        finally:
            moment.phase = before

    def _bear(self, error: CheckpointNotSaved) -> None:
        """Go on without this checkpoint. Collective. Raises ``error`` where only checkpoints keep the state."""
        trainer = self._trainer
        unkept = torch.tensor([trainer.snapshots.newest_step is None], dtype=torch.int64)
        trainer.groups.host.all_reduce(unkept, "checkpoint", maximum=True)
        if int(unkept):
            raise error
        self._failed += 1
        self._skip = min(2 ** (self._failed - 1), _MOST_SKIPPED + 1) - 1
        later = f" and {self._skip} due after that are left out" if self._skip else ""
        text = (
            f"{error} Training goes on: step {trainer.snapshots.newest_step} is in memory. It is the failure number "
            f"{self._failed} in a row{later}."
        )
        trainer.reporter.log("checkpoint failed", text, step=error.step, in_a_row=self._failed, errno=error.errno)

    def has_failed(self) -> bool:
        """Whether this rank knows that a checkpoint being written has failed. Not collective; called in every step."""
        if self._saver is None:
            return False
        is_well = self._saver.look()
        self._tell(self._saver.visible)
        return not is_well

    def finish(self) -> None:
        """Return when nothing is being written any more. Collective.

        Raises:
            CheckpointNotSaved: on every rank, if any of them failed.
        """
        if self._saver is not None:
            self._tell(self._saver.finish())

    def take_times(self) -> tuple[float, float]:
        """Seconds since the last call: that training stood still for checkpoints, and that those took to write which became
        visible meanwhile."""
        times, self._stop_s, self._write_s = (self._stop_s, self._write_s), 0.0, 0.0
        return times

    @property
    def _directory(self) -> Place:
        assert self._trainer.directory is not None
        return self._trainer.config.checkpoint.directory(self._trainer.directory)

    def _background(self, last: int) -> BackgroundSaver | None:
        """What saves while training goes on, if a checkpoint is due before the last step. Collective."""
        trainer, config = self._trainer, self._trainer.config.checkpoint
        is_due = config.every is not None and (trainer.progress.step // config.every + 1) * config.every < last
        if trainer.directory is None or config.asynchronous is False or not is_due:
            return None
        try:
            return trainer.state.saver(
                self._directory, config.retention, incremental=config.incremental, parity=config.parity
            )
        except HostMemoryShort as error:
            if config.asynchronous:
                raise
            trainer.reporter.log("memory", f"training stands still while a checkpoint is written: {error}")
            return None

    def _tell(self, report: SaveReport | None) -> None:
        """Log a checkpoint, once."""
        if report is None or report.step == self._told:
            return
        self._told = report.step
        self._write_s += report.write_s
        text = f"{report.path.name} in {report.write_s:.2f} s, for {report.stop_s:.3f} s of which training stood still"
        self._trainer.reporter.log(
            "checkpoint",
            text,
            step=report.step,
            path=str(report.path),
            stop_s=report.stop_s,
            write_s=report.write_s,
            bytes_written=report.bytes_written,
        )
