"""Joins the summaries of all agents, window by window, and says who hangs or is slow, and whose rings have to be read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from evermesh.fault.detectors import kernels, kinds
from evermesh.fault.detectors.clock_jumps import ClockWatch
from evermesh.fault.detectors.context import Context, is_noisy
from evermesh.fault.detectors.deaths import find_deaths
from evermesh.fault.detectors.hanging import find_hangs
from evermesh.fault.detectors.joining import MOST_STEPS, Joined, Survey, join
from evermesh.fault.detectors.matching import UNEVEN
from evermesh.fault.detectors.message_delays import NodeDelay
from evermesh.fault.detectors.pacing import PaceWatch
from evermesh.fault.detectors.reordering import to_be_read
from evermesh.fault.detectors.sampled import Samples
from evermesh.fault.detectors.slowing import find_slow
from evermesh.fault.detectors.standing import UNDECIDED, standing_of
from evermesh.fault.detectors.summaries import RankSummary
from evermesh.fault.events import Finding
from evermesh.fault.processors import WINDOW_S
from evermesh.fault.recorder.record import OPERATIONS

_TRANSFERS_EVERY = 4
"""Windows from one look at transfers to the next: they need many, and take longer than all else."""
_BLOCKS = 64
"""Blocks of a group whose digests are remembered."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the summaries of a window say."""

    findings: tuple[Finding, ...]
    suspicious: tuple[int, ...]
    """Ranks whose rings are to be read and diagnosed together: members of groups that do not agree on what they do, one that
    did something else in a step than before with some like it, and all that a finding is about that names nobody."""
    delays: tuple[NodeDelay, ...] = ()
    """Between nodes, by the newest messages that are known."""


class JobWatch:
    """Joins the summaries of all ranks of a job; the ranks stay the same as long as it lives."""

    def __init__(self, context: Context | None = None) -> None:
        self.context = context or Context()
        self._joined: Joined | None = None
        self._clocks = ClockWatch()
        self._samples, self._pace = Samples(0), PaceWatch()
        self._windows = 0
        self._of_transfers: list[Finding] = []
        self._of_pace: list[Finding] = []
        self._delays: tuple[NodeDelay, ...] = ()
        self._of_slot = np.zeros((0, kernels.SLOT_COLUMNS), np.int64)
        self._of_step = np.zeros((0, MOST_STEPS, kernels.STEP_COLUMNS), np.int64)
        self._signatures = np.zeros((0, MOST_STEPS), np.uint64)
        self._steps = np.zeros(0, np.int64)
        self._queued_s = np.zeros((0, MOST_STEPS))
        self._known: np.ndarray = np.zeros((0, _BLOCKS, 2), np.int64)

    def join(self, summaries: Sequence[RankSummary]) -> Seen:
        """Take the summaries of all ranks of one window. Steps and ranks that are not in it stay as they were."""
        ordered = sorted(summaries, key=lambda one: one.tail.rank)
        joined = self._joined_of(ordered)
        opened = np.array([one.opened for one in ordered], np.int64)
        slots = [joined.slots(index) for index in range(len(ordered))]
        known = np.concatenate(slots)
        self._of_slot[known[known >= 0]] = np.concatenate([one.of_slot for one in ordered])[known >= 0]
        self._put_steps(ordered)
        survey = self._survey(opened)
        disagreeing = self._compare(joined, ordered)
        standing = standing_of(joined, survey, self.context)
        spoiled = _spoiled(joined)
        found = find_deaths(joined, standing, self.context) or find_hangs(joined, standing, self.context, spoiled)
        slow = find_slow(joined, survey, self.context)
        found += slow + self._look_at_transfers(joined, survey, ordered, is_slow=bool(slow))
        groups = {*disagreeing.tolist(), *(group for group, _ in spoiled)}
        strayed = to_be_read(survey)
        is_unclear = any(one.operation == UNDECIDED and standing.is_long(one) for one in standing.waiting.values())
        is_unclear |= any(_is_unclear(one) for one in found)
        found += self._clocks.look(joined.traces)
        return Seen(tuple(found), _suspicious(joined, groups, strayed, is_unclear), self._delays)

    def _look_at_transfers(
        self, joined: Joined, survey: Survey, ordered: Sequence[RankSummary], *, is_slow: bool
    ) -> list[Finding]:
        """What samples say of groups, nodes and links, and of the job as a whole; said again until the next look."""
        self._windows += 1
        if is_noisy(self.context):  # what takes long may be a process that waits for a processor
            self._of_transfers, self._of_pace = [], []
            self._pace.skip(survey)
            return []
        for one in ordered:
            self._samples.take(one.tail.rank, one.samples)
        if self._windows % _TRANSFERS_EVERY == 0:
            transfers = self._samples.transfers(joined, self.context)
            if transfers is not None:
                self._of_transfers = transfers.find_slow()
                self._delays = tuple(transfers.between_nodes())
                self._of_pace = self._pace.look(survey, transfers.of_steps(survey), self.context.planned_s)
        return self._of_transfers or ([] if is_slow else self._of_pace)

    def _joined_of(self, ordered: Sequence[RankSummary]) -> Joined:
        tails = [one.tail for one in ordered]
        ranks = [tail.rank for tail in tails]
        before = self._joined
        if before is not None and ranks == [trace.rank for trace in before.traces] and _same_groups(before, ordered):
            self._joined = Joined(
                tuple(tails), before.groups, before.members, before.local_groups, before.places, before.slot_starts
            )
            return self._joined
        self._joined = joined = join(tails)
        if before is None or ranks != [trace.rank for trace in before.traces]:
            self._samples, self._pace = Samples(len(ranks)), PaceWatch()
        self._of_slot = np.zeros((int(joined.slot_starts[-1]), kernels.SLOT_COLUMNS), np.int64)
        self._of_step = np.zeros((len(tails), MOST_STEPS, kernels.STEP_COLUMNS), np.int64)
        self._signatures = np.zeros((len(tails), MOST_STEPS), np.uint64)
        self._steps = np.full((len(tails), MOST_STEPS), -1, np.int64)
        self._queued_s = np.zeros((len(tails), MOST_STEPS))
        self._known = np.full((len(joined.groups), _BLOCKS, 2), -1, np.int64)
        return joined

    def _put_steps(self, ordered: Sequence[RankSummary]) -> None:
        """Put the steps of all ranks where their number modulo MOST_STEPS says."""
        counts = np.array([len(one.signatures) for one in ordered])
        starts = np.array([one.first_step for one in ordered])
        rank = np.repeat(np.arange(len(ordered)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        step = starts[rank] + within
        rows = np.concatenate([one.of_step for one in ordered])
        kept = rows[:, kernels.COUNT] > 0
        rank, step, place = rank[kept], step[kept], step[kept] % MOST_STEPS
        self._of_step[rank, place] = rows[kept]
        self._signatures[rank, place] = np.concatenate([one.signatures for one in ordered])[kept]
        starved = np.array([self.context.starved.get(one.tail.rank, 0.0) for one in ordered])[rank] * WINDOW_S
        is_same = self._steps[rank, place] == step
        self._queued_s[rank, place] = np.maximum(starved, np.where(is_same, self._queued_s[rank, place], 0.0))
        self._steps[rank, place] = step

    def _survey(self, opened: np.ndarray) -> Survey:
        """The last steps in order, as a survey of all records would have them."""
        last = int(self._steps.max(initial=0))
        first = max(last - MOST_STEPS + 1, int(self._steps[self._steps >= 0].min(initial=last)))
        steps = np.arange(first, last + 1)
        place = steps % MOST_STEPS
        is_known = self._steps[:, place] == steps
        of_step = self._of_step[:, place]  # a copy, of many ranks a large one
        of_step[~is_known] = 0
        signatures = np.where(is_known, self._signatures[:, place], np.uint64(0))
        queued_s = np.where(is_known, self._queued_s[:, place], 0.0)
        return Survey(self._of_slot, of_step, signatures, first, opened, queued_s)

    def _compare(self, joined: Joined, ordered: Sequence[RankSummary]) -> np.ndarray:
        """Groups whose members have different digests of one block."""
        parts = [one.digests for one in ordered]
        counts = np.array([len(part) for part in parts])
        if not counts.sum():
            return np.zeros(0, np.int64)
        rows = np.concatenate(parts)
        offsets = np.concatenate([[0], np.cumsum([len(groups) for groups in joined.local_groups])])[:-1]
        groups = np.concatenate(joined.local_groups)[rows[:, 0] + np.repeat(offsets, counts)]
        rows, groups = rows[groups >= 0], groups[groups >= 0]
        place = rows[:, 1] % _BLOCKS
        is_new = self._known[groups, place, 0] < rows[:, 1]
        self._known[groups[is_new], place[is_new]] = rows[is_new, 1:]
        same_block = self._known[groups, place, 0] == rows[:, 1]
        differs = same_block & (self._known[groups, place, 1] != rows[:, 2])
        return np.unique(groups[differs])


def _is_unclear(finding: Finding) -> bool:
    """Whether it stands still and whole rings may say why."""
    return finding.rank is None and finding.node is None and finding.kind not in kinds.SLOWNESS


def _spoiled(joined: Joined) -> set[tuple[int, int]]:
    """Collectives, by group and number, of which the newest records say that ranks do different things in them."""
    counts = np.array([len(trace.records) for trace in joined.traces])
    if not counts.sum():
        return set()
    records = np.concatenate([trace.records for trace in joined.traces])
    locals_ = np.concatenate([*joined.local_groups, [-1]])
    sizes = np.array([len(groups) for groups in joined.local_groups])
    starts, own = np.repeat(np.cumsum(sizes) - sizes, counts), records["group"].astype(np.int64)
    groups = locals_[np.where(own < np.repeat(sizes, counts), starts + own, -1)]
    chosen = (groups >= 0) & (records["operation"] < OPERATIONS.index("send"))
    records, groups = records[chosen], groups[chosen]
    order = np.lexsort((records["number"], groups))
    records, groups = records[order], groups[order]
    is_same = (groups[1:] == groups[:-1]) & (records["number"][1:] == records["number"][:-1])
    is_even = ~np.isin(records["operation"], UNEVEN)
    differs = is_even[1:] & is_even[:-1] & (records["num_bytes"][1:] != records["num_bytes"][:-1])
    for name in ("operation", "dtype", "peer", "step"):
        differs |= records[name][1:] != records[name][:-1]
    found = np.flatnonzero(is_same & differs)
    return set(zip(groups[found].tolist(), records["number"][found].tolist(), strict=True))


def _suspicious(joined: Joined, groups: Iterable[int], strayed: set[int], is_unclear: bool) -> tuple[int, ...]:
    if is_unclear:
        return tuple(trace.rank for trace in joined.traces)
    members = {rank for group in groups for rank in joined.groups[group].ranks}
    return tuple(sorted(members | {joined.traces[trace].rank for trace in strayed}))


def _same_groups(before: Joined, ordered: Sequence[RankSummary]) -> bool:
    return all(len(one.of_slot) == len(local) for one, local in zip(ordered, before.local_groups, strict=True))
