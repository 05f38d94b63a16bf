"""Collectives and messages that all have entered and that do not end."""

from collections.abc import Iterator, Sequence

import numpy as np
from pydantic import JsonValue

from evermesh.fault.detectors import kinds
from evermesh.fault.detectors.context import Context
from evermesh.fault.detectors.gone import gone_partner
from evermesh.fault.detectors.joining import Joined, in_step
from evermesh.fault.detectors.sentences import MOST_NAMED, is_gone, operation_of, ranks_that
from evermesh.fault.detectors.standing import UNDECIDED, Key, Standing, Waiting
from evermesh.fault.detectors.waits import lacks_processor
from evermesh.fault.events import Finding
from evermesh.fault.recorder.record import OPERATIONS
from evermesh.fault.recorder.trace import UNKNOWN_NODE

_LIKELY, _PERHAPS = 0.9, 0.5


def of_communication(
    joined: Joined,
    standing: Standing,
    context: Context,
    waiters: dict[Key, list[Waiting]],
    spoiled: set[tuple[int, int]],
) -> Iterator[Finding]:
    """Collectives, and messages, that all have entered and that do not end."""
    for key, waiting in waiters.items():
        group, number, place = key
        is_explained = standing.missing[key] or standing.unknown[key] or (place is None and (group, number) in spoiled)
        is_explained = is_explained or any(is_gone(context, joined.traces[one.trace].rank) for one in waiting)
        is_explained = is_explained or gone_partner(joined, context, waiting[0]) is not None
        if is_explained or waiting[0].operation == UNDECIDED:
            continue
        shortest = min(waiting, key=lambda one: one.waited_s)
        if not _has_been_still(joined, standing, shortest):
            continue
        inside = sorted(joined.traces[one.trace].rank for one in waiting)
        if any(lacks_processor(context, rank, shortest.waited_s, standing.patience_s[group]) for rank in inside):
            continue
        nodes = {joined.traces[one.trace].node for one in waiting}
        link = None
        if place is not None:
            ranks = joined.groups[group].ranks
            link = (min(inside[0], ranks[place]), max(inside[0], ranks[place]))
            nodes |= {trace.node for trace in joined.traces if trace.rank == ranks[place]}
        cut = _cut(context, joined.groups[group].ranks)
        if cut is not None:
            link = (min(cut), max(cut))
            nodes = {trace.node for trace in joined.traces if trace.rank in link}
        way = (
            f": what rank {cut[0]} sends does not arrive at rank {cut[1]}"
            if cut
            else ": the communication stands still"
        )
        nodes.discard(UNKNOWN_NODE)
        yield Finding(
            kind=kinds.COMMUNICATION_HANG,
            group=joined.groups[group].name,
            step=shortest.step,
            link=link,
            node=nodes.pop() if len(nodes) == 1 else None,
            text=f"all of which there are records entered {operation_of(joined, shortest)}{in_step(shortest.step)}, and "
            f"{ranks_that(joined, (one.trace for one in waiting), 'is', 'are')} still inside after "
            f"{shortest.waited_s:.1f} s{way}",
            evidence={
                "operation": shortest.operation,
                "number": number,
                "waited_s": round(shortest.waited_s, 3),
                "inside": list(inside[:64]),
            },
            confidence=_LIKELY if joined.traces[shortest.trace].node != UNKNOWN_NODE else _PERHAPS,
        )


def _has_been_still(joined: Joined, standing: Standing, one: Waiting) -> bool:
    """Whether the last of all that take part entered long ago, too."""
    places = range(len(joined.groups[one.group].ranks)) if one.place is None else (one.place,)
    for trace in (int(joined.members[one.group][place]) for place in places):
        entered_ns = _entered_ns(joined, one, trace) if trace >= 0 else None
        if entered_ns is not None and joined.traces[trace].read_ns - entered_ns < standing.patience_s[one.group] * 1e9:
            return False
    return True


def _entered_ns(joined: Joined, one: Waiting, trace: int) -> int | None:
    """When another member entered what a rank is in; None: that was long ago."""
    records = joined.traces[trace].records
    local = np.flatnonzero(joined.local_groups[trace] == one.group)
    chosen = np.isin(records["group"], local) & (records["number"] == one.number)
    if one.place is None:
        chosen &= records["operation"] < OPERATIONS.index("send")
    else:
        wanted = "send" if one.operation == "receive" else "receive"
        place = int(joined.places[one.trace][joined.local_groups[one.trace] == one.group][0])
        chosen &= (records["operation"] == OPERATIONS.index(wanted)) & (records["peer"] == place)
    found = np.flatnonzero(chosen)
    return int(records["entered_ns"][found[-1]]) if len(found) else None


def _cut(context: Context, ranks: Sequence[int]) -> tuple[int, int] | None:
    """From and to, where one way between members is known to let nothing pass; the other direction of it may not either."""
    inside = sorted(link for link in context.cut_links if set(link) <= set(ranks))
    return inside[0] if len({frozenset(link) for link in inside}) == 1 else None


def merged(found: list[Finding]) -> list[Finding]:
    """Where many groups stand still at once it is one finding."""
    if len(found) <= MOST_NAMED:
        return found
    nodes = {one.node for one in found}
    worst = max(found, key=lambda one: float(str(one.evidence["waited_s"])))
    groups = list[JsonValue]([one.group for one in found][:64])
    text = f"the communication of {len(found)} groups stands still; the first of them: {worst.text}"
    node = nodes.pop() if len(nodes) == 1 else None
    changes = {
        "group": None,
        "link": None,
        "node": node,
        "text": text,
        "evidence": {**worst.evidence, "groups": groups},
    }
    return [worst.model_copy(update=changes)]
