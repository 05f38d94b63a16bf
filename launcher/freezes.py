"""Whether a rank is frozen: a pure function of what the agents see of all ranks from outside.

A rank that is *stopped* shows it in its process. One that *hangs* does not: but then nobody computes, in the middle of
a step, for far longer than any step took. Whoever waits for data, compiles, evaluates, saves or starts may take its time.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from evermesh.fault.detectors.kinds import EXPLAINING
from evermesh.fault.events import Finding
from evermesh.launcher.config import HangConfig
from evermesh.launcher.messages import RankBeat

_IN_A_STEP = frozenset(("train", "probe", "sum"))
"""Points whose length the steps before tell."""
_LIKELY = 0.7
_ELSEWHERE = 3.0
"""So many times the limit for a rank that waits outside a step, on a node that nobody reaches."""


class Frozen(NamedTuple):
    """What was found."""

    rank: int
    how: str
    """In words, on one line."""
    others: tuple[int, ...] = ()
    """Ranks of which nobody knows whether it is one of these: at the other end of a link that is cut."""


def frozen(
    beats: Iterable[RankBeat],
    world_size: int,
    config: HangConfig,
    findings: Sequence[Finding] = (),
    *,
    sees_work: bool,
) -> Frozen | None:
    """The rank that is frozen, if one is.

    Args:
        beats: the newest of every rank that runs.
        world_size: ranks of the attempt.
        findings: what the records of the ranks say, the surest first; none where they are not recorded.
        sees_work: whether a rank that works uses its processor: one that waits for a GPU need not.
    """
    ranks = sorted(beats, key=lambda beat: beat.rank)
    stopped = max(ranks, key=lambda beat: beat.stopped_s, default=None)
    if stopped is not None and stopped.stopped_s >= config.stopped_s:
        return Frozen(stopped.rank, f"has been stopped for {stopped.stopped_s:.1f} s (SIGSTOP)")
    if not sees_work or len(ranks) < world_size:
        return None
    if any(beat.point not in _IN_A_STEP or not beat.step for beat in ranks):
        return None
    limit_s = max(config.idle_s, config.steps * max(beat.longest_s for beat in ranks))
    idle_s = min(beat.idle_s for beat in ranks)
    return _hung(ranks, idle_s, limit_s, findings) if idle_s >= limit_s else None


def left_alone(beats: Iterable[RankBeat], config: HangConfig, missing_s: float) -> Frozen | None:
    """The rank of a node without a controller for ``missing_s`` that waits for others from whom the node is cut off.

    In the middle of a step it is frozen as any other; elsewhere, where a rank may take its time, it is given more: the
    plan of a batch, a vote on a checkpoint come from others too.

    Args:
        beats: the newest of every rank of the node.
    """
    ranks = sorted(beats, key=lambda beat: beat.rank)
    if missing_s < config.idle_s or not ranks:
        return None
    found = frozen(ranks, len(ranks), config, sees_work=True)
    if found is not None:
        return found
    limit_s = _ELSEWHERE * max(config.idle_s, config.steps * max(beat.longest_s for beat in ranks))
    idle_s, rank = min(beat.idle_s for beat in ranks), ranks[0]
    if missing_s < limit_s or idle_s < limit_s or not rank.step:
        return None
    return Frozen(rank.rank, f"has waited at {rank.point!r} for {idle_s:.1f} s (limit {limit_s:.1f} s)")


def _hung(ranks: Sequence[RankBeat], idle_s: float, limit_s: float, findings: Sequence[Finding]) -> Frozen:
    """Of ranks that wait for each other: whom the records name, else one that has not come where most wait."""
    step = min(beat.step for beat in ranks) + 1
    silent = f"no rank has computed anything for {idle_s:.1f} s (limit {limit_s:.1f} s)"
    explaining = [finding for finding in findings if _explains(finding)]
    for known in explaining:
        if known.rank is not None:
            return Frozen(known.rank, f"hangs in step {step}: {silent}; {known.text}")
    for known in explaining:
        if known.link is not None:
            one, other = known.link
            return Frozen(one, f"hangs in step {step}, as does rank {other}: {silent}; {known.text}", (other,))
    behind = [beat for beat in ranks if beat.step + 1 == step]
    missing = [beat for beat in behind if beat.point != "sum"] or behind
    others = f", as may {_named(missing[1:])}" if len(missing) > 1 else ""
    return Frozen(missing[0].rank, f"hangs in step {step}{others}: {silent}")


def _explains(finding: Finding) -> bool:
    """Whether it says why nobody goes on, and surely enough."""
    return finding.confidence >= _LIKELY and finding.kind in EXPLAINING


def _named(ranks: Sequence[RankBeat], most: int = 8) -> str:
    names = ", ".join(str(beat.rank) for beat in ranks[:most])
    return f"rank{'s' * (len(ranks) > 1)} {names}{', ...' * (len(ranks) > most)}"
