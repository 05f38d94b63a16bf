"""What became of nodes that the job gave less to do or left, though no attempt ended for it: from what told of them to the
first step without them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from evermesh.fault.events import Event
from evermesh.launcher.controller.journal import Entry
from evermesh.launcher.controller.status import ENDED
from evermesh.launcher.report.accounting import Step
from evermesh.launcher.report.incidents import BEFORE, BEFORE_S, Incident, Moment, placing, throughput

_TOLD = (*BEFORE, "finding over", "speeds", "regrouping", "stopped", "snapshot rebuilt", "resumed")
_FOREVER = float("inf")


@dataclass(slots=True)
class _Episode:
    """Of one node."""

    node: str
    decisions: list[Event] = field(default_factory=list)
    """Those that were carried out."""

    @property
    def begin_s(self) -> float:
        return self.decisions[0].time_s

    @property
    def left_s(self) -> float | None:
        """When the job was to leave the node; None: it was not."""
        last = self.decisions[-1]
        return last.time_s if last.fields["action"] == "drain" else None

    @property
    def is_over(self) -> bool:
        return self.decisions[-1].fields["action"] != "degrade"


def isolated_nodes(entries: Sequence[Entry], events: Sequence[Event], steps: Sequence[Step]) -> tuple[Incident, ...]:
    """The story of every node whose share was degraded, or that was drained, in their order."""
    return tuple(_incident(episode, entries, events, steps) for episode in _episodes(events))


def _episodes(events: Sequence[Event]) -> list[_Episode]:
    found: list[_Episode] = []
    under_way: dict[str, _Episode] = {}
    for event in events:
        if event.kind != "isolation" or not event.fields.get("carried_out"):
            continue
        node, action = str(event.fields["node"]), event.fields["action"]
        if node not in under_way:
            if action not in ("degrade", "drain"):
                continue
            found.append(_Episode(node))
            under_way[node] = found[-1]
        under_way[node].decisions.append(event)
        if under_way[node].is_over:
            del under_way[node]
    return found


def _incident(episode: _Episode, entries: Sequence[Entry], events: Sequence[Event], steps: Sequence[Step]) -> Incident:
    phases, again_s, end = _leaving(episode, entries)
    until_s = (_FOREVER if end is None else end.time_s) if episode.left_s is not None else _end_s(episode)
    before = [event for event in _before(episode, events) if event.kind in ("injected", "finding", "health")]
    story = sorted(_story(episode, until_s, entries, events), key=lambda moment: moment.after_s)
    last_s = until_s if episode.left_s is None else episode.left_s
    lost = sum(
        step.is_lost for step in steps if episode.left_s is not None and last_s <= step.report.ended_s <= until_s
    )
    resumed = next((event for event in events if event.kind == "resumed" and last_s <= event.time_s <= until_s), None)
    return Incident(
        kind="isolation",
        time_s=episode.begin_s,
        attempt=max((entry.generation for entry in entries if entry.time_s <= episode.begin_s), default=0),
        node=episode.node,
        cause=_cause(episode, before),
        until_training_s=again_s,
        phases=phases,
        steps_lost=lost,
        source=str(resumed.fields["source"]) if resumed is not None and "source" in resumed.fields else None,
        outcome=_outcome(episode, end),
        throughput=throughput(steps, _spans(episode, before, last_s, until_s)),
        story=tuple(story),
    )


def _leaving(
    episode: _Episode, entries: Sequence[Entry]
) -> tuple[tuple[tuple[str, float], ...], float | None, Entry | None]:
    """States from the drain to the next step with their seconds, the seconds until that, and what ended it."""
    left_s, phases = episode.left_s, list[tuple[str, float]]()
    moves = [entry for entry in entries if entry.kind == "transition" and left_s is not None and entry.time_s >= left_s]
    for entry, after in zip(moves, [*moves[1:], None], strict=False):  # of no move none is the last
        state = str(entry.fields["to"])
        if state == "training" or state in ENDED:
            assert left_s is not None
            return tuple(phases), entry.time_s - left_s if state == "training" else None, entry
        if after is not None:
            phases.append((state, after.time_s - entry.time_s))
    return tuple(phases), None, None


def _end_s(episode: _Episode) -> float:
    return episode.decisions[-1].time_s if episode.is_over else _FOREVER


def _before(episode: _Episode, events: Sequence[Event]) -> list[Event]:
    """What told of the node before the first decision."""
    begin_s = episode.begin_s
    return [
        event
        for event in events
        if begin_s - BEFORE_S <= event.time_s < begin_s and event.kind in BEFORE and _may_be_of(event, episode.node)
    ]


def _story(episode: _Episode, until_s: float, entries: Sequence[Entry], events: Sequence[Event]) -> Iterator[Moment]:
    begin_s, left_s = episode.begin_s, episode.left_s
    for event in _before(episode, events):
        yield Moment(after_s=event.time_s - begin_s, kind=event.kind, text=event.text)
    for event in events:
        is_told = event.kind in _TOLD and _may_be_of(event, episode.node)
        is_of_leaving = left_s is not None and event.time_s >= left_s
        is_meant = _node_of(event) is not None or event.kind in ("speeds", "injected") or is_of_leaving
        if begin_s <= event.time_s <= until_s and is_told and is_meant:
            yield Moment(after_s=event.time_s - begin_s, kind=event.kind, text=event.text)
    if left_s is not None:
        for moment in placing(entries, left_s, until_s):
            yield moment.model_copy(update={"after_s": moment.after_s + left_s - begin_s})


def _spans(episode: _Episode, before: Sequence[Event], last_s: float, until_s: float) -> list[tuple[str, float, float]]:
    told_s = before[0].time_s if before else episode.begin_s
    found = [("before", 0.0, told_s), ("found", told_s, episode.begin_s)]
    if episode.decisions[0].fields["action"] == "degrade":
        found.append(("with less work for it", episode.begin_s, last_s))
    return [*found, ("after", until_s, _FOREVER)] if until_s < _FOREVER else found


def _cause(episode: _Episode, before: Sequence[Event]) -> str:
    first = episode.decisions[0]
    finding = next((event.text for event in reversed(before) if event.kind in ("finding", "health")), "")
    by = first.fields.get("by")
    return (
        f"{episode.node}: {finding or first.fields.get('because') or first.text}{f' (drained by {by})' if by else ''}"
    )


def _outcome(episode: _Episode, end: Entry | None) -> str:
    last = episode.decisions[-1].fields["action"]
    if last == "degrade":
        return "its ranks have less to do"
    if last != "drain":
        return "replaced at once" if last == "replace" else "its ranks have their whole share again"
    had = "given less to do, then drained" if len(episode.decisions) > 1 else "drained"
    if end is None:
        return f"{had}, not left yet"
    return (
        f"{had}; trains again without it"
        if end.fields["to"] == "training"
        else f"{had}; {end.fields['to']}: {end.reason}"
    )


def _may_be_of(event: Event, node: str) -> bool:
    return _node_of(event) in (None, node)


def _node_of(event: Event) -> str | None:
    """Whom it is about; None: it does not say."""
    finding = event.fields.get("finding")
    found = finding.get("node") if isinstance(finding, Mapping) else event.fields.get("node")
    return None if found is None else str(found)
