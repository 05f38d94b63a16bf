"""Who is to blame where ranks wait: a waits-for graph over the collectives that they are in.

A rank waits for those that have not entered what it is in; whoever is waited for and waits for nobody is the suspect. Where
all entered and nobody leaves it is the communication. Where neither explains a wait, the ranks wait for each other.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Set

from evermesh.fault.detectors import kinds
from evermesh.fault.detectors.context import Context
from evermesh.fault.detectors.deadlocks import of_cycle
from evermesh.fault.detectors.joining import Joined, in_step
from evermesh.fault.detectors.sentences import is_gone, operation_of, ranks_that, state_of
from evermesh.fault.detectors.standing import Key, Standing, Waiting
from evermesh.fault.detectors.stillness import merged, of_communication
from evermesh.fault.events import Finding

_PERHAPS = 0.5


def find_hangs(joined: Joined, standing: Standing, context: Context, spoiled: set[tuple[int, int]]) -> list[Finding]:
    """Hangs, communication hangs and deadlocks. ``spoiled``: collectives, by group and number, whose members do not agree on
    what they do, which is said elsewhere and explains that nobody leaves."""
    long = {trace: one for trace, one in standing.waiting.items() if standing.is_long(one)}
    waiters: dict[Key, list[Waiting]] = defaultdict(list)
    for one in long.values():
        waiters[one.key].append(one)
    waited_for: dict[int, list[Key]] = defaultdict(list)
    crowded = {key for key in waiters if _is_crowded(joined, standing, key)}
    for key in waiters:
        for trace in standing.missing[key]:
            waited_for[trace].append(key)
    explained = {key: waiters[key] for key in waiters if key not in crowded}
    suspects = list(_of_suspects(joined, standing, context, waited_for, explained))
    named = {one.rank for one in suspects}
    found = [
        *suspects,
        *_of_crowds(joined, standing, waited_for, waiters, crowded),
        *(one for one in _of_gone(joined, context, waiters) if one.rank not in named),
        *_of_unknown(joined, standing, long.values()),
        *merged(list(of_communication(joined, standing, context, waiters, spoiled))),
    ]
    roots = [trace for trace in waited_for if _is_stuck_alone(joined, standing, context, trace)]
    roots += [
        trace
        for trace, one in standing.waiting.items()
        if not standing.missing[one.key] or standing.unknown[one.key] or not standing.is_long(one)
    ]
    tangled = set(long) - _behind(roots, waited_for, waiters)
    return found + list(of_cycle(joined, standing, tangled))


def _is_crowded(joined: Joined, standing: Standing, key: Key) -> bool:
    """Whether most of a group have not come: then it may be those who have that are wrong."""
    missing = len(standing.missing[key])
    return missing > 2 and missing * 2 > len(joined.groups[key[0]].ranks)


def _of_crowds(
    joined: Joined,
    standing: Standing,
    waited_for: dict[int, list[Key]],
    waiters: dict[Key, list[Waiting]],
    crowded: Set[Key],
) -> Iterator[Finding]:
    """Collectives to which most members have not come, and nobody is stuck who would explain it: nobody is named."""
    for key in sorted(crowded, key=lambda key: key[:2]):
        missing = standing.missing[key]
        if any(trace in standing.waiting or set(waited_for[trace]) - crowded for trace in missing):
            continue
        one = max(waiters[key], key=lambda one: one.waited_s)
        entered = ranks_that(joined, (other.trace for other in waiters[key]), "is", "are")
        yield Finding(
            kind=kinds.HANG,
            group=joined.groups[one.group].name,
            step=one.step,
            text=f"only {entered} in {operation_of(joined, one)}{in_step(one.step)} since {one.waited_s:.1f} s, "
            f"{len(missing)} members are not and wait for nobody",
            evidence={"operation": one.operation, "number": one.number, "waited_s": round(one.waited_s, 3)},
            confidence=_PERHAPS,
        )


def _of_suspects(
    joined: Joined,
    standing: Standing,
    context: Context,
    waited_for: dict[int, list[Key]],
    waiters: dict[Key, list[Waiting]],
) -> Iterator[Finding]:
    """Those that are waited for and wait for nobody."""
    for trace, keys in sorted(waited_for.items()):
        if not _is_stuck_alone(joined, standing, context, trace):
            continue
        waiting = [one for key in keys for one in waiters.get(key, ())]
        if not waiting:
            continue
        longest = max(waiting, key=lambda one: (one.waited_s, -one.group))
        state = joined.traces[trace]
        if longest.waited_s < context.patience_s.get(state.phase, 0.0) and context.processes.get(state.rank, True):
            continue
        waits = [one for one in waiting if one.key == longest.key]
        rank_state, confidence = state_of(context, state.rank, state.phase)
        group = joined.groups[longest.group].name
        yield Finding(
            kind=kinds.HANG,
            rank=state.rank,
            node=joined.node(trace),
            group=group,
            step=longest.step,
            text=f"{joined.where(trace)} never entered {operation_of(joined, longest)}{in_step(longest.step)}{rank_state}; "
            f"{ranks_that(joined, (one.trace for one in waits))} since {longest.waited_s:.1f} s",
            evidence={
                "operation": longest.operation,
                "number": longest.number,
                "waited_s": round(longest.waited_s, 3),
                "patience_s": round(standing.patience_s[longest.group], 3),
                "waiting": len(waiting),
                "phase": state.phase,
            },
            confidence=confidence,
        )


def _is_stuck_alone(joined: Joined, standing: Standing, context: Context, trace: int) -> bool:
    """Whether a rank is in no operation, or its process is known to be stopped or gone: then it is not what it is in that
    keeps it."""
    return trace not in standing.waiting or is_gone(context, joined.traces[trace].rank)


def _of_gone(joined: Joined, context: Context, waiters: dict[Key, list[Waiting]]) -> Iterator[Finding]:
    """Those whose processes ended, or are stopped, inside of what others are in too."""
    for waiting in waiters.values():
        for one in waiting:
            state = joined.traces[one.trace]
            if len(waiting) > 1 and is_gone(context, state.rank):
                others = (other.trace for other in waiting if other is not one)
                yield Finding(
                    kind=kinds.HANG,
                    rank=state.rank,
                    node=joined.node(one.trace),
                    group=joined.groups[one.group].name,
                    step=one.step,
                    text=f"{joined.where(one.trace)} is in {operation_of(joined, one)}{in_step(one.step)}"
                    f"{state_of(context, state.rank, state.phase)[0]}; "
                    f"{ranks_that(joined, others)} since {one.waited_s:.1f} s",
                    evidence={"operation": one.operation, "number": one.number, "waited_s": round(one.waited_s, 3)},
                    confidence=0.99,
                )


def _of_unknown(joined: Joined, standing: Standing, waiting: Iterable[Waiting]) -> Iterator[Finding]:
    """Ranks without records that are members of what others are stuck in while nobody else is missing."""
    told: set[int] = set()
    for one in sorted(waiting, key=lambda one: -one.waited_s):
        ranks = standing.unknown[one.key]
        if not ranks or standing.missing[one.key] or len(ranks) * 2 > len(joined.groups[one.group].ranks):
            continue
        for rank in ranks:
            if rank in told:
                continue
            told.add(rank)
            yield Finding(
                kind=kinds.HANG,
                rank=rank,
                group=joined.groups[one.group].name,
                step=one.step,
                text=f"there are no records of rank {rank}, a member of group {joined.groups[one.group].name}, in whose "
                f"{one.operation} #{one.number}{in_step(one.step)} all others wait since {one.waited_s:.1f} s",
                evidence={"operation": one.operation, "number": one.number, "waited_s": round(one.waited_s, 3)},
                confidence=_PERHAPS / len(ranks),
            )


def _behind(roots: Iterable[int], waited_for: dict[int, list[Key]], waiters: dict[Key, list[Waiting]]) -> set[int]:
    """The roots and whoever waits for them, or for one who does."""
    reached, queue, seen = set(roots), list(roots), set[Key]()
    while queue:
        for key in waited_for.get(queue.pop(), ()):
            if key in seen:
                continue
            seen.add(key)
            news = [one.trace for one in waiters[key] if one.trace not in reached]
            reached.update(news)
            queue.extend(news)
    return reached
