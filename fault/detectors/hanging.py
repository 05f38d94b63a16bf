"""Who is to blame where ranks wait: a waits-for graph over the collectives that they are in.

A rank waits for those that have not entered what it is in; whoever is waited for and waits for nobody is the suspect. Where
all entered and nobody leaves it is the communication. Where neither explains a wait, the ranks wait for each other.
"""

from collections.abc import Iterable, Iterator

from evermesh.fault.detectors import kinds
from evermesh.fault.detectors.context import Context
from evermesh.fault.detectors.deadlocks import of_cycle
from evermesh.fault.detectors.gone import of_gone_partners
from evermesh.fault.detectors.joining import Joined, in_step
from evermesh.fault.detectors.sentences import is_gone, operation_of, ranks_that, state_of
from evermesh.fault.detectors.standing import Key, Standing, Waiting
from evermesh.fault.detectors.stillness import merged, of_communication
from evermesh.fault.detectors.waits import Waits, behind, is_patient, is_stuck_alone, stuck_alone, waits_of
from evermesh.fault.events import Finding

_PERHAPS = 0.5


def find_hangs(joined: Joined, standing: Standing, context: Context, spoiled: set[tuple[int, int]]) -> list[Finding]:
    """Hangs, communication hangs and deadlocks. ``spoiled``: collectives, by group and number, whose members do not agree on
    what they do, which is said elsewhere and explains that nobody leaves."""
    waits = waits_of(joined, standing)
    suspects = list(_of_suspects(joined, standing, context, waits))
    named = {one.rank for one in suspects}
    found = [
        *suspects,
        *(one for one in of_gone_partners(joined, context, waits.long.values()) if one.rank not in named),
        *_of_crowds(joined, standing, waits),
        *(one for one in _of_gone(joined, context, waits.waiters) if one.rank not in named),
        *_of_unknown(joined, standing, waits.long.values()),
        *merged(list(of_communication(joined, standing, context, waits.waiters, spoiled))),
    ]
    roots = [trace for trace in waits.waited_for if is_stuck_alone(joined, standing, context, trace)]
    roots += [
        trace
        for trace, one in standing.waiting.items()
        if not standing.missing[one.key] or standing.unknown[one.key] or not standing.is_long(one)
    ]
    tangled = set(waits.long) - behind(roots, waits)
    return found + list(of_cycle(joined, standing, tangled))


def patient(joined: Joined, standing: Standing, context: Context) -> Iterator[str]:
    """Sentences about ranks for which others wait, and rightly: they said that they are in a phase that takes long."""
    for trace, longest, waiting in stuck_alone(joined, standing, context, waits_of(joined, standing)):
        state = joined.traces[trace]
        if is_patient(joined, standing, context, trace, longest):
            waiters = ranks_that(joined, (one.trace for one in waiting))
            starved = context.starved.get(state.rank, 0.0)
            most_s = context.patience_s.get(state.phase)
            why = (
                f", which may take {most_s:.0f} s"
                if most_s
                else f" and waits for a processor {starved:.0%} of the time"
            )
            yield f"{joined.where(trace)} is in phase {state.phase}{why}; {waiters} since {longest.waited_s:.1f} s: no hang"


def _of_crowds(
    joined: Joined,
    standing: Standing,
    waits: Waits,
) -> Iterator[Finding]:
    """Collectives to which most members have not come, and nobody is stuck who would explain it: nobody is named."""
    for key in sorted(waits.crowded, key=lambda key: key[:2]):
        missing = standing.missing[key]
        if any(trace in standing.waiting or set(waits.waited_for[trace]) - waits.crowded for trace in missing):
            continue
        one = max(waits.waiters[key], key=lambda one: one.waited_s)
        entered = ranks_that(joined, (other.trace for other in waits.waiters[key]), "is", "are")
        yield Finding(
            kind=kinds.HANG,
            group=joined.groups[one.group].name,
            step=one.step,
            text=f"only {entered} in {operation_of(joined, one)}{in_step(one.step)} since {one.waited_s:.1f} s, "
            f"{len(missing)} members are not and wait for nobody",
            evidence={"operation": one.operation, "number": one.number, "waited_s": round(one.waited_s, 3)},
            confidence=_PERHAPS,
        )


def _of_suspects(joined: Joined, standing: Standing, context: Context, waits: Waits) -> Iterator[Finding]:
    """Those that are waited for and wait for nobody."""
    for trace, longest, waiting in stuck_alone(joined, standing, context, waits):
        if is_patient(joined, standing, context, trace, longest):
            continue
        state = joined.traces[trace]
        rank_state, confidence = state_of(context, state.rank, state.phase)
        group = joined.groups[longest.group].name
        yield Finding(
            kind=kinds.HANG,
            rank=state.rank,
            node=joined.node(trace),
            group=group,
            step=longest.step,
            text=f"{joined.where(trace)} never entered {operation_of(joined, longest)}{in_step(longest.step)}{rank_state}; "
            f"{ranks_that(joined, (one.trace for one in waiting if one.key == longest.key))} since {longest.waited_s:.1f} s",
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
