"""What ``evermesh snapshot plan`` finds out, as one value."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from evermesh.fault.snapshot.coding import Code
from evermesh.fault.snapshot.stripes import StripesImpossible
from evermesh.fault.snapshot.stripes.interval import Interval, Rates, best_interval, daly_s, interval, young_s
from evermesh.fault.snapshot.stripes.placement import KINDS, Candidate, candidates, plan_stripes
from evermesh.fault.snapshot.stripes.survival import domains_survival, replicated, replicated_within, striped
from evermesh.parallelism.topology import Topology

_DAY_S = 86_400.0
_FEW_SECONDS = 1000.0


@dataclass(frozen=True, slots=True)
class FailureRates:
    """Measured costs, and how often a node fails. Seconds, but for the last."""

    step_s: float
    stall_s: float
    protect_s: float
    restart_s: float
    per_thousand_days: float
    """Failures of one node in 1000 days."""


@dataclass(frozen=True, slots=True)
class IntervalFound:
    """How often to take a snapshot."""

    failure_every_s: float
    best: Interval
    every_step: Interval
    young_s: float
    daly_s: float

    @property
    def lines(self) -> list[str]:
        """For people."""
        best, most = self.best, self.every_step
        lines = [
            f"a failure every {_time(self.failure_every_s)}; best: a snapshot every {best.steps} steps, which loses "
            f"{best.lost_share:.2%} of the time ({best.stall_share:.2%} to stalls), and {_time(best.lost_work_s)} of work "
            "per failure"
        ]
        if best.steps > 1:
            lines.append(
                f"every {most.steps} steps, as often as can be: {most.lost_share:.2%} of the time; by formula: Young "
                f"{_time(self.young_s)}, Daly {_time(self.daly_s)} between snapshots"
            )
        return lines


@dataclass(frozen=True, slots=True)
class Copies:
    """What nodes hold alike, because data-parallel ranks do."""

    nodes: int
    """That hold the same, spread evenly over the stripes."""
    share: float = 1.0
    """Of the state of a node, that which so many hold; of the rest it is the only one."""


@dataclass(frozen=True, slots=True)
class SnapshotPlan:
    """Stripes of a number of nodes, and the odds."""

    nodes: int
    stripes: dict[str, int]
    """Number of stripes by code."""
    coded: float
    """Share of the state of a node that is coded, mean over nodes; of the rest there are copies in its stripe."""
    memory: float
    """Parity bytes per byte of the state of a node, mean over nodes."""
    guarantees: list[str]
    warnings: list[str]
    losses: int
    schemes: list[tuple[str, float, list[float]]]
    """Name, extra memory, and the probability to recover from 1, 2, ... lost nodes: these stripes first, then copies."""
    domains: dict[str, list[float]]
    """Of lost racks (and so on): the probability to recover from 1, 2, ... of them."""
    interval: IntervalFound | None


def read_nodes(topology: Path | None, number: int, per_rack: int | None) -> list[Candidate]:
    """The nodes of a cluster in a file, or ``number`` nodes in racks of ``per_rack``.

    Raises:
        StripesImpossible: the file is no topology.
    """
    if topology is None:
        racks = [{"rack": f"rack{at // per_rack}"} if per_rack else {} for at in range(number)]
        return [Candidate(f"node{at}", rack) for at, rack in enumerate(racks)]
    try:
        return candidates(Topology.model_validate_json(topology.read_text()))
    except (ValidationError, UnicodeDecodeError) as error:
        raise StripesImpossible(f"{topology} is no topology: {error}") from error


def plan_snapshots(
    nodes: Sequence[Candidate],
    code: str,
    losses: int,
    must_survive: Iterable[str],
    rates: FailureRates | None,
    copies: Copies | None = None,
) -> SnapshotPlan:
    """All that can be said before anything runs. Without ``copies`` every node holds what no other does.

    Raises:
        StripesImpossible, CodeImpossible: as :func:`plan_stripes`; or there is no such kind of domain.
    """
    unknown = set(must_survive) - set(KINDS)
    if unknown:
        raise StripesImpossible(
            f"no kind of failure domain: {', '.join(sorted(unknown))}. There are {', '.join(KINDS)}."
        )
    plan = plan_stripes(nodes, "auto" if code == "auto" else Code.parse(code), must_survive)
    sizes = [len(stripe.nodes) for stripe in plan.stripes]
    parity = plan.stripes[0].code.parity
    ours = striped(sizes, parity, losses)
    found = [ours, replicated_within(len(nodes), ours.memory, losses)]
    found += [replicated(len(nodes), copies, losses) for copies in (2, 3) if len(nodes) >= copies]
    coded = sum(size * _coded(size, parity, len(nodes), copies) for size in sizes) / len(nodes)
    schemes = [
        (scheme.name, scheme.memory * coded, [scheme.survival(f + 1) for f in range(losses)]) for scheme in found
    ]
    domains = {
        guarantee.kind: [
            domains_survival(plan, nodes, guarantee.kind, f + 1).value for f in range(min(losses, guarantee.domains))
        ]
        for guarantee in plan.guarantees
    }
    return SnapshotPlan(
        len(nodes),
        {str(key): value for key, value in Counter(stripe.code for stripe in plan.stripes).items()},
        coded,
        ours.memory * coded,
        [str(guarantee) for guarantee in plan.guarantees],
        plan.warnings,
        losses,
        [(f"stripes {schemes[0][0]}", *schemes[0][1:]), *schemes[1:]],
        domains,
        _interval(rates, len(nodes)) if rates else None,
    )


def _coded(size: int, parity: int, nodes: int, copies: Copies | None) -> float:
    """Share of the state of a member that is coded: not what more members hold than may be lost, and what fewer do once."""
    if copies is None:
        return 1.0
    holders = max(1, size * copies.nodes // nodes)
    return 1 - copies.share + (copies.share / holders if holders <= parity else 0.0)


def _interval(given: FailureRates, nodes: int) -> IntervalFound:
    failure_every_s = 1000 * _DAY_S / (given.per_thousand_days * nodes)
    rates = Rates(given.step_s, given.stall_s, given.protect_s, given.restart_s, failure_every_s)
    hidden = best_interval(rates._replace(stall_s=0.0)).steps  # without a stall as often as can be is best
    return IntervalFound(failure_every_s, best_interval(rates), interval(rates, hidden), young_s(rates), daly_s(rates))


def _time(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds < _FEW_SECONDS else f"{seconds / 3600:,.1f} h"
