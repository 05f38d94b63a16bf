"""The policy in clusters that are simulated: it costs less than never acting, and less than acting on everything."""

import random
from dataclasses import dataclass, field

from evermesh.fault.cluster.identity import NodeIdentity
from evermesh.fault.cluster.records import Evidence
from evermesh.fault.detectors import kinds
from evermesh.fault.isolation import meanings
from evermesh.fault.isolation.config import IsolationConfig
from evermesh.fault.isolation.costs import JobCosts, Performance
from evermesh.fault.isolation.deciding import Observed, Spent, decide

HOUR_S = 3600.0
HOURS, NODES, SPARES, STEP_S = 48, 24, 2, 600.0
REGROUP_S, RESTART_S, LOST_S, REPAIR_S, WASTED_S = 20.0, 60.0, 60.0, 4 * HOUR_S, 600.0
SEEDS = range(8)
HOWS = ("policy", "never", "always")
BAD = (0, 1, 0, 3)
"""Nodes that are bad, by seed."""


@dataclass
class Machine:
    """A node as it really is."""

    fails_per_h: float = 0.004
    warns_per_h: float = 0.01
    slowdown: float = 1.0
    looks_slow_per_h: float = 0.003
    """Lateness of which it is innocent."""
    evidence: list[Evidence] = field(default_factory=list)
    speed: float = 1.0
    """That plans count with."""
    degraded_since_s: float | None = None

    @property
    def is_bad(self) -> bool:
        return self.fails_per_h > 0.1 or self.slowdown > 1


def machines(seed: int, bad: int) -> tuple[random.Random, list[Machine]]:
    """Nodes and spares, of which some of those that begin are bad, each in its own way."""
    chance = random.Random(seed)
    found = [Machine() for _ in range(NODES + SPARES)]
    for number in chance.sample(range(NODES), bad):
        kind = chance.choice(("fails", "slow", "fails and warns"))
        found[number] = Machine(
            fails_per_h=0.5 if "fails" in kind else 0.004,
            warns_per_h=0.5 if "warns" in kind else 0.01,
            slowdown=1.25 if kind == "slow" else 1.0,
        )
    return chance, found


def lost_s(seed: int, how: str, bad: int) -> float:
    """Seconds of the job that are lost in two days, in steps of ten minutes."""
    chance, found = machines(seed, bad)
    used, spare, away = found[:NODES], found[NODES:], list[tuple[float, Machine]]()
    lost, times_s, config = 0.0, list[float](), IsolationConfig(mode="act")
    for step in range(int(HOURS * HOUR_S / STEP_S)):
        now_s = STEP_S * step
        for machine in used:
            lost += _happens(machine, chance, now_s)
        shares = [machine.speed for machine in used]
        total = sum(shares)
        slowest = max(
            share / total * len(used) * (machine.slowdown) for share, machine in zip(shares, used, strict=True)
        )
        lost += STEP_S * (slowest - 1.0) + STEP_S * (NODES - len(used)) / NODES
        spare += [machine for back_s, machine in away if now_s >= back_s]
        away = [(back_s, machine) for back_s, machine in away if now_s < back_s]
        while spare and len(used) < NODES:
            used.append(spare.pop())
        if how != "never":
            for machine, action in _decided(how, used, len(spare), times_s, config, now_s):
                if action == "watch":
                    machine.speed, machine.degraded_since_s = 1.0, None
                elif action == "degrade":
                    machine.speed, machine.degraded_since_s = (
                        1 / machine.slowdown if machine.slowdown > 1 else 0.8,
                        now_s,
                    )
                elif action in ("drain", "replace"):
                    lost += REGROUP_S + (0.0 if machine.is_bad else WASTED_S)
                    used.remove(machine)
                    times_s.append(now_s)
                    away.append((now_s + REPAIR_S, Machine()))
    return lost


def _happens(machine: Machine, chance: random.Random, now_s: float) -> float:
    """What this node does in a step, and what it costs."""

    def strikes(per_h: float) -> bool:
        return chance.random() < per_h * STEP_S / HOUR_S

    def note(kind: str, confidence: float = 1.0) -> None:
        machine.evidence.append(Evidence(time_s=now_s, node=NodeIdentity(name="n"), kind=kind, confidence=confidence))

    if strikes(machine.warns_per_h):
        note(meanings.HEALTH_WARN)
    if strikes(6.0 if machine.slowdown > 1 else machine.looks_slow_per_h):
        note(kinds.SLOW_RANK, 0.9)
    if strikes(machine.fails_per_h):
        note(meanings.PROCESS_DIED)
        return RESTART_S + LOST_S
    return 0.0


def _decided(
    how: str, used: list[Machine], spares: int, times_s: list[float], config: IsolationConfig, now_s: float
) -> list[tuple[Machine, str]]:
    if how == "always":  # whoever anything is said against
        return [(one, "drain") for one in used if one.evidence and now_s == one.evidence[-1].time_s]
    job = JobCosts(REGROUP_S, RESTART_S, LOST_S, len(used), spares, 1, HOURS * HOUR_S - now_s)
    late = {id(one): any(e.kind == kinds.SLOW_RANK and now_s - e.time_s < 900 for e in one.evidence) for one in used}
    observed = [
        Observed(
            str(number),
            tuple(one.evidence),
            Performance(
                slowdown=max(one.slowdown, 1.25) if late[id(one)] else 1.0,
                degraded_s=None if one.degraded_since_s is None else now_s - one.degraded_since_s,
            ),
        )
        for number, one in enumerate(used)
        if one.evidence
    ]
    spent = Spent(tuple(times_s), sum(now_s - time_s < REPAIR_S for time_s in times_s), NODES + SPARES)
    choices = decide(observed, job, config, spent, now_s)
    return [(used[int(choice.node)], choice.action) for choice in choices]


def test_over_many_seeds_the_policy_costs_less_than_never_acting_and_than_always() -> None:
    """Half of the clusters are healthy, the others have one or three bad nodes."""
    mean = {how: sum(lost_s(seed, how, BAD[seed % len(BAD)]) for seed in SEEDS) / len(SEEDS) for how in HOWS}
    assert mean["policy"] <= 0.8 * mean["never"], mean
    assert mean["policy"] <= 0.8 * mean["always"], mean


def test_in_a_healthy_cluster_little_is_lost_by_it() -> None:
    mean = {how: sum(lost_s(seed, how, 0) for seed in SEEDS) / len(SEEDS) for how in HOWS}
    assert mean["policy"] <= mean["never"] + 600.0, mean
    assert mean["policy"] <= 0.2 * mean["always"], mean
