"""Messages whose other side has entered them and cannot go on: its process has ended, or is stopped."""

from collections.abc import Iterable, Iterator

from evermesh.fault.detectors import kinds
from evermesh.fault.detectors.context import Context
from evermesh.fault.detectors.joining import Joined, in_step
from evermesh.fault.detectors.sentences import is_gone, operation_of, ranks_that, state_of
from evermesh.fault.detectors.standing import Waiting
from evermesh.fault.events import Finding

_SURE = 0.99


def gone_partner(joined: Joined, context: Context, one: Waiting) -> int | None:
    """The trace of the other side, if it is gone; None: it is not, or it is no message."""
    if one.place is None or not 0 <= one.place < len(joined.members[one.group]):
        return None
    other = int(joined.members[one.group][one.place])
    return other if other >= 0 and is_gone(context, joined.traces[other].rank) else None


def of_gone_partners(joined: Joined, context: Context, waiting: Iterable[Waiting]) -> Iterator[Finding]:
    """One finding for each that others wait for."""
    longest: dict[int, Waiting] = {}
    for one in sorted(waiting, key=lambda one: -one.waited_s):
        other = gone_partner(joined, context, one)
        if other is not None:
            longest.setdefault(other, one)
    for other, one in longest.items():
        state = joined.traces[other]
        yield Finding(
            kind=kinds.HANG,
            rank=state.rank,
            node=joined.node(other),
            group=joined.groups[one.group].name,
            step=one.step,
            text=f"{joined.where(other)} has begun its side of {operation_of(joined, one)}{in_step(one.step)}"
            f"{state_of(context, state.rank, state.phase)[0]}; "
            f"{ranks_that(joined, [one.trace])} since {one.waited_s:.1f} s",
            evidence={"operation": one.operation, "number": one.number, "waited_s": round(one.waited_s, 3)},
            confidence=_SURE,
        )
