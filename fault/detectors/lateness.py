"""Ranks that come late to their collectives, for records that do not show how long a rank computed.

Where ends are not recorded, or a rank computes while its collectives run, only arrivals are left. A rank that is late makes those
late that wait for it elsewhere, so it is blamed only if it is late in all of its groups, and not where a pipeline makes its
neighbours late too. Lateness between nodes counts only beyond three times what their clocks may be wrong.
"""

from collections.abc import Set
from dataclasses import dataclass

import numpy as np

from evermesh.fault.detectors import kernels, kinds
from evermesh.fault.detectors.comparing import stages_of
from evermesh.fault.detectors.context import Context
from evermesh.fault.detectors.joining import Joined, Survey
from evermesh.fault.detectors.matching import Matched
from evermesh.fault.events import Finding
from evermesh.fault.recorder.trace import UNKNOWN_NODE

_MOST_ROWS = 64
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
    late_in: dict[int, list[tuple[int, float, float, float]]] = {}
    on_time: set[int] = set()
    for group, members in enumerate(joined.members):
        if len(np.unique(stages[members[members >= 0]])) > 1:
            continue  # ranks of different stages come at different times
        of_group = _lateness(joined, matched, context, group)
        if of_group is None:
            continue
        for place, trace in enumerate(members.tolist()):
            if of_group.is_late[place]:
                numbers = (float(of_group.late_s[place]), float(of_group.error_s[place]), of_group.period_s)
                late_in.setdefault(trace, []).append((group, *numbers))
            else:
                on_time.add(trace)
    late = [trace for trace in sorted(late_in) if trace not in on_time and unseen[trace]]
    late = [trace for trace in late if joined.traces[trace].rank not in told]
    if not late or len(late) > 1:
        return []  # of several that are late one may make the others late
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
            text=f"{joined.where(trace)} comes last to all of its groups: to group {name} {late_s * 1e3:.1f} +- "
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


def _lateness(joined: Joined, matched: Matched, context: Context, group: int) -> _Late | None:
    members = joined.members[group]
    entered = matched.cells(group, matched.entered_at)[-_MOST_ROWS:]
    whole = (entered > 0).all(axis=1) if len(entered) else np.zeros(0, bool)
    if (members < 0).any() or whole.sum() < _LEAST_ROWS or len(members) < 2:
        return None
    errors = _errors_s(joined, context, members)
    if errors is None:
        return None
    entered = entered[whole]
    period_s = float(np.median(np.diff(np.median(entered, axis=1)))) / 1e9
    usual = np.sort(entered, axis=1)[:, (len(members) - 1) // 2]  # of two the earlier one
    late_s = (entered - usual[:, None]) / 1e9
    typical = np.median(late_s, axis=0)
    spread = max(1.4826 * float(np.median(np.abs(typical - np.median(typical)))), 1e-6)
    lasting = (late_s > np.maximum(typical / 2, 0)).mean(axis=0) >= _LASTING
    is_late = lasting & (typical > np.maximum(_LEAST_SHARE * period_s, 3 * errors))
    if len(members) > 3:
        is_late &= typical > _LEAST_SCORE * spread
    return _Late(typical, errors, period_s, is_late)


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
