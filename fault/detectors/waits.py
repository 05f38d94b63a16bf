"""The waits-for graph: who waits in which collective for whom, longer than anything explains."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass

from evermesh.fault.detectors.context import Context
from evermesh.fault.detectors.joining import Joined
from evermesh.fault.detectors.sentences import is_gone
from evermesh.fault.detectors.standing import Key, Standing, Waiting

_STARVED, _GRACE_S = 0.3, 2.5
"""Share of the time in which a process waits for a processor, from which on others wait so much longer for it."""


@dataclass(frozen=True, slots=True)
class Waits:
    """The graph: who waits in what, and longer than anything explains, for whom."""

    long: dict[int, Waiting]
    """By trace."""
    waiters: dict[Key, list[Waiting]]
    waited_for: dict[int, list[Key]]
    """By trace of those that have not come."""
    crowded: Set[Key]
    """To which most have not come."""


def waits_of(joined: Joined, standing: Standing) -> Waits:
    """The graph of those that wait longer than anything explains."""
    long = {trace: one for trace, one in standing.waiting.items() if standing.is_long(one)}
    waiters: dict[Key, list[Waiting]] = defaultdict(list)
    for one in long.values():
        waiters[one.key].append(one)
    waited_for: dict[int, list[Key]] = defaultdict(list)
    for key in waiters:
        for trace in standing.missing[key]:
            waited_for[trace].append(key)
    crowded = {key for key in waiters if _is_crowded(joined, standing, key)}
    return Waits(long, waiters, waited_for, crowded)


def _is_crowded(joined: Joined, standing: Standing, key: Key) -> bool:
    """Whether most of a group have not come: then it may be those who have that are wrong."""
    missing = len(standing.missing[key])
    return missing > 2 and missing * 2 > len(joined.groups[key[0]].ranks)


def stuck_alone(
    joined: Joined, standing: Standing, context: Context, waits: Waits
) -> Iterator[tuple[int, Waiting, list[Waiting]]]:
    """Traces that are waited for and wait for nobody, with the one that waits longest, and all."""
    for trace, keys in sorted(waits.waited_for.items()):
        if is_stuck_alone(joined, standing, context, trace):
            waiting = [one for key in keys if key not in waits.crowded for one in waits.waiters[key]]
            if waiting:
                yield trace, max(waiting, key=lambda one: (one.waited_s, -one.group)), waiting


def is_patient(joined: Joined, standing: Standing, context: Context, trace: int, longest: Waiting) -> bool:
    """Whether a rank runs and said that it is in a phase that may take that long, or has no processor."""
    patience_s = standing.patience_s[longest.group]
    state = joined.traces[trace]
    if not context.processes.get(state.rank, True):
        return False
    if lacks_processor(context, state.rank, longest.waited_s, patience_s):
        return True
    return longest.waited_s < context.patience_s.get(state.phase, 0.0)


def lacks_processor(context: Context, rank: int, waited_s: float, patience_s: float) -> bool:
    """Whether a rank waits for a processor so much that others may have waited so long for it."""
    return context.starved.get(rank, 0.0) > _STARVED and waited_s < patience_s + _GRACE_S


def is_stuck_alone(joined: Joined, standing: Standing, context: Context, trace: int) -> bool:
    """Whether a rank is in no operation, or its process is known to be stopped or gone: then it is not what it is in that
    keeps it."""
    return trace not in standing.waiting or is_gone(context, joined.traces[trace].rank)


def behind(roots: Iterable[int], waits: Waits) -> set[int]:
    """The roots and whoever waits for them, or for one who does."""
    reached, queue, seen = set(roots), list(roots), set[Key]()
    while queue:
        for key in waits.waited_for.get(queue.pop(), ()):
            if key in seen:
                continue
            seen.add(key)
            news = [one.trace for one in waits.waiters[key] if one.trace not in reached]
            reached.update(news)
            queue.extend(news)
    return reached
