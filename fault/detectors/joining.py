"""Records of many ranks, joined: which groups there are, who is in them, and what each rank did and when it stands where."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evermesh.fault.detectors import kernels
from evermesh.fault.recorder.record import RECORD, Group
from evermesh.fault.recorder.trace import UNKNOWN_NODE, RankTrace

MOST_STEPS = 64
"""Steps that are looked at, counted from the newest."""


@dataclass(frozen=True, slots=True)
class Joined:
    """Traces of different ranks and the groups that they name."""

    traces: tuple[RankTrace, ...]
    """By rank."""
    groups: tuple[Group, ...]
    members: tuple[np.ndarray, ...]
    """By group: index in ``traces`` of every member in the order of the group, -1 where there is no trace."""
    local_groups: tuple[np.ndarray, ...]
    """By trace: index in ``groups`` of what its records call group 0, 1, ...; -1: unknown."""
    places: tuple[np.ndarray, ...]
    """By trace: its place in these groups."""
    slot_starts: np.ndarray
    """A slot is a rank in a group; those of group g begin here."""

    @property
    def sizes(self) -> np.ndarray:
        """Members of every group."""
        return np.diff(self.slot_starts)

    def words(self, trace: int) -> np.ndarray:
        """The records of a trace as 64-bit words, array [records, 8]; a view."""
        records = np.ascontiguousarray(self.traces[trace].records)
        assert records.dtype == RECORD
        return records.view(np.uint64).reshape(-1, 8)

    def group_of(self, trace: int, local: int) -> int:
        """The group that a trace calls ``local``; -1: unknown."""
        groups = self.local_groups[trace]
        return int(groups[local]) if local < len(groups) else -1

    def slots(self, trace: int) -> np.ndarray:
        """By local group: the slot of a trace; -1 where the group is unknown."""
        groups = self.local_groups[trace]
        return np.where(groups >= 0, self.slot_starts[groups] + self.places[trace], -1)

    def where(self, trace: int) -> str:
        """A rank and its node, for a sentence."""
        node = self.traces[trace].node
        return f"rank {self.traces[trace].rank}" + (f" (node {node})" if node != UNKNOWN_NODE else "")

    def node(self, trace: int) -> str | None:
        """Its node, for a finding."""
        node = self.traces[trace].node
        return node if node != UNKNOWN_NODE else None


def join(traces: Sequence[RankTrace]) -> Joined:
    """Join traces of different ranks; of two of one rank the one with more records is taken."""
    by_rank: dict[int, RankTrace] = {}
    for trace in traces:
        known = by_rank.get(trace.rank)
        if known is None or len(trace.records) > len(known.records):
            by_rank[trace.rank] = trace
    ordered = tuple(by_rank[rank] for rank in sorted(by_rank))
    index_of = {trace.rank: index for index, trace in enumerate(ordered)}
    groups = _Groups(index_of)
    local = [groups.of(trace) for trace in ordered]
    starts = np.concatenate([[0], np.cumsum([len(members) for members in groups.members])]).astype(np.int64)
    return Joined(
        ordered,
        tuple(groups.groups),
        tuple(groups.members),
        tuple(found for found, _ in local),
        tuple(places for _, places in local),
        starts,
    )


class _Groups:
    """Groups as they are met. Groups are the same if name and ranks are."""

    def __init__(self, index_of: dict[int, int]) -> None:
        self.index_of = index_of
        self.groups: list[Group] = []
        self.members: list[np.ndarray] = []
        self._places: list[dict[int, int]] = []
        self._known: dict[tuple[str, int, int, int], list[int]] = {}

    def of(self, trace: RankTrace) -> tuple[np.ndarray, np.ndarray]:
        """By local index: the group, and the place of the rank in it."""
        size = max(trace.groups, default=-1) + 1
        found, places = np.full(size, -1, np.int64), np.zeros(size, np.int64)
        for local, group in trace.groups.items():
            index = self._index(group)
            place = self._places[index].get(trace.rank) if index >= 0 else None
            if place is not None:
                found[local], places[local] = index, place
        return found, places

    def _index(self, group: Group) -> int:
        if not group.ranks:
            return -1
        same = self._known.setdefault((group.name, len(group.ranks), group.ranks[0], group.ranks[-1]), [])
        for index in same:
            if self.groups[index].ranks is group.ranks or self.groups[index].ranks == group.ranks:
                return index
        same.append(len(self.groups))
        self.groups.append(group)
        self.members.append(np.array([self.index_of.get(rank, -1) for rank in group.ranks], np.int64))
        self._places.append({rank: place for place, rank in enumerate(group.ranks)})
        return len(self.groups) - 1


def in_step(step: int) -> str:
    """For a sentence: in which step; nothing where nobody counts them."""
    return f" in step {step}" if step > 0 else ""


@dataclass(frozen=True, slots=True)
class Survey:
    """What one pass over all records found."""

    of_slot: np.ndarray
    """Array [slots, SLOT_COLUMNS]; numbers are -1 where a rank entered nothing."""
    of_step: np.ndarray
    """Array [traces, steps, STEP_COLUMNS]."""
    signatures: np.ndarray
    """Array [traces, steps]: equal where two ranks did the same with the same sizes, in training."""
    first_step: int
    opened: np.ndarray
    """Array [traces]: index of the first open record, -1: none."""
    queued_s: np.ndarray
    """Array [traces, steps]: how long the rank waited for a processor in the second around the step; 0: nobody looked."""

    @property
    def num_steps(self) -> int:
        return int(self.of_step.shape[1])

    def is_whole(self) -> np.ndarray:
        """Array [traces, steps]: the rank has done all of the step, something at least, and its ring still holds it."""
        whole: np.ndarray = self.is_over() & (self.of_step[:, :, kernels.COUNT] > 0)
        return whole

    def is_over(self) -> np.ndarray:
        """Array [traces, steps]: the rank has done something before the step and behind it; in it perhaps nothing."""
        count = self.of_step[:, :, kernels.COUNT] > 0
        before = np.cumsum(count, axis=1) - count > 0
        behind = np.cumsum(count[:, ::-1], axis=1)[:, ::-1] - count > 0
        over: np.ndarray = np.logical_and(before, behind)
        return over


def survey(joined: Joined) -> Survey:
    """Look at every record once."""
    steps = [trace.records["step"][[0, -1]] for trace in joined.traces if len(trace.records)]
    last = max((int(pair[1]) for pair in steps), default=0)
    first = max(min((int(pair[0]) for pair in steps), default=0), last - MOST_STEPS + 1)
    return _survey(joined, first, last - first + 1)


def slots_of(joined: Joined) -> np.ndarray:
    """Only ``Survey.of_slot``: steps of many ranks take far more memory."""
    return _survey(joined, 0, 0).of_slot


def _survey(joined: Joined, first: int, num_steps: int) -> Survey:
    num_traces = len(joined.traces)
    of_slot = np.zeros((int(joined.slot_starts[-1]), kernels.SLOT_COLUMNS), np.int64)
    of_slot[:, [kernels.FIRST, kernels.LAST]] = -1
    of_step = np.zeros((num_traces, num_steps, kernels.STEP_COLUMNS), np.int64)
    signatures = np.zeros((num_traces, num_steps), np.uint64)
    opened = np.full(num_traces, -1, np.int64)
    codes = codes_of(joined.groups)
    carried = np.zeros(1, np.int64)
    for trace in range(num_traces):
        carried[0] = 0
        groups = joined.local_groups[trace]
        own_codes = np.where(groups >= 0, codes[groups], np.uint64(0))
        opened[trace] = kernels.survey_rank(
            joined.words(trace),
            joined.slots(trace),
            own_codes,
            first,
            of_slot,
            of_step[trace],
            signatures[trace],
            carried,
        )
    return Survey(of_slot, of_step, signatures, first, opened, np.zeros(signatures.shape))


def codes_of(groups: Sequence[Group]) -> np.ndarray:
    """Array [groups, at least 1]: the same number for groups that do the same for other ranks, see :func:`_alike`."""
    return np.array([_code(group) for group in groups] or [0], np.uint64)


def _code(group: Group) -> int:
    code = 14695981039346656037
    for byte in f"{_alike(group)}:{len(group.ranks)}".encode():
        code = ((code ^ byte) * 1099511628211) % (1 << 64)
    return code


def _alike(group: Group) -> str:
    """The axis; where nobody named it, as in most scripts, the distances between the ranks, which those of one axis share."""
    if group.axis or not group.ranks:
        return group.axis or group.name
    distances = (after - before for before, after in itertools.pairwise(group.ranks))
    return ",".join(f"{distance}x{len(list(run))}" for distance, run in itertools.groupby(distances))
