"""What speaks against nodes, from what detectors, health checks and ranks tell: pure functions."""

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from evermesh.fault.events import Finding
from evermesh.fault.isolation import meanings
from evermesh.launcher.controller.life import Life
from evermesh.launcher.policy import Failure, root_cause

_LEAST_CERTAIN = 0.4
"""A process that ends itself by a signal is a bug of its program more often than one that was killed."""
_OWN_SIGNALS = (signal.SIGABRT, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class HealthVerdict(Protocol):
    """What a health check says of a node."""

    @property
    def check(self) -> str:
        """Its name."""

    @property
    def state(self) -> str:
        """``ok``, ``warn`` or ``bad``."""

    @property
    def reason(self) -> str:
        """In a sentence."""


@dataclass(frozen=True, slots=True)
class Against:
    """One observation against one node."""

    node: str
    kind: str
    weight: float
    confidence: float
    text: str


def of_findings(findings: Sequence[Finding], life: Life | None, names: Mapping[str, str]) -> Iterator[Against]:
    """Findings with the nodes that they blame, each with its share; those that blame nobody say nothing.

    ``names`` has the nodes of the job by all that detectors may call them.
    """
    for finding in findings:
        blamed = _blamed(finding, life, names)
        for node in blamed:
            yield Against(node, finding.kind, 1 / len(blamed), finding.confidence, finding.text)


def of_verdicts(node: str, verdicts: Sequence[HealthVerdict]) -> Iterator[Against]:
    """What health checks say against a node."""
    kinds = {"warn": meanings.HEALTH_WARN, "bad": meanings.HEALTH_BAD}
    for verdict in verdicts:
        if verdict.state in kinds:
            yield Against(node, kinds[verdict.state], 1.0, 1.0, f"{verdict.check}: {verdict.reason}")


def of_failure(life: Life) -> Iterator[Against]:
    """What the end of a failed attempt says: of lost nodes, else of that of the rank that died or froze first.

    Where ranks of several nodes died the blame is shared: one cause ended them all. What a rank raised blames its program.
    """
    for node in sorted(life.lost):
        yield Against(node, meanings.NODE_LOST, 1 / len(life.lost), 1.0, f"{node} was lost")
    if life.lost or not life.failures:
        return
    first = root_cause(tuple(life.failures.values()))
    if first.cause not in ("died", "froze") or first.peer_lost:
        return
    same = {
        _node_of(life, one.rank) for one in life.failures.values() if one.cause == first.cause and not one.peer_lost
    }
    node = _node_of(life, first.rank)
    kind = meanings.PROCESS_DIED if first.cause == "died" else meanings.RANK_FROZE
    yield Against(node, kind, 1 / len(same), _certainty(first), f"rank {first.rank} {first.how.splitlines()[0]}")


def slowdown_of(finding: Finding) -> float | None:
    """How many times as long as others a rank takes, if the finding tells."""
    ratio = finding.evidence.get("ratio")
    if meanings.meaning_of(finding.kind).source != "lateness" or not isinstance(ratio, int | float):
        return None
    return float(ratio) if ratio > 1 else None


def _certainty(failure: Failure) -> float:
    if failure.cause != "died" or failure.code is None:
        return 1.0
    return _LEAST_CERTAIN if failure.code >= 0 or -failure.code in _OWN_SIGNALS else 1.0


def _blamed(finding: Finding, life: Life | None, names: Mapping[str, str]) -> list[str]:
    """Nodes of the job, each once."""
    if finding.node is not None and finding.node in names:
        return [names[finding.node]]
    ranks = finding.link if finding.link is not None else () if finding.rank is None else (finding.rank,)
    if life is None or any(rank >= life.world_size for rank in ranks):
        return []
    return sorted({_node_of(life, rank) for rank in ranks})


def _node_of(life: Life, rank: int) -> str:
    return life.nodes[rank // life.ranks_per_node]
