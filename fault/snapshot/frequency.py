"""How often a run copies its state to memory: pure functions from what was measured, and seen to fail, to a choice."""

import math
from typing import NamedTuple

from evermesh.fault.snapshot.stripes.interval import Interval, Rates, best_interval, interval

_HIDES = 0.001
"""Copies that stop training for less than this part of the time cost nothing that could be measured."""
_CHANGES = 1.25
"""Another interval is worth a word when it is longer, or shorter, by this factor."""


class Failures(NamedTuple):
    """What the run has seen fail."""

    failed: int
    running_s: float
    """For how long it has run, all attempts together."""
    nodes: int


class Measured(NamedTuple):
    """What an attempt has measured. Seconds."""

    step_s: float
    stop_s: float
    """For which training stands still for a snapshot."""
    commit_s: float
    """From the start of the copy until all ranks know that all have their part."""
    restart_s: float
    """From the start of a worker to its first step."""


def failure_every_s(seen: Failures, node_mtbf_s: float) -> float:
    """Mean time between failures of the job that is to be expected now.

    What is believed of a node beforehand counts like one failure in ``node_mtbf_s`` of one node, so a long run without
    failures is believed to have better nodes. What a run has seen counts at once where it is worse than that.
    """
    exposed_s = seen.nodes * max(seen.running_s, 1.0)
    believed = (1 + seen.failed) / (node_mtbf_s + exposed_s)
    return 1 / (seen.nodes * max(believed, seen.failed / exposed_s))


def choose(measured: Measured, every_s: float, most_cost: float) -> Interval:
    """The steps between two snapshots with the least expected loss, of those that cost at most ``most_cost`` of the time; but
    never more than it takes for copies to cost nothing that could be measured: ``every_s``, the mean time between failures,
    may be wrong, and then the work of a long interval is lost for nothing. A copy that hides is made as often as the one
    before is complete.
    """
    rates = rates_of(measured, every_s)
    chosen = min(best_interval(rates).steps, max(_steps_for(rates, _HIDES), rates.least_steps))
    return interval(rates, max(chosen, _steps_for(rates, most_cost)))


def _steps_for(rates: Rates, cost: float) -> int:
    """The least steps between two snapshots with which copies cost at most this part of the time."""
    return math.ceil(rates.stall_s * (1 - cost) / (cost * rates.step_s))


def rates_of(measured: Measured, every_s: float) -> Rates:
    """What the expected time is computed from."""
    stall_s = 0.0 if measured.stop_s <= _HIDES * measured.step_s else measured.stop_s
    return Rates(measured.step_s, stall_s, measured.commit_s, measured.restart_s, every_s)


def is_another(before: Interval | None, found: Interval) -> bool:
    """Whether ``found`` is to take the place of ``before``."""
    if before is None:
        return True
    longer, shorter = max(before.steps, found.steps), min(before.steps, found.steps)
    return longer > _CHANGES * shorter


def told(chosen: Interval, measured: Measured, seen: Failures, every_s: float, *, is_configured: bool) -> str:
    """A choice with its reason and what it costs, in words."""
    how = "as configured" if is_configured else "chosen"
    steps = (
        "every step" if chosen.steps == 1 else f"every {chosen.steps:,} steps ({chosen.steps * measured.step_s:.3g} s)"
    )
    nodes = f"{seen.nodes} node{'s' * (seen.nodes != 1)}"
    return (
        f"a snapshot {steps}, {how}: it stops training for {measured.stop_s * 1e3:.3g} ms and is complete after "
        f"{measured.commit_s:.3g} s; a failure is expected every {every_s / 3600:.3g} h ({nodes}, {seen.failed} seen). "
        f"Expected loss {chosen.lost_share:.2%} of the time: {chosen.stall_share:.2%} for copies, the rest for restarts of "
        f"{measured.restart_s:.3g} s and {chosen.lost_work_s:.3g} s of lost work each"
    )
