"""Megatron Core's scheduler for hybrid context parallelism, run as released.

``pip install -e ".[bench]"`` installs it: a small wheel for Linux that needs torch, NumPy and packaging only.
EVERMESH_MEGATRON may name a folder with the unpacked wheel instead. Without it its rows are left out.
"""

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from evermesh.parallelism import CostModel, Layout
from evermesh.parallelism.batch_plan import MicroBatch, Piece
from evermesh.parallelism.errors import PlanInvalid
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.simulator import micro_batch_s

_MODULE = "megatron.core.pipeline_parallel.hybrid_cp_schedule"


class _Ranks:
    """What the scheduler asks of a process group."""

    def __init__(self, number: int) -> None:
        self.number = number

    def size(self) -> int:
        return self.number


def megatron_scheduler() -> Any | None:
    """The class ``BalancedCPScheduler``; None where Megatron Core is not installed."""
    folder = os.environ.get("EVERMESH_MEGATRON")
    if folder and folder not in sys.path:
        sys.path.append(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it names every optional library that is missing
            logging.disable(logging.WARNING)
            return importlib.import_module(_MODULE).BalancedCPScheduler
    except ImportError:
        return None
    finally:
        logging.disable(logging.NOTSET)


Phases = list[list[list[MicroBatch]]]
"""What every rank runs between two barriers, phase by phase."""


def megatron_phases(scheduler: Any, lengths: Sequence[int], layout: Layout, pool: Pool) -> Phases:
    """The groups of sub-samples that the scheduler makes, each with a barrier at its end; every sequence is a micro-batch.

    It knows no pool and no costs: a sequence takes its length squared over the number of its ranks. Its rings pass keys and
    values around.

    Raises:
        PlanInvalid: the scheduler lost a sequence, or gives one to ranks that cannot hold it.
    """
    groups = scheduler(layout.capacity, _Ranks(len(pool))).get_groups_and_subsamples(list(enumerate(lengths)), None)[1]
    phases: Phases = []
    seen: set[int] = set()
    for group in groups:
        rings: dict[int, list[int]] = {}
        for rank, sequences in enumerate(group):
            for sequence in sequences:
                rings.setdefault(sequence, []).append(rank)
        seen |= rings.keys()
        for sequence, ring in rings.items():
            if lengths[sequence] > len(ring) * layout.capacity:
                raise PlanInvalid(f"{len(ring)} ranks cannot hold sequence {sequence} of {lengths[sequence]} tokens.")
        phases.append(
            [[_alone(one, lengths, rings[one], rank) for one in of_rank] for rank, of_rank in enumerate(group)]
        )
    if seen != set(range(len(lengths))):
        raise PlanInvalid(f"{len(lengths) - len(seen)} of {len(lengths)} sequences are in no group.")
    return phases


def _alone(sequence: int, lengths: Sequence[int], ring: Sequence[int], rank: int) -> MicroBatch:
    ranges = share_of(lengths[sequence], len(ring), ring.index(rank)).ranges()
    return MicroBatch((Piece(sequence, ranges, tuple(ring)),))


def phases_s(phases: Phases, lengths: Sequence[int], cost: CostModel, pool: Pool) -> float:
    """Seconds of all phases, each as long as its busiest rank: no rank waits for a ring, in favour of the scheduler."""
    return sum(
        max(
            sum(micro_batch_s(micro_batch, lengths, cost, pool) for micro_batch in of_rank) / pool.speeds[rank]
            for rank, of_rank in enumerate(phase)
        )
        for phase in phases
    )


__all__ = ["megatron_phases", "megatron_scheduler", "phases_s"]
