"""How probable it is that a node is at fault: a pure function of the evidence and the time.

Each observation leaves its doubt, (1 - precision x confidence x share of the blame), which fades with its age: after a
half-life its logarithm is half. Doubts of one source multiply, down to what that source can say at most; sources are
independent, so their doubts multiply too (noisy-or). More evidence never says less, none says nothing, all is forgotten.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evermesh.fault.cluster.records import Evidence
from evermesh.fault.isolation.meanings import HOUR_S, MOST, Meaning, Source, meaning_of

_TELLING = 0.05
"""Probability from which on a source counts as another one that speaks against a node."""
_WINDOWS_H = (1.0, 6.0, 24.0, 168.0)


@dataclass(frozen=True, slots=True)
class Suspicion:
    """What speaks against one node now."""

    by_source: dict[Source, float]
    """Probability that the node is at fault, by what each source alone says."""
    spoiled: float = 0.0
    """That what it computes cannot be trusted."""
    failures_per_h: float = 0.0
    """Attempts that it has ended, in the window in which that is most."""
    late_for_s: float = 0.0
    """From the first to the last time that it was late, within what still counts."""

    @property
    def probability(self) -> float:
        """That the node is at fault."""
        return 1.0 - math.prod(1.0 - found for found in self.by_source.values())

    @property
    def beside_lateness(self) -> float:
        """The same without what was late."""
        return 1.0 - math.prod(1.0 - found for source, found in self.by_source.items() if source != "lateness")

    @property
    def is_late(self) -> bool:
        """Whether lateness speaks against it."""
        return self.by_source.get("lateness", 0.0) >= _TELLING

    @property
    def has_other_source(self) -> bool:
        """Whether anything but lateness does."""
        return any(found >= _TELLING for source, found in self.by_source.items() if source != "lateness")

    def told(self) -> str:
        """The probability and where it comes from."""
        telling = sorted(self.by_source.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{source} {found:.2f}" for source, found in telling if found >= 0.005)
        return f"{self.probability:.2f} ({parts or 'nothing'})"


def suspicion_of(evidence: Sequence[Evidence], now_s: float) -> Suspicion:
    """What speaks against a node at a time; evidence of the future counts as new."""
    doubts: dict[Source, float] = {}
    spoiled = 0.0
    for one in evidence:
        meaning = meaning_of(one.kind)
        doubts[meaning.source] = doubts.get(meaning.source, 0.0) + _doubt(one, meaning, now_s)
        spoiled += _doubt(one, meaning, now_s) if meaning.spoils else 0.0
    by_source = {source: min(MOST[source], 1.0 - math.exp(doubt)) for source, doubt in doubts.items()}
    return Suspicion(
        by_source,
        min(MOST["corruption"], 1.0 - math.exp(spoiled)),
        _failures_per_h(evidence, now_s),
        _late_for_s(evidence, now_s),
    )


def _doubt(one: Evidence, meaning: Meaning, now_s: float) -> float:
    """The logarithm of the doubt that it leaves; 0: it says nothing."""
    age_s = max(0.0, now_s - one.time_s)
    says = meaning.precision * one.confidence * one.weight
    return math.log1p(-min(says, 0.999999)) * 0.5 ** (age_s / meaning.half_life_s)


def _failures_per_h(evidence: Sequence[Evidence], now_s: float) -> float:
    ages_h = [
        (max(0.0, now_s - one.time_s) / HOUR_S, one.confidence * one.weight)
        for one in evidence
        if meaning_of(one.kind).is_failure
    ]
    return max(sum(share for age_h, share in ages_h if age_h <= window_h) / window_h for window_h in _WINDOWS_H)


def _late_for_s(evidence: Sequence[Evidence], now_s: float) -> float:
    times_s = [
        one.time_s
        for one in evidence
        if (meaning := meaning_of(one.kind)).source == "lateness" and now_s - one.time_s < 2 * meaning.half_life_s
    ]
    return max(times_s) - min(times_s) if times_s else 0.0
