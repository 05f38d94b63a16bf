"""How often to take a snapshot: what a snapshot costs against what a failure then loses.

Failures come at random with a mean of M seconds between them, also while the job starts again. A snapshot every t
seconds of work that stalls training for d, and a restart of R seconds, stretch t seconds of work to M exp(R / M)
(exp((t + d) / M) - 1): J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps",
2006, equation 20. First-order: J. W. Young, 1974.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple


class Rates(NamedTuple):
    """What was measured. Seconds."""

    step_s: float
    stall_s: float
    """How long training stands still for a snapshot; 0 where it hides."""
    protect_s: float
    """From the start of a snapshot until its stripe is protected: it cannot be taken more often."""
    restart_s: float
    """From a failure to the next step, without the lost work."""
    failure_every_s: float
    """Mean time between failures of the job."""

    @property
    def least_steps(self) -> int:
        """Between two snapshots of which the first is protected before the second begins."""
        return max(1, math.ceil(self.protect_s / self.step_s - 1e-9))


@dataclass(frozen=True, slots=True)
class Interval:
    """A choice, and what it costs."""

    steps: int
    """Between two snapshots."""
    lost_share: float
    """Of the time, for stalls, lost work and restarts."""
    lost_work_s: float
    """Mean work that a failure destroys: since the last snapshot that was protected."""
    stall_share: float
    """Of the time without failures."""


def best_interval(rates: Rates) -> Interval:
    """The number of steps between snapshots with the least expected loss; exact, not a formula for the optimum."""
    least = rates.least_steps
    most = max(least, math.ceil(2 * (daly_s(rates) + rates.failure_every_s) / rates.step_s))
    while most - least > 2:  # the expected time has one minimum
        third = (most - least) // 3
        low, high = least + third, most - third
        if stretch(rates, low) <= stretch(rates, high):
            most = high
        else:
            least = low
    return interval(rates, min(range(least, most + 1), key=lambda steps: stretch(rates, steps)))


def interval(rates: Rates, steps: int) -> Interval:
    """What a snapshot every ``steps`` steps costs."""
    work_s = steps * rates.step_s
    length_s, mean_s = work_s + rates.stall_s, rates.failure_every_s
    # the mean of min(t, work) over failures at t < length; a stall loses no more work than there is before it
    survived = math.exp(-length_s / mean_s)
    lost_work_s = (-mean_s * math.expm1(-work_s / mean_s) - work_s * survived) / (1 - survived)
    lost_share = 1 - 1 / stretch(rates, steps)
    return Interval(steps, lost_share, lost_work_s + rates.protect_s, rates.stall_s / length_s)


def stretch(rates: Rates, steps: int) -> float:
    """Expected time over the time of the work alone; infinite where failures come too fast to get anywhere."""
    work_s, mean_s = steps * rates.step_s, rates.failure_every_s
    # a failure before the snapshot is protected falls back to the one before: as if the restart took that much longer
    exponent = (work_s + rates.stall_s) / mean_s
    restart = (rates.restart_s + rates.protect_s) / mean_s
    if exponent + restart > 700:
        return math.inf
    return mean_s * math.exp(restart) * math.expm1(exponent) / work_s


def young_s(rates: Rates) -> float:
    """Young's interval of work, seconds."""
    return math.sqrt(2 * rates.stall_s * rates.failure_every_s)


def daly_s(rates: Rates) -> float:
    """Daly's higher-order interval of work, seconds (equation 37)."""
    ratio = rates.stall_s / (2 * rates.failure_every_s)
    if ratio >= 1:
        return rates.failure_every_s
    return young_s(rates) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - rates.stall_s
