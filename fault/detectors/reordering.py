"""A rank that did the collectives of one step in another order than before, behind it, and than others like it.

Where no two ranks wait for each other, as in groups of two, the job trains on, and it may stop at the next size. Sequences
of jobs whose steps differ say nothing here: the steps before and behind have to be alike, on the rank and on its peers.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from evermesh.fault.detectors import kernels, kinds
from evermesh.fault.detectors.joining import Joined, Survey
from evermesh.fault.detectors.programs import name_of, sequence_of
from evermesh.fault.events import Finding

_LEAST_PEERS = 2
_MOST_READ = 4
"""Peers whose rings are read with that of a rank."""
_NEWEST = 8
"""Steps that rings still hold, as a rule."""
_LIKELY = 0.9


class Stray(NamedTuple):
    """A rank that did something else in one step; what, only its records say."""

    trace: int
    step: int
    peers: tuple[int, ...]
    """Traces that did the same as it in the step before, and went on so."""


def strays_of(survey: Survey) -> Iterator[Stray]:
    """The only ones of their like that left, in one step and with as many records, what they did before and behind it."""
    if survey.num_steps < 3:
        return
    count, signatures = survey.of_step[:, :, kernels.COUNT], survey.signatures
    whole = survey.is_whole()
    before, now, behind = signatures[:, :-2], signatures[:, 1:-1], signatures[:, 2:]
    is_known = whole[:, :-2] & whole[:, 1:-1] & whole[:, 2:]
    is_stray = is_known & (before == behind) & (now != before) & (count[:, :-2] == count[:, 1:-1])
    for at in np.flatnonzero(is_stray.any(axis=0)).tolist():
        known = np.flatnonzero(is_known[:, at])
        _, likes = np.unique(before[known, at], return_inverse=True)
        have_left = now[known, at] != before[known, at]
        is_alone = np.bincount(likes, have_left)[likes] == 1
        for place in np.flatnonzero(is_stray[known, at] & is_alone).tolist():
            peers = known[(likes == likes[place]) & ~have_left]
            if len(peers) >= _LEAST_PEERS:
                yield Stray(int(known[place]), survey.first_step + at + 1, tuple(peers.tolist()))


def to_be_read(survey: Survey) -> set[int]:
    """Traces whose rings say whether it was the order: those who strayed lately, and some of their peers."""
    newest = survey.first_step + survey.num_steps - _NEWEST
    found = [stray for stray in strays_of(survey) if stray.step >= newest]
    return {trace for stray in found for trace in (stray.trace, *stray.peers[:_MOST_READ])}


def find_reordered(joined: Joined, survey: Survey) -> Iterator[Finding]:
    """One finding for each of them whose records are the same, in another order."""
    for stray in strays_of(survey):
        usual, found = (sequence_of(joined, stray.trace, stray.step - back)[1] for back in (1, 0))
        if sorted(usual) != sorted(found) or usual == found:
            continue
        place = next(at for at, (one, other) in enumerate(zip(found, usual, strict=True)) if one != other)
        did, due = name_of(joined, stray.trace, found[place]), name_of(joined, stray.trace, usual[place])
        yield Finding(
            kind=kinds.REORDERED,
            rank=joined.traces[stray.trace].rank,
            node=joined.node(stray.trace),
            step=stray.step,
            text=f"{joined.where(stray.trace)} entered {did} in step {stray.step} where {due} was due: it did the same as in "
            f"the steps before and behind it, in another order, and {len(stray.peers)} ranks like it did not; nobody had "
            "to wait for it here",
            evidence={"did": did, "due": due, "peers": len(stray.peers)},
            confidence=_LIKELY,
        )
