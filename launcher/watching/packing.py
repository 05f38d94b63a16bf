"""Summaries and records of ranks to and from what messages hold.

What arrives is checked before it is believed: sizes, and that whatever indexes something lies inside of it.
"""

from collections.abc import Mapping

import numpy as np

from evermesh.fault.detectors import kernels, sampling
from evermesh.fault.detectors.joining import MOST_STEPS
from evermesh.fault.detectors.summaries import RankSummary
from evermesh.fault.process_state import ProcessState
from evermesh.fault.recorder.names import ranges_of
from evermesh.fault.recorder.record import RECORD, Group
from evermesh.fault.recorder.trace import RankTrace
from evermesh.launcher.watching.messages import (
    MOST_GROUPS,
    MOST_SAMPLES,
    SLOT_WORDS,
    PackedGroup,
    PackedSummary,
    PackedTrace,
)

_MOST_NAME = 1024
assert SLOT_WORDS == kernels.SLOT_COLUMNS
assert MOST_SAMPLES == sampling.MOST


class SummaryInvalid(ValueError):
    """What arrived is no summary, or does not fit to what it says of itself."""


def pack_trace(trace: RankTrace, process: ProcessState | None) -> PackedTrace:
    """For the wire."""
    return PackedTrace(
        rank=trace.rank,
        pid=trace.pid,
        step=trace.step,
        phase=trace.phase,
        read_ns=trace.read_ns,
        wall_offset_ns=trace.wall_offset_ns,
        records=trace.records.tobytes(),
        process=process,
    )


def pack_summary(
    summary: RankSummary, process: ProcessState | None, *, with_groups: bool, starved: float = 0.0
) -> PackedSummary:
    """For the wire."""
    groups = summary.tail.groups
    return PackedSummary(
        tail=pack_trace(summary.tail, process),
        groups=pack_groups(groups) if with_groups else None,
        opened=summary.opened,
        first_step=summary.first_step,
        of_slot=summary.of_slot.tobytes(),
        of_step=summary.of_step.tobytes(),
        signatures=summary.signatures.tobytes(),
        digests=summary.digests.tobytes(),
        num_records=summary.num_records,
        num_lost=summary.num_lost,
        samples=summary.samples.tobytes(),
        starved=starved,
    )


def pack_groups(groups: Mapping[int, Group]) -> tuple[PackedGroup, ...]:
    """For the wire; the first ones, of too many."""
    return tuple(
        PackedGroup(
            index=index, name=group.name[:_MOST_NAME], ranks=tuple(ranges_of(group.ranks)), axis=group.axis[:_MOST_NAME]
        )
        for index, group in sorted(groups.items())
        if index < MOST_GROUPS
    )


class Unpacker:
    """Makes traces and summaries of what arrives; groups that are the same become one object, which is compared quickly."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._known: dict[PackedGroup, Group] = {}

    def groups(self, packed: tuple[PackedGroup, ...]) -> dict[int, Group]:
        """By the index that records hold.

        Raises:
            SummaryInvalid: a group has ranks that the job has not.
        """
        return {one.index: self._group(one) for one in packed}

    def trace(self, packed: PackedTrace, node: str, groups: Mapping[int, Group]) -> RankTrace:
        """Raises SummaryInvalid: its records are none."""
        records = _array(packed.records, RECORD, 1)
        if len(records) and (np.diff(records["sequence"].astype(np.int64)) != 1).any():
            raise SummaryInvalid(f"the records of rank {packed.rank} are not consecutive")
        return RankTrace(
            packed.rank,
            node,
            packed.pid,
            records,
            groups,
            {},
            packed.step,
            packed.phase,
            packed.read_ns,
            packed.wall_offset_ns,
        )

    def summary(self, packed: PackedSummary, node: str, groups: Mapping[int, Group]) -> RankSummary:
        """Raises SummaryInvalid: its arrays do not fit together."""
        tail = self.trace(packed.tail, node, groups)
        of_slot = _array(packed.of_slot, np.dtype(np.int64), kernels.SLOT_COLUMNS)
        of_step = _array(packed.of_step, np.dtype(np.int64), kernels.STEP_COLUMNS)
        signatures = _array(packed.signatures, np.dtype(np.uint64), 1)
        digests = _array(packed.digests, np.dtype(np.int64), 3)
        fits = (
            len(of_slot) == max(groups, default=-1) + 1
            and 1 <= len(of_step) == len(signatures) <= MOST_STEPS
            and packed.opened < len(tail.records)
            and ((digests[:, 0] >= 0) & (digests[:, 0] < len(of_slot)) & (digests[:, 1] >= 0)).all()
        )
        if not fits:
            raise SummaryInvalid(f"the arrays of the summary of rank {tail.rank} do not fit together")
        return RankSummary(
            tail,
            packed.opened,
            of_slot,
            packed.first_step,
            of_step,
            signatures,
            digests,
            packed.num_records,
            packed.num_lost,
            _array(packed.samples, RECORD, 1),
        )

    def _group(self, packed: PackedGroup) -> Group:
        named = packed.model_copy(update={"index": 0})
        known = self._known.get(named)
        if known is None:
            known = self._known[named] = Group(packed.name, self._ranks(packed), packed.axis)
        return known

    def _ranks(self, packed: PackedGroup) -> tuple[int, ...]:
        parts = [range(*part) for part in packed.ranks if part[2] > 0]
        inside = all(part and part[0] >= 0 and part[-1] < self._num_ranks for part in parts)
        if len(parts) < len(packed.ranks) or not inside or sum(map(len, parts)) > self._num_ranks:
            raise SummaryInvalid(f"group {packed.name} has ranks that a job of {self._num_ranks} has not")
        return tuple(rank for part in parts for rank in part)


def _array(content: bytes, dtype: np.dtype, columns: int) -> np.ndarray:
    """A copy: compiled loops take arrays that can be written."""
    if len(content) % (dtype.itemsize * columns):
        raise SummaryInvalid(f"{len(content)} bytes are no rows of {dtype.itemsize * columns}")
    found = np.frombuffer(content, dtype).copy()
    return found if columns == 1 else found.reshape(-1, columns)
