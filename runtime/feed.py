"""The batch feed: one step ahead, in the background, it draws a batch, gets it planned, and reads this rank's pieces."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from evermesh.parallelism.batch_plan import BatchPlan, MicroBatch
from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.errors import PlanInvalid
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.mesh import Mesh
from evermesh.parallelism.planner import Planner
from evermesh.parallelism.verifier import verify_plan
from evermesh.runtime.calibration import Calibrated, Measured, OnlineCalibration
from evermesh.runtime.data import Batch, Corpus, Sampler, SequenceRef, read_pieces
from evermesh.runtime.micro_batch import LocalBatch, LocalMicroBatch


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """A global batch and its plan."""

    batch: Batch
    plan: BatchPlan
    local: LocalBatch
    """What this rank processes of it."""
    sampler_state: dict[str, Any]
    """Where the sampler stands after this batch."""
    calibrated: Calibrated | None = None
    """What is known of the cost model; None: nobody calibrates it."""
    waited_s: float = 0.0
    """How long the step waited for it."""


class BatchFeed:
    """Yields planned batches, each prepared while the one before is trained. Every rank makes one.

    All ranks draw the same batch from their own sampler; rank 0 plans it, proves the plan, and sends it to all over the
    control group, which nothing else uses; its records tell the step that a batch is for, the first one after the step at
    which ``control.moment`` stands now. Of the ranks of a node that train on the same tokens (``readers``; None: there are
    none) the first reads them and sends them to the others, so that a node reads every token once. Preparation runs in
    one thread, one batch ahead; leaving the ``with`` block ends it. The thread also lets ``calibration`` exchange what it
    has measured, behind the plan of a batch; its planner is then the one here. ``steps`` are those of the whole run,
    whose last batch holds all that waits; None: the run has no end. ``again`` says what the batch of a step begins with,
    because it is tried again; it is asked when that batch is begun, so at the start of the step before. ``before_plan`` is
    called before each batch is begun, while none is being planned.
    """

    def __init__(
        self,
        sampler: Sampler,
        corpora: Sequence[Corpus],
        planner: Planner,
        layout: Layout,
        control: Communicator,
        readers: Communicator | None = None,
        calibration: OnlineCalibration | None = None,
        steps: int | None = None,
        again: Callable[[int], Sequence[SequenceRef]] = lambda _: (),
        before_plan: Callable[[], None] = lambda: None,
    ) -> None:
        self.sampler, self.corpora, self.planner, self.layout, self.control = sampler, corpora, planner, layout, control
        self.readers = readers or Communicator()
        self.calibration, self.steps, self._again, self._before_plan = calibration, steps, again, before_plan
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch-feed")
        self._next = self._begin(())

    def next(self, *, last: bool = False) -> PlannedBatch:
        """The next batch; the one after it is started unless this is the ``last``. Collective in effect.

        Raises:
            PlanInvalid: a rank drew another batch, or the plan failed its proof.
            SequenceTooLong: a sequence fits no ring.
        """
        began_s = time.perf_counter()
        batch = self._next.result()
        waited_s = time.perf_counter() - began_s
        if not last:
            measured = self.calibration.take() if self.calibration is not None else ()
            self._next = self._begin(measured)
        return dataclasses.replace(batch, waited_s=waited_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # the batch under way needs the other ranks; after an error they may be gone, and nobody waits for it
        self._thread.shutdown(wait=error is None, cancel_futures=True)

    def prepare_held_out(self, batches: Sequence[Batch]) -> list[LocalBatch]:
        """What this rank processes of ``batches``, which are not of the sampler. Collective.

        Planned behind the batch under way, so that all ranks use the control group in one order.

        Raises:
            PlanInvalid, SequenceTooLong: see ``next``.
        """
        return self._thread.submit(self._prepare_held_out, batches).result()

    def _prepare_held_out(self, batches: Sequence[Batch]) -> list[LocalBatch]:
        moment = self.control.moment
        before, moment.phase = moment.phase, "evaluate"
        planned = [self._planned(batch, step=0)[1] for batch in batches]
        moment.phase = before
        return planned

    def _begin(self, measured: Sequence[Measured]) -> Future[PlannedBatch]:
        """Start the next batch; the one before it is done."""
        self._before_plan()
        return self._thread.submit(self._prepare, measured, self._again(self.control.moment.step + 1))

    def _prepare(self, measured: Sequence[Measured], again: Sequence[SequenceRef]) -> PlannedBatch:
        step = self.control.moment.step + 1
        self.control.moment.begin_step(step)
        batch = self.sampler.next_batch(ends=step == self.steps, again=again)
        plan, local = self._planned(batch, step)
        calibrated = self.calibration.exchange(measured) if self.calibration is not None else None
        return PlannedBatch(batch, plan, local, self.sampler.state_dict(), calibrated)

    def _planned(self, batch: Batch, step: int) -> tuple[BatchPlan, LocalBatch]:
        """The plan that all ranks agree on, and this rank's part with its tokens. Collective."""
        plan = self._agreed_plan(batch)
        own = Mesh.of(self.layout).coordinates(self.control.rank)
        rank_plan = plan.ranks[own.hdp]
        tokens = self._tokens(rank_plan, batch).split([micro_batch.num_tokens for micro_batch in rank_plan], dim=1)
        micro_batches = tuple(_local(mb, of_one) for mb, of_one in zip(rank_plan, tokens, strict=True))
        # all ranks of one pipeline have the same tokens: one of them counts
        counts = own.pp == own.tp == 0
        counted = torch.tensor([sum(int(local.counts_T.sum()) for local in micro_batches) if counts else 0])
        self.control.all_reduce(counted, "loss weights")
        identities = tuple(sequence.identity for sequence in batch.sequences)
        return plan, LocalBatch(micro_batches, batch.lengths, int(counted), identities, step, self.sampler.seed)

    def _tokens(self, micro_batches: Sequence[MicroBatch], batch: Batch) -> torch.Tensor:
        """Inputs, targets and counts of all micro-batches, [3, T], int32. Collective over the ranks that share them."""
        num_tokens = sum(micro_batch.num_tokens for micro_batch in micro_batches)
        if self.readers.rank == 0:
            parts = [read_micro_batch(micro_batch, batch, self.corpora) for micro_batch in micro_batches]
            tokens = torch.from_numpy(np.concatenate([np.empty((3, 0), np.int32), *parts], axis=1))
        else:
            tokens = torch.empty(3, num_tokens, dtype=torch.int32)
        if num_tokens:
            self.readers.broadcast(tokens, 0, "tokens")
        return tokens

    def _agreed_plan(self, batch: Batch) -> BatchPlan:
        payload: bytes | None = None
        if self.control.rank == 0:
            plan = self.planner.plan(batch.lengths)
            verify_plan(plan, batch.lengths, self.layout)
            payload = batch.digest.encode() + plan.to_json()
        payload = self.control.broadcast_bytes(payload, 0, "plan")
        digest, document = payload[: len(batch.digest)].decode(), payload[len(batch.digest) :]
        if digest != batch.digest:
            raise PlanInvalid(
                f"rank {self.control.rank} drew batch {batch.digest}, rank 0 drew {digest}: the corpora or sampler states "
                "of the ranks differ. Check that all nodes read the same corpus."
            )
        return BatchPlan.from_json(document)


def load_micro_batch(micro_batch: MicroBatch, batch: Batch, corpora: Sequence[Corpus]) -> LocalMicroBatch:
    """Read the pieces of one micro-batch, and nothing else."""
    return _local(micro_batch, torch.from_numpy(read_micro_batch(micro_batch, batch, corpora)))


def read_micro_batch(micro_batch: MicroBatch, batch: Batch, corpora: Sequence[Corpus]) -> NDArray[np.int32]:
    """Inputs, targets and counts of its tokens, [3, T]."""
    parts = [
        np.stack(read_pieces(corpora, batch.sequences[piece.sequence], piece.ranges)).astype(np.int32)
        for piece in micro_batch.pieces
    ]
    return np.concatenate([np.empty((3, 0), np.int32), *parts], axis=1)


def _local(micro_batch: MicroBatch, tokens: torch.Tensor) -> LocalMicroBatch:
    """``tokens``: inputs, targets and counts, [3, T]."""
    positions = [_positions(piece.ranges) for piece in micro_batch.pieces]
    inputs_T, targets_T, counts_T = tokens
    return LocalMicroBatch(
        plan=micro_batch,
        tokens_T=inputs_T.long(),
        targets_T=targets_T.long(),
        positions_T=torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *positions])),
        counts_T=counts_T.float(),
    )


def _positions(ranges: Sequence[tuple[int, int]]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.int64), *(np.arange(start, stop) for start, stop in ranges)])
