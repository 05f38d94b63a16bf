"""What each kind of evidence says about a node: how often the node is at fault, for how long it counts, and what else it is
independent of.

Precisions are priors, not measurements: how often a machine is at fault where the observation itself is right. Lateness has
the lowest: of the jobs with stragglers in "Understanding Stragglers in Large Model Training Using What-if Analysis" (OSDI
2025) 1.7 % have them from bad machines; our detectors leave out what a plan or a stage explains, hence more than that.
"""

from dataclasses import dataclass
from typing import Literal

from evermesh.fault.detectors import kinds

HOUR_S, DAY_S = 3600.0, 86400.0
PROCESS_DIED = "process died"
"""A rank was killed by a signal, or is gone without a word."""
RANK_FROZE = "rank froze"
NODE_LOST = "node lost"
KEEPER_LOST = "keeper lost"
HEALTH_WARN, HEALTH_BAD = "health warn", "health bad"
PREFLIGHT_FAILED = "preflight failed"

Source = Literal["lateness", "network", "hang", "crash", "health", "corruption", "program"]
"""Ways to learn of a node that do not follow from each other."""
MOST: dict[Source, float] = {
    "lateness": 0.30,
    "network": 0.50,
    "hang": 0.80,
    "crash": 0.90,
    "health": 0.95,
    "corruption": 0.95,
    "program": 0.0,
}
"""The most that any number of observations of one source says: they may all have one innocent cause."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """Of one kind."""

    source: Source
    precision: float
    """Probability that the node is at fault if the observation is right."""
    half_life_s: float
    """After which an observation counts half."""
    is_failure: bool = False
    """It ended an attempt, and would again."""
    spoils: bool = False
    """What the node computes cannot be trusted."""


MEANINGS: dict[str, Meaning] = {
    kinds.SLOW_RANK: Meaning("lateness", 0.15, HOUR_S),
    kinds.GRADUAL: Meaning("lateness", 0.15, HOUR_S),
    kinds.SLOW_JOB: Meaning("program", 0.0, HOUR_S),
    kinds.SLOW_NODE: Meaning("network", 0.30, 6 * HOUR_S),
    kinds.SLOW_SOURCE: Meaning("network", 0.25, 6 * HOUR_S),
    kinds.SLOW_DESTINATION: Meaning("network", 0.25, 6 * HOUR_S),
    kinds.SLOW_LINK: Meaning("network", 0.25, 6 * HOUR_S),
    kinds.SLOW_GROUP: Meaning("program", 0.0, HOUR_S),
    kinds.HANG: Meaning("hang", 0.30, DAY_S, is_failure=True),
    kinds.COMMUNICATION_HANG: Meaning("hang", 0.20, DAY_S, is_failure=True),
    kinds.DEADLOCK: Meaning("program", 0.0, HOUR_S),
    kinds.MISMATCH: Meaning("program", 0.0, HOUR_S),
    kinds.SIZE_MISMATCH: Meaning("program", 0.0, HOUR_S),
    kinds.DTYPE_MISMATCH: Meaning("program", 0.0, HOUR_S),
    kinds.SKIPPED: Meaning("program", 0.0, HOUR_S),
    kinds.EXTRA: Meaning("program", 0.0, HOUR_S),
    PROCESS_DIED: Meaning("crash", 0.25, 7 * DAY_S, is_failure=True),
    RANK_FROZE: Meaning("hang", 0.30, 7 * DAY_S, is_failure=True),
    NODE_LOST: Meaning("crash", 0.40, 7 * DAY_S, is_failure=True),
    KEEPER_LOST: Meaning("crash", 0.10, DAY_S),
    HEALTH_WARN: Meaning("health", 0.10, DAY_S),
    HEALTH_BAD: Meaning("health", 0.80, DAY_S),
    PREFLIGHT_FAILED: Meaning("health", 0.90, 7 * DAY_S),
    "silent corruption": Meaning("corruption", 0.90, 30 * DAY_S, spoils=True),
    "replicas differ": Meaning("corruption", 0.70, 30 * DAY_S, spoils=True),
}
UNKNOWN = Meaning("program", 0.0, HOUR_S)
"""Kinds that nobody has judged say nothing about a node."""


def meaning_of(kind: str) -> Meaning:
    """What evidence of a kind says."""
    return MEANINGS.get(kind, UNKNOWN)
