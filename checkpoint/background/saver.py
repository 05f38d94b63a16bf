"""Saving the state of a run again and again, while it goes on.

training   copy ── step ── step ── step ──┐ finish
writer     └─ write, checksum, fsync, index ─ (rank 0: all indexes? manifest, rename, latest) ─┘
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from pydantic import JsonValue, TypeAdapter, ValidationError

from evermesh.checkpoint.agreement import RankFailure, together
from evermesh.checkpoint.background.arena import Arena
from evermesh.checkpoint.background.copying import ArenaCopy
from evermesh.checkpoint.background.orders import Answer, SaveOrder
from evermesh.checkpoint.background.planning import writer_plan
from evermesh.checkpoint.background.process import WriterProcess
from evermesh.checkpoint.committing import Attempt, step_name
from evermesh.checkpoint.errors import HostMemoryShort, ShardMapInvalid
from evermesh.checkpoint.file_plan import planned_parts
from evermesh.checkpoint.retention import Retention, as_retention
from evermesh.checkpoint.saving import agreed_token, check_parity, rolled_back
from evermesh.checkpoint.shard_map import ShardMap
from evermesh.checkpoint.stores.places import ObjectPath, Place, place_of
from evermesh.checkpoint.tensors import Held, local_tensors
from evermesh.parallelism.collectives import Communicator

_LOOK_S = 5.0
"""Ranks that wait for their writers tell each other so often that one has failed."""
_MOST_RESTARTS = 2
"""Of the writer in one save to an object store: what it had sent is there, and its successor goes on after it."""
_CALL_SITE = "checkpoint"
_JSON_OBJECTS = TypeAdapter(dict[str, JsonValue])


@dataclass(frozen=True, slots=True)
class SaveReport:
    """A checkpoint that was written while training went on, as one rank saw it."""

    step: int
    path: Place
    stop_s: float
    """For which training stood still: a save before it that was not finished, and the copy."""
    write_s: float
    """From the copy until this rank's part was on the disk; on rank 0 until the checkpoint was visible."""
    bytes_written: int
    """By this rank; on rank 0 by all. Files that an older checkpoint already held are left out."""


class BackgroundSaver:
    """Saves the same tensors whenever asked, and stops their owner for one copy only, from the first save on.

    Collective: every rank makes one, with the arguments of ``save``; ``tensors`` are live, each save is of what they hold
    at that moment. Every rank has a process that writes; it ends with the rank, and leaves the previous checkpoint or the
    new one. Use as a context manager, or ``close``.

    Args:
        keep: newest checkpoints that stay, or a policy; None keeps all.
        incremental: files whose bytes an older checkpoint of the directory holds are linked, not written.
        parity: so many ranks protect each other's files by one part of parity more; None: nothing does.

    Raises:
        HostMemoryShort: on every rank, if any of them has no room for its copy.
        ShardMapInvalid: the tensors do not fit the map.
        ParityUnusable: ``parity`` is no number of ranks, or ``directory`` is in an object store.
    """

    def __init__(
        self,
        directory: Place | str,
        shard_map: ShardMap,
        tensors: Held,
        *,
        communicator: Communicator | None = None,
        keep: int | Retention | None = 2,
        incremental: bool = False,
        parity: int | None = None,
    ) -> None:
        check_parity(parity, place_of(directory))
        self.directory, self._shard_map = place_of(directory), shard_map
        self._communicator = communicator or Communicator()
        self._arena: Arena | None = None
        self._copy: ArenaCopy | None = None
        self._writer: WriterProcess | None = None
        self._pending: _Pending | None = None
        self._num_saves = 0
        self._token = agreed_token(self._communicator)
        try:
            together(self._communicator, lambda: self._prepare(tensors, as_retention(keep), incremental, parity))
        except RankFailure as failure:
            self.close()
            raise _refusal(failure) from failure

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way that ``finish`` has not seen the end of."""
        return self._pending is not None

    def begin(
        self, step: int, objects: Mapping[str, JsonValue], description: Mapping[str, JsonValue] | None = None
    ) -> SaveReport | None:
        """Copy the tensors as they are now, and return while they are being written.

        Every rank calls it, with the same arguments. It communicates only to finish a save that is still under way; the
        report is of that one.

        Raises:
            CheckpointNotSaved: on every rank, if the save before this one failed; this one was not begun.
        """
        began_s = time.monotonic()
        before = self.finish()
        if self._writer is not None and not self._writer.is_alive:
            self._kill_writer()
        self._start_writer()  # unless it lives: a save that failed ends it
        assert self._copy is not None
        self._copy.run()
        self._num_saves += 1
        identity = f"{self._token}-{self._num_saves}"
        order = SaveOrder(identity, step, dict(objects), dict(description or {}))
        self._pending = _Pending(order)
        if self._writer is not None:
            self._order(self._pending)
        self._pending.stop_s = time.monotonic() - began_s
        return before

    def path_of(self, step: int) -> Place:
        """Where the checkpoint of a step is, or will be."""
        return self.directory / step_name(step)

    @property
    def visible(self) -> SaveReport | None:
        """On rank 0, of the save under way, as soon as ``latest`` names it and ``look`` has seen that."""
        if self._pending is None or "committed" not in self._pending.answers:
            return None
        return self._report(self._pending)

    def look(self) -> bool:
        """Take what the writer has told; whether nothing has failed on this rank. Not collective, does not wait."""
        pending = self._pending
        if pending is None:
            return True
        if self._last_answer not in pending.answers and pending.error is None:
            try:
                self._take(pending, 0.0)
            except OSError as error:
                pending.error = error
        return pending.error is None

    def finish(self) -> SaveReport | None:
        """Return when the save under way is durable and ``latest`` names it; None if there is none. Collective.

        Raises:
            CheckpointNotSaved: on every rank, if any of them failed; earlier checkpoints are untouched.
        """
        pending = self._pending
        if pending is None:
            return None
        try:
            self._wait_for_all(pending, "written")
            self._wait_for_all(pending, "committed")
        except RankFailure as failure:
            self._pending = None
            together(self._communicator, self._kill_writer)  # before the first rank removes what they write
            attempt = Attempt(self.directory, pending.step, pending.order.identity)
            raise rolled_back(self._communicator, attempt, failure, self._shard_map.num_bytes) from failure
        self._pending = None
        return self._report(pending)

    def settle(self, timeout_s: float) -> SaveReport | None:
        """Wait up to ``timeout_s`` for the save under way, where ranks can no longer agree; its report on rank 0 if it was
        committed. Not collective: for the end after an error."""
        pending, deadline_s = self._pending, time.monotonic() + timeout_s
        if pending is None:
            return None
        while self._last_answer not in pending.answers and pending.error is None and time.monotonic() < deadline_s:
            try:
                self._take(pending, deadline_s - time.monotonic())
            except OSError as error:
                pending.error = error
        return self._report(pending) if "committed" in pending.answers else None

    def close(self) -> None:
        """End the writer; a save under way is given up. Not collective."""
        if self._pending is not None:
            self._kill_writer()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._copy is not None:
            self._copy.close()
            self._copy = None
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    def _prepare(self, tensors: Held, retention: Retention, incremental: bool, parity: int | None) -> None:
        """Refuse what cannot be saved, make room for the copy and start the writer."""
        rank, size = self._communicator.rank, self._communicator.size
        self._shard_map.check()
        local_tensors(self._shard_map, rank, tensors)
        planned = planned_parts(self._shard_map, rank)
        self._plan = writer_plan(self._shard_map, planned, rank, size, self.directory, retention, incremental, parity)
        self._arena = Arena(self._plan.offsets[-1])
        self._copy = ArenaCopy(planned, tensors, self._arena.memory)
        self._copy.run()  # whatever a first copy loads or allocates is there before the first save
        self._start_writer()

    def _start_writer(self) -> None:
        """Unless it runs. A rank that nothing was assigned to has one too: it tells so."""
        if self._writer is None:
            assert self._arena is not None
            self._writer = WriterProcess(self._plan, self._arena)

    def _order(self, pending: "_Pending") -> None:
        """Have it written; what is no JSON is an error of this save, which all ranks learn of."""
        assert self._writer is not None
        if self._plan.rank != 0:
            pending.order = SaveOrder(pending.order.identity, pending.step)
        try:
            for values in (pending.order.objects, pending.order.description):
                _JSON_OBJECTS.validate_python(values or {})
        except ValidationError as error:
            pending.error = WriterFailed(str(error))
            return
        self._writer.order(pending.order)

    def _go_on(self, pending: "_Pending", error: ChildProcessError) -> None:
        """Have another writer finish a save to an object store. Raises ``error`` where that is not to be."""
        if isinstance(self.directory, ObjectPath) and pending.restarts < _MOST_RESTARTS:
            pending.restarts += 1
            pending.order = replace(pending.order, is_repeated=True)
            self._kill_writer()
            self._start_writer()
            assert self._writer is not None
            self._writer.order(pending.order)
            return
        raise error

    @property
    def _last_answer(self) -> str:
        """After it nothing of a save is left for the writer of this rank."""
        return "committed" if self._plan.rank == 0 else "written"

    def _wait_for_all(self, pending: "_Pending", kind: str) -> None:
        """Return when every rank that has a writer was told ``kind``; only rank 0 waits for ``committed``. Collective.

        Raises:
            RankFailure: on every rank, at most ``_LOOK_S`` after one of them has failed.
        """
        is_mine = self._writer is not None and (kind == "written" or self._plan.rank == 0)

        def is_told() -> bool:
            if pending.error is not None:
                raise pending.error
            if is_mine and kind not in pending.answers:
                self._take(pending, _LOOK_S)
            return not is_mine or kind in pending.answers

        while not _all_hold(self._communicator, together(self._communicator, is_told)):
            pass

    def _take(self, pending: "_Pending", timeout_s: float) -> None:
        """Note what the writer has told; waits for one answer at most. Raises ``OSError`` if it failed."""
        if self._writer is None:
            return
        try:
            answer = self._writer.answer(timeout_s)
            while answer is not None:
                if answer.kind == "failed":
                    raise WriterFailed(answer.cause, answer.errno)
                pending.answers[answer.kind] = answer
                answer = self._writer.answer(0.0) if answer.kind != self._last_answer else None
        except ChildProcessError as error:
            self._go_on(pending, error)

    def _kill_writer(self) -> None:
        if self._writer is not None:
            self._writer.kill()
            self._writer = None

    def _report(self, pending: "_Pending") -> SaveReport:
        last = pending.answers.get("committed") or pending.answers.get("written")
        write_s, bytes_written = (last.seconds, last.bytes_written) if last else (math.nan, 0)
        return SaveReport(pending.step, self.path_of(pending.step), pending.stop_s, write_s, bytes_written)


class WriterFailed(OSError):
    """What a writer told of a save that it could not finish; all ranks raise ``CheckpointNotSaved`` for it."""

    def __init__(self, cause: str, error: int | None = None) -> None:
        super().__init__(cause)
        self.errno = error


class _Pending:
    """A save under way."""

    def __init__(self, order: SaveOrder) -> None:
        self.order, self.step, self.stop_s, self.restarts = order, order.step, math.nan, 0
        self.answers: dict[str, Answer] = {}
        self.error: OSError | None = None


def _all_hold(communicator: Communicator, holds: bool) -> bool:
    """Whether it holds on every rank. Collective."""
    open_ranks = torch.tensor([0 if holds else 1], dtype=torch.int64)
    communicator.all_reduce(open_ranks, _CALL_SITE, maximum=True)
    return not int(open_ranks)


def _refusal(failure: RankFailure) -> Exception:
    """What a rank raises because one could not prepare; the one that could not raises its own error."""
    if isinstance(failure.__cause__, HostMemoryShort | ShardMapInvalid):
        return failure.__cause__
    if failure.cause.startswith(HostMemoryShort.__name__):
        return HostMemoryShort.of_rank(failure.rank, failure.cause)
    return ShardMapInvalid(f"rank {failure.rank} cannot save: {failure.cause}")
