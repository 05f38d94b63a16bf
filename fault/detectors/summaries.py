"""What an agent tells of its ranks, window by window: enough to see who hangs, is slow or strays, without the records.

A record is looked at once it is complete; what is open is looked at again with the next window. Of each rank the newest
records go along, so that whoever joins the summaries knows what it is in; if more is needed the rings are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from evermesh.fault.detectors import kernels
from evermesh.fault.detectors.joining import MOST_STEPS, codes_of
from evermesh.fault.detectors.matching import UNEVEN
from evermesh.fault.detectors.sampling import Sampler
from evermesh.fault.recorder.record import OPERATIONS, RECORD, Flags, Group
from evermesh.fault.recorder.trace import RankTrace

_TAIL = 16
_MOST_DIGESTS = 4096
_IS_UNEVEN = np.array([index in UNEVEN for index in range(len(OPERATIONS))])


@dataclass(frozen=True, slots=True)
class RankSummary:
    """What a rank did in a window, and where it stands."""

    tail: RankTrace
    """With its newest records only."""
    opened: int
    """Index of its first open record in those; -1: none."""
    of_slot: np.ndarray
    """Array [local groups, SLOT_COLUMNS]."""
    first_step: int
    of_step: np.ndarray
    """Array [steps, STEP_COLUMNS]: of the steps that the window touched, as far as they are done."""
    signatures: np.ndarray
    """Array [steps]."""
    digests: np.ndarray
    """Array [digests, 3]: local group, block of collectives, digest of what the rank did in it."""
    num_records: int
    """New in this window."""
    num_lost: int
    """That were overwritten before anybody read them."""
    samples: np.ndarray = field(default_factory=lambda: np.empty(0, RECORD))
    """Some of the new records, whole; see ``sampling``."""


@dataclass(slots=True)
class RankWatch:
    """Summarises the ring of one rank, which is read again and again."""

    _next: int = 1
    """Sequence of the first record that was not complete before."""
    _of_slot: np.ndarray = field(default_factory=lambda: np.zeros((0, kernels.SLOT_COLUMNS), np.int64))
    _digests: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    _codes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    _step: int = -1
    _of_step: np.ndarray = field(default_factory=lambda: np.zeros(kernels.STEP_COLUMNS, np.int64))
    _signature: np.uint64 = field(default_factory=lambda: np.uint64(0))
    _carried: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    _sampler: Sampler = field(default_factory=Sampler)

    def summarise(self, trace: RankTrace) -> RankSummary:
        """The summary of what is new in a ring."""
        records = trace.records
        self._make_room(trace)
        first = int(records["sequence"][0]) if len(records) else self._next
        lost = max(first - self._next, 0)
        if lost:
            self._digests[:, 2] = 0
        new = records[max(self._next - first, 0) :]
        words = new.view(np.uint64).reshape(-1, 8)
        done = _num_complete(new)
        base = self._step if self._step >= 0 else (int(new["step"][0]) if len(new) else 0)
        last = int(new["step"][-1]) if len(new) else base
        base = max(base, last - MOST_STEPS + 1)
        of_step = np.zeros((max(last - base, 0) + 1, kernels.STEP_COLUMNS), np.int64)
        signatures = np.zeros(len(of_step), np.uint64)
        if base == self._step:
            of_step[0], signatures[0] = self._of_step, self._signature
        slots, found = np.arange(len(self._of_slot)), np.empty((min(done, _MOST_DIGESTS), 3), np.int64)
        kernels.survey_rank(words[:done], slots, self._codes, base, self._of_slot, of_step, signatures, self._carried)
        digests = found[: kernels.digest_rank(words[:done], slots, _IS_UNEVEN, self._digests, found)]
        if done:
            self._next, self._step = first + max(self._next - first, 0) + done, int(new["step"][done - 1])
            place = min(max(self._step - base, 0), len(of_step) - 1)
            self._of_step, self._signature = of_step[place].copy(), signatures[place]
        of_slot = self._of_slot.copy()
        opened = kernels.survey_rank(
            words[done:], slots, self._codes, base, of_slot, of_step, signatures, self._carried.copy()
        )
        tail = new[done:][max(opened, 0) :][:_TAIL] if opened >= 0 else records[-_TAIL:]
        return RankSummary(
            replace(trace, records=tail.copy()),
            0 if opened >= 0 else -1,
            of_slot,
            base,
            of_step,
            signatures,
            digests,
            done,
            lost,
            self._sampler.choose(new[:done]),
        )

    def _make_room(self, trace: RankTrace) -> None:
        """For groups that are new."""
        size = max(trace.groups, default=-1) + 1
        more = size - len(self._of_slot)
        if more <= 0:
            return
        fresh = np.zeros((more, kernels.SLOT_COLUMNS), np.int64)
        fresh[:, [kernels.FIRST, kernels.LAST]] = -1
        self._of_slot = np.concatenate([self._of_slot, fresh])
        self._digests = np.concatenate([self._digests, np.tile(np.array([-1, 0, 0]), (more, 1))])
        self._codes = _codes(trace.groups, size)


def _codes(groups: Mapping[int, Group], size: int) -> np.ndarray:
    own = np.zeros(size, np.uint64)
    for local, group in groups.items():
        own[local] = codes_of([group])[0]
    return own


def _num_complete(records: np.ndarray) -> int:
    """How many records there are before the first that is open."""
    is_open = (records["ended_ns"] == 0) & (records["flags"] & int(Flags.END_SEEN) != 0)
    return int(is_open.argmax()) if is_open.any() else len(records)
