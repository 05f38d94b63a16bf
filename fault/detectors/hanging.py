"""Who is to blame where ranks wait: a waits-for graph over the collectives that they are in.

A rank waits for those that have not entered what it is in; whoever is waited for and waits for nobody is the suspect. Where
all entered and nobody leaves it is the communication. Where neither explains a wait, the ranks wait for each other.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Set

from pydantic import JsonValue

from evermesh.fault.detectors import kinds
from evermesh.fault.detectors.context import Context
from evermesh.fault.detectors.joining import Joined, in_step
from evermesh.fault.detectors.programs import Deviation, deviation_of, majority, name_of
from evermesh.fault.detectors.standing import UNDECIDED, Key, Standing, Waiting
from evermesh.fault.events import Finding
from evermesh.fault.recorder.trace import UNKNOWN_NODE

_SURE, _LIKELY, _PERHAPS = 0.98, 0.9, 0.5
_MOST_NAMED = 6


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
    found = [
        *_of_suspects(
            joined, standing, context, waited_for, {key: waiters[key] for key in waiters if key not in crowded}
        ),
        *_of_crowds(joined, standing, waited_for, waiters, crowded),
        *_of_gone(joined, context, waiters),
        *_of_unknown(joined, standing, long.values()),
        *_merged(list(_of_communication(joined, standing, context, waiters, spoiled))),
    ]
    roots = [trace for trace in waited_for if trace not in standing.waiting]
    roots += [
        trace
        for trace, one in standing.waiting.items()
        if not standing.missing[one.key] or standing.unknown[one.key] or not standing.is_long(one)
    ]
    tangled = set(long) - _behind(roots, waited_for, waiters)
    return found + list(_of_cycle(joined, standing, tangled))


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
        entered = _ranks(joined, (other.trace for other in waiters[key]), "is", "are")
        yield Finding(
            kind=kinds.HANG,
            group=joined.groups[one.group].name,
            step=one.step,
            text=f"only {entered} in {_operation(joined, one)}{in_step(one.step)} since {one.waited_s:.1f} s, "
            f"{len(missing)} members are not and wait for nobody",
            evidence={"operation": one.operation, "number": one.number, "waited_s": round(one.waited_s, 3)},
            confidence=_PERHAPS,
        )


def _merged(found: list[Finding]) -> list[Finding]:
    """Where many groups stand still at once it is one finding."""
    if len(found) <= _MOST_NAMED:
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


def _of_suspects(
    joined: Joined,
    standing: Standing,
    context: Context,
    waited_for: dict[int, list[Key]],
    waiters: dict[Key, list[Waiting]],
) -> Iterator[Finding]:
    """Those that are waited for and are in no operation."""
    for trace, keys in sorted(waited_for.items()):
        if trace in standing.waiting:
            continue
        waiting = [one for key in keys for one in waiters.get(key, ())]
        if not waiting:
            continue
        longest = max(waiting, key=lambda one: (one.waited_s, -one.group))
        state = joined.traces[trace]
        if longest.waited_s < context.patience_s.get(state.phase, 0.0) and context.processes.get(state.rank, True):
            continue
        waits = [one for one in waiting if one.key == longest.key]
        rank_state, confidence = _state(context, state.rank, state.phase)
        group = joined.groups[longest.group].name
        yield Finding(
            kind=kinds.HANG,
            rank=state.rank,
            node=joined.node(trace),
            group=group,
            step=longest.step,
            text=f"{joined.where(trace)} never entered {_operation(joined, longest)}{in_step(longest.step)}{rank_state}; "
            f"{_ranks(joined, (one.trace for one in waits))} since {longest.waited_s:.1f} s",
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
            if len(waiting) > 1 and _is_gone(context, state.rank):
                others = (other.trace for other in waiting if other is not one)
                yield Finding(
                    kind=kinds.HANG,
                    rank=state.rank,
                    node=joined.node(one.trace),
                    group=joined.groups[one.group].name,
                    step=one.step,
                    text=f"{joined.where(one.trace)} is in {_operation(joined, one)}{in_step(one.step)}"
                    f"{_state(context, state.rank, state.phase)[0]}; {_ranks(joined, others)} since {one.waited_s:.1f} s",
                    evidence={"operation": one.operation, "number": one.number, "waited_s": round(one.waited_s, 3)},
                    confidence=0.99,
                )


def _is_gone(context: Context, rank: int) -> bool:
    """Whether its process is known to have ended, or to be stopped."""
    process = context.processes.get(rank)
    return rank in context.processes and (process is None or process.is_stopped)


def _state(context: Context, rank: int, phase: str) -> tuple[str, float]:
    """What its process does, for a sentence, and how sure that makes us."""
    if rank not in context.processes:
        label = {"data": ": it waits for input", "checkpoint": ": it writes a checkpoint"}.get(phase, "")
        return label, _LIKELY
    process = context.processes[rank]
    if process is None:
        return ": its process does not run", 0.99
    if process.is_stopped:
        return ": its process is stopped", 0.99
    if process.letter == "D":
        return ": its process waits for a disk", _SURE
    return {"data": ": it waits for input", "checkpoint": ": it writes a checkpoint"}.get(phase, ""), _SURE


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


def _of_communication(
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
        is_explained = is_explained or any(_is_gone(context, joined.traces[one.trace].rank) for one in waiting)
        if is_explained or waiting[0].operation == UNDECIDED:
            continue
        shortest = min(waiting, key=lambda one: one.waited_s)
        inside = sorted(joined.traces[one.trace].rank for one in waiting)
        nodes = {joined.traces[one.trace].node for one in waiting}
        link = None
        if place is not None:
            ranks = joined.groups[group].ranks
            link = (min(inside[0], ranks[place]), max(inside[0], ranks[place]))
            nodes |= {trace.node for trace in joined.traces if trace.rank == ranks[place]}
        nodes.discard(UNKNOWN_NODE)
        yield Finding(
            kind=kinds.COMMUNICATION_HANG,
            group=joined.groups[group].name,
            step=shortest.step,
            link=link,
            node=nodes.pop() if len(nodes) == 1 else None,
            text=f"all of which there are records entered {_operation(joined, shortest)}{in_step(shortest.step)}, and "
            f"{_ranks(joined, (one.trace for one in waiting), 'is', 'are')} still inside after {shortest.waited_s:.1f} s: "
            "the communication stands still",
            evidence={
                "operation": shortest.operation,
                "number": number,
                "waited_s": round(shortest.waited_s, 3),
                "inside": list(inside[:64]),
            },
            confidence=_LIKELY if joined.traces[shortest.trace].node != UNKNOWN_NODE else _PERHAPS,
        )


def _of_cycle(joined: Joined, standing: Standing, tangled: set[int]) -> Iterator[Finding]:
    """Ranks that wait for each other: one finding, which names who left the order of before, if that is one rank."""
    if not tangled:
        return
    deviating = _deviating(joined, standing, tangled)
    cycle = _cycle(standing, tangled)
    waits = "; ".join(
        f"{joined.where(trace)} is in {_operation(joined, standing.waiting[trace])}" for trace in cycle[:_MOST_NAMED]
    )
    first = standing.waiting[cycle[0]]
    evidence = {
        "cycle": [joined.traces[trace].rank for trace in cycle[:64]],
        "waited_s": round(first.waited_s, 3),
    }
    if len(deviating) != 1:
        text = f"{len(tangled)} ranks wait for each other{in_step(first.step)}: {waits}"
        yield Finding(kind=kinds.DEADLOCK, step=first.step, text=text, evidence={**evidence}, confidence=_LIKELY)
        return
    [one] = deviating
    trace, step = joined.traces[one.trace], standing.waiting[one.trace].step
    found, expected = name_of(joined, one.trace, one.found), name_of(joined, one.trace, one.expected)
    kind, what = {
        "skipped": (kinds.SKIPPED, f"left out {expected}: it went on with {found}"),
        "extra": (kinds.EXTRA, f"did {found} once more than before"),
    }.get(one.kind, (kinds.DEADLOCK, f"entered {found} where {expected} is due"))
    yield Finding(
        kind=kind,
        rank=trace.rank,
        node=joined.node(one.trace),
        group=joined.groups[standing.waiting[one.trace].group].name,
        step=step,
        text=f"{joined.where(one.trace)} {what}{in_step(step)}, and now {len(tangled)} ranks wait for each other: {waits}",
        evidence={**evidence, "expected": expected, "found": found},
        confidence=_LIKELY,
    )


def _deviating(joined: Joined, standing: Standing, tangled: set[int]) -> list[Deviation]:
    traces = sorted(tangled)
    step = max(standing.waiting[trace].step for trace in traces)
    own = [one for trace in traces if (one := deviation_of(joined, trace, standing.waiting[trace].step)) is not None]
    if own:
        return own
    alike = majority(joined, [trace for trace in traces if standing.waiting[trace].step == step], step)
    if alike is None:
        return []
    return [one for trace in traces if (one := deviation_of(joined, trace, step, alike)) is not None]


def _cycle(standing: Standing, tangled: set[int]) -> list[int]:
    """Ranks each of which waits for the next, and the last for the first."""
    path: list[int] = []
    place: dict[int, int] = {}
    trace = min(tangled)
    while trace not in place:
        place[trace] = len(path)
        path.append(trace)
        following = [other for other in standing.missing[standing.waiting[trace].key] if other in tangled]
        if not following:
            return path
        trace = min(following)
    return path[place[trace] :]


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


def _operation(joined: Joined, one: Waiting) -> str:
    group = joined.groups[one.group]
    if one.place is None:
        return f"{one.operation} #{one.number} of group {group.name}"
    preposition = "to" if one.operation == "send" else "from"
    return f"{one.operation} #{one.number} {preposition} rank {group.ranks[one.place]} of group {group.name}"


def _ranks(joined: Joined, traces: Iterable[int], one: str = "waits for it", several: str = "wait for it") -> str:
    ranks = sorted(joined.traces[trace].rank for trace in traces)
    if len(ranks) == 1:
        return f"rank {ranks[0]} {one}"
    shown = ", ".join(map(str, ranks[:_MOST_NAMED]))
    rest = f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
    return f"ranks {shown}{rest} {several}"
