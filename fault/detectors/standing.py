"""Where every rank stands: in which open operation, since when, and for whom it waits there."""

from dataclasses import dataclass, replace

import numpy as np

from evermesh.fault.detectors import kernels
from evermesh.fault.detectors.context import Context
from evermesh.fault.detectors.joining import Joined, Survey
from evermesh.fault.recorder.record import OPERATIONS
from evermesh.fault.recorder.trace import UNKNOWN_NODE

Key = tuple[int, int, int | None]
"""Group, number, and place of the other side of a message; the same for all that are in one collective."""
UNDECIDED = "receive_any"
"""Operation of which nobody knows for whom it waits."""
_MANY, _SETTLED = 100, 10.0
"""Operations of a rank in its first step from which on nothing is the first of its kind, and times the floor that may then be
waited."""
_SEND, _RECEIVE = OPERATIONS.index("send"), OPERATIONS.index("receive")


@dataclass(frozen=True, slots=True)
class Waiting:
    """The open operation of a rank."""

    trace: int
    group: int
    number: int
    operation: str
    step: int
    waited_s: float
    place: int | None
    """Of the other side of a message in the group; None: a collective."""

    @property
    def key(self) -> Key:
        return (self.group, self.number, self.place)


@dataclass(frozen=True, slots=True)
class Standing:
    """Where all ranks stand."""

    waiting: dict[int, Waiting]
    """By trace; those that are in no operation are left out."""
    missing: dict[Key, tuple[int, ...]]
    """By collective: traces of members that have not entered it."""
    unknown: dict[Key, tuple[int, ...]]
    """By collective: ranks of members of which there is no trace."""
    patience_s: dict[int, float]
    """By group: no shorter wait is a hang."""

    def is_long(self, waiting: Waiting) -> bool:
        """Whether it has lasted longer than anything explains."""
        return waiting.waited_s >= self.patience_s[waiting.group]


def standing_of(joined: Joined, survey: Survey, context: Context) -> Standing:
    """Look at the open operations of all ranks."""
    waiting = {
        trace: found
        for trace in np.flatnonzero(survey.opened >= 0).tolist()
        if (found := _waiting(joined, survey, trace)) is not None
    }
    missing: dict[Key, tuple[int, ...]] = {}
    unknown: dict[Key, tuple[int, ...]] = {}
    for trace, one in list(waiting.items()):
        if one.key in missing:
            continue
        absent = _missing(joined, survey, one)
        if absent is None:
            waiting[trace] = replace(one, operation=UNDECIDED)
        missing[one.key], unknown[one.key] = absent or ((), ())
    groups = {one.group for one in waiting.values()}
    return Standing(waiting, missing, unknown, {group: _patience_s(joined, survey, context, group) for group in groups})


def _waiting(joined: Joined, survey: Survey, trace: int) -> Waiting | None:
    record = joined.traces[trace].records[int(survey.opened[trace])]
    group = joined.group_of(trace, int(record["group"]))
    if group < 0:
        return None
    operation = OPERATIONS[record["operation"]] if record["operation"] < len(OPERATIONS) else "unknown"
    waited_s = max(joined.traces[trace].read_ns - int(record["entered_ns"]), 0) / 1e9
    place = int(record["peer"]) if operation in ("send", "receive") else None
    return Waiting(trace, group, int(record["number"]), operation, int(record["step"]), waited_s, place)


def _missing(joined: Joined, survey: Survey, one: Waiting) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Traces that have not entered what a rank is in, and ranks of which nobody knows; None: nobody knows who these are."""
    members = joined.members[one.group]
    ranks = joined.groups[one.group].ranks
    if one.operation == UNDECIDED:
        return None
    if one.place is not None:
        if not 0 <= one.place < len(ranks):
            return None
        other = int(members[one.place])
        if other < 0:
            return (), (ranks[one.place],)
        entered = _messages(joined, one, other)
        if entered is None:
            return None
        return ((other,), ()) if entered <= one.number else ((), ())
    start = int(joined.slot_starts[one.group])
    last = survey.of_slot[start : start + len(members), kernels.LAST]
    behind = np.flatnonzero((members >= 0) & (last < one.number))
    return tuple(members[behind].tolist()), tuple(ranks[place] for place in np.flatnonzero(members < 0).tolist())


def _messages(joined: Joined, one: Waiting, other: int) -> int | None:
    """How many messages the other side has entered, of those that meet these; None if that was overwritten."""
    place = int(joined.places[one.trace][joined.local_groups[one.trace] == one.group][0])
    records = joined.traces[other].records
    local = np.flatnonzero(joined.local_groups[other] == one.group)
    wanted = _SEND if one.operation == "receive" else _RECEIVE
    chosen = (records["operation"] == wanted) & (records["peer"] == place) & np.isin(records["group"], local)
    numbers = records["number"][chosen]
    if len(numbers):
        return int(numbers[-1]) + 1
    return 0 if joined.traces[other].num_overwritten == 0 else None


def _patience_s(joined: Joined, survey: Survey, context: Context, group: int) -> float:
    """Twice the longest time between two collectives of the group of late, and no less than three steps; before anybody knows
    how long a step takes, what the first one may take."""
    slots = slice(int(joined.slot_starts[group]), int(joined.slot_starts[group + 1]))
    longest_s = float(survey.of_slot[slots][:, [kernels.LONGEST_NS, kernels.BEFORE_NS]].max()) / 1e9
    step_s = context.step_s if context.step_s is not None else median_step_s(survey)
    counts_steps = survey.first_step + survey.num_steps > 1
    floor_s = context.floor_s
    if counts_steps and step_s == 0:
        most = max((int(trace.records["sequence"][-1]) for trace in joined.traces if len(trace.records)), default=0)
        # nobody may ever count the steps of a script
        floor_s = _SETTLED * context.floor_s if most >= _MANY else context.first_step_s
    return max(floor_s, 2 * longest_s, 3 * step_s) + _skew_s(joined, context, group)


def _skew_s(joined: Joined, context: Context, group: int) -> float:
    """By how much the moments differ at which rings of a group were read; those of one node share a clock that says it."""
    traces = [joined.traces[trace] for trace in joined.members[group].tolist() if trace >= 0]
    nodes = {trace.node for trace in traces}
    if len(nodes) > 1 or UNKNOWN_NODE in nodes:
        return context.skew_s
    moments = [trace.read_ns for trace in traces]
    return (max(moments) - min(moments)) / 1e9


def median_step_s(survey: Survey) -> float:
    """Median time from step to step, of those that were seen whole; 0 if none was."""
    begins = survey.of_step[:, :, kernels.BEGIN_NS]
    whole = survey.is_whole()[:, :-1] & (survey.of_step[:, 1:, kernels.COUNT] > 0)
    spans = np.diff(begins, axis=1)
    return float(np.median(spans[whole])) / 1e9 if whole.any() else 0.0
