"""Ranks that come late to their collectives, for records that do not show how long a rank computed.

Where ends are not recorded, or a rank computes while its collectives run, only arrivals are left. A rank that is late
makes those late that wait for it elsewhere. Who comes in time to a group in which another that is late too comes late
was made late by that one; if more than one is left nobody is blamed. Between nodes only what is three times beyond the
error of the clocks counts.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np

from evermesh.fault.detectors import kernels, kinds
from evermesh.fault.detectors.comparing import stages_of
from evermesh.fault.detectors.context import Context
from evermesh.fault.detectors.joining import Joined, Survey
from evermesh.fault.detectors.matching import Matched
from evermesh.fault.detectors.spreads import deviation
from evermesh.fault.events import Finding
from evermesh.fault.recorder.trace import UNKNOWN_NODE

_MOST_ROWS = 96
_MOST_LATE = 64
_LEAST_ROWS = 8
_LEAST_SHARE = 0.2
_LASTING = 0.75
_LEAST_SCORE = 6.0


@dataclass(frozen=True, slots=True)
class _Late:
    """How late the members of a group come to its collectives."""

    late_s: np.ndarray
    """Array [members]: median."""
    error_s: np.ndarray
    period_s: float
    is_late: np.ndarray


def find_late(
    joined: Joined, survey: Survey, matched: Matched, context: Context, told: Set[int | None]
) -> list[Finding]:
    """Ranks whose computation cannot be seen and that come last to all of their groups."""
    unseen = ((survey.of_step[:, :, kernels.UNSEEN] > 0) & survey.is_whole()).any(axis=1)
    if not unseen.any():
        return []
    stages = stages_of(joined)
    late_in: dict[int, list[tuple[int, float, float, float]]] = defaultdict(list)
    for group, members in enumerate(joined.members):
        if len(np.unique(stages[members[members >= 0]])) > 1:
            continue  # ranks of different stages come at different times
        for of_kind in _lateness(joined, matched, context, group):
            for place in np.flatnonzero(of_kind.is_late).tolist():
                numbers = (float(of_kind.late_s[place]), float(of_kind.error_s[place]), of_kind.period_s)
                late_in[int(members[place])].append((group, *numbers))
    late = [trace for trace in _not_made_late(joined, late_in) if unseen[trace]]
    if len(late) != 1 or joined.traces[late[0]].rank in told:
        return []
    [trace] = late
    group, late_s, error_s, period_s = max(late_in[trace], key=lambda one: one[1])
    state = joined.traces[trace]
    name = joined.groups[group].name
    return [
        Finding(
            kind=kinds.SLOW_RANK,
            rank=state.rank,
            node=joined.node(trace),
            group=name,
            text=f"{joined.where(trace)} comes late to group {name}: {late_s * 1e3:.1f} +- "
            f"{error_s * 1e3:.2f} ms behind the others, every {period_s * 1e3:.1f} ms",
            evidence={
                "cause": "late",
                "late_s": round(late_s, 6),
                "error_s": round(error_s, 6),
                "period_s": round(period_s, 6),
            },
            confidence=0.7,
        )
    ]


def _not_made_late(joined: Joined, late_in: Mapping[int, Sequence[tuple[int, float, float, float]]]) -> list[int]:
    """Those that are late without somebody else who is later in a group of both."""
    groups = {trace: {one[0] for one in found} for trace, found in late_in.items()}
    members = {group: set(joined.members[group].tolist()) for found in groups.values() for group in found}

    def is_made(trace: int) -> bool:
        return any(
            trace in members[group] and group not in groups[trace]
            for other, found in groups.items()
            if other != trace
            for group in found
        )

    return [trace for trace in sorted(groups) if not is_made(trace)] if len(groups) <= _MOST_LATE else []


def _lateness(joined: Joined, matched: Matched, context: Context, group: int) -> Iterator[_Late]:
    """For collectives of a kind, those that a step repeats: what a rank does before each is the same."""
    members = joined.members[group]
    rows = matched.rows(group)
    rows = slice(max(rows.start, rows.stop - _MOST_ROWS), rows.stop)
    entered = matched.cells(group, matched.entered_at)[-_MOST_ROWS:]
    if (members < 0).any() or len(members) < 2 or not len(entered):
        return
    errors = _errors_s(joined, context, members)
    if errors is None:
        return
    whole = (entered > 0).all(axis=1) & (matched.flags[rows] == 0)
    _, kind = np.unique(matched.reference[rows], axis=0, return_inverse=True)
    for chosen in (whole & (kind.ravel() == one) for one in range(int(kind.max()) + 1)):
        if chosen.sum() >= _LEAST_ROWS:
            yield _of_kind(entered[chosen], errors)


def _of_kind(entered: np.ndarray, errors_s: np.ndarray) -> _Late:
    size = entered.shape[1]
    period_s = float(np.median(np.diff(np.median(entered, axis=1)))) / 1e9
    usual = np.sort(entered, axis=1)[:, (size - 1) // 2]  # of two the earlier one
    late_s = (entered - usual[:, None]) / 1e9
    typical = np.median(late_s, axis=0)
    spread = max(deviation(typical), 1e-6)
    lasting = (late_s > np.maximum(typical / 2, 0)).mean(axis=0) >= _LASTING
    is_late = lasting & (typical > np.maximum(_LEAST_SHARE * period_s, 3 * errors_s))
    if size > 3:
        is_late &= typical > _LEAST_SCORE * spread
    return _Late(typical, errors_s, period_s, is_late)


def _errors_s(joined: Joined, context: Context, members: np.ndarray) -> np.ndarray | None:
    """By what the clock of every member may be wrong; None where nobody knows."""
    nodes = [joined.traces[trace].node for trace in members.tolist()]
    if len(set(nodes)) == 1 and nodes[0] != UNKNOWN_NODE:
        return np.zeros(len(members))
    if any(node not in context.offsets for node in nodes):
        return None
    own = np.array([context.offsets[node].error_ns for node in nodes]) / 1e9
    found: np.ndarray = own + float(np.median(own))
    return found
