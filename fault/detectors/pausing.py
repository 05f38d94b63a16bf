"""Ranks that pause in some steps, again and again, as for a collection of garbage."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from evermesh.fault.detectors.comparing import Compared
from evermesh.fault.detectors.joining import Survey
from evermesh.fault.detectors.spreads import FEW
from evermesh.fault.detectors.standing import median_step_s

LEAST_SHARE = 0.05
"""Of the step: what costs less is no finding."""
_PAUSE = 1.5
_LEAST_CHANCE = 1e-4
"""That others are hit as often by chance."""


@dataclass(frozen=True, slots=True)
class Slow:
    """A rank that is slower than its peers."""

    trace: int
    cause: str
    """``computes``, ``input`` or ``pauses``."""
    ratio: float
    excess_s: float
    share: float
    """Of the step."""
    mean_share: float
    """Of all steps; less, if it is slow in some of them."""
    score: float
    """How many spreads of its peers it is away from them."""
    since: int
    """Step."""
    peers: int


def pausing(survey: Survey, compared: Compared, *, is_noisy: bool) -> Iterator[Slow]:
    """Ranks that take far longer in some steps, again and again, while their peers never do, or, where processors are not
    enough for all (``is_noisy``) or there are few peers, so rarely that chance does not explain who is hit. What a rank
    waited for a processor around a step explains a pause of that length: other processes hit one rank for a while."""
    step_s, few = median_step_s(survey), compared.peers < FEW
    if step_s <= 0:
        return
    queued_s = survey.queued_s - np.where(
        few[:, None], 0.0, np.median(survey.queued_s, axis=0)
    )  # many show what all have
    with np.errstate(invalid="ignore"):
        paused = (compared.ratio > _PAUSE) & (compared.excess_s > np.maximum(2 * LEAST_SHARE * step_s, queued_s))
    if not paused.any():
        return
    trace = int(np.argmax(np.where(paused, compared.excess_s, 0).sum(axis=1)))
    with np.errstate(invalid="ignore"):  # what hits others may be of another kind, and shorter
        paused &= compared.excess_s > np.median(compared.excess_s[trace][paused[trace]]) / 2
    counts = paused.sum(axis=1)
    known = int((~np.isnan(compared.ratio[trace])).sum())
    alike = int((compared.peers > 0).sum())
    is_alone = counts[trace] >= 3 and counts.sum() == counts[trace] and compared.peers[trace] >= FEW and not is_noisy
    is_chance = _chance(int(counts[trace]), int(counts.sum()), alike) > _LEAST_CHANCE
    steps = np.flatnonzero(paused[trace])
    since = int((~np.isnan(compared.ratio[trace][steps[0] :])).sum())
    if counts[trace] * 2 > since or (is_chance and not is_alone):  # in most steps from one on: it is slow since then
        return
    excess_s = float(np.median(compared.excess_s[trace][steps]))
    ratio = float(np.median(compared.ratio[trace][steps]))
    yield Slow(
        trace,
        "pauses",
        ratio,
        excess_s,
        excess_s / step_s,
        excess_s / step_s * len(steps) / known,
        float(counts[trace]),
        survey.first_step + int(steps[0]),
        int(compared.peers[trace]),
    )


def _chance(hits: int, total: int, ranks: int) -> float:
    """That of ``total`` pauses, each of any of ``ranks``, one rank has so many."""
    if ranks < 2:
        return 1.0
    tail = sum(math.comb(total, k) * (ranks - 1) ** (total - k) for k in range(hits, total + 1))
    return min(1.0, ranks * tail / ranks**total)
