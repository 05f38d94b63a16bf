"""When a value is a spike: too far above the median of the last accepted ones.

The rule for a step is Ling's (arXiv 2503.05139, section 3.4.4), which names no threshold. Median and median absolute
deviation hardly move with a few spikes that were accepted.
"""

import math
import statistics
from collections.abc import Sequence

from evermesh.runtime.guard.config import SpikePolicy

NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


def limit_of(values: Sequence[float], deviations: float, floor: float) -> float:
    """What a value may be after ``values``: their median and so many deviations, each at least ``floor`` x |median|."""
    median = statistics.median(values)
    spread = statistics.median([abs(value - median) for value in values])
    return median + deviations * max(NORMAL * spread, floor * abs(median))


class Window:
    """The losses and gradient norms of the last accepted steps. Lists are replaced, never changed."""

    def __init__(self, policy: SpikePolicy | None) -> None:
        self.policy = policy
        self.losses: list[float] = []
        self.norms: list[float] = []

    def accept(self, loss: float, grad_norm: float) -> None:
        """A step was accepted."""
        if self.policy is not None:
            kept = 1 - self.policy.window
            self.losses, self.norms = [*self.losses[kept:], loss], [*self.norms[kept:], grad_norm]

    def fault(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step; None: nothing is."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"loss {loss}, gradient norm {grad_norm}: not finite"
        policy = self.policy
        if policy is None or len(self.losses) < policy.armed_after:
            return None
        return _above("loss", loss, self.losses, policy.loss_deviations, policy.loss_floor) or _above(
            "gradient norm", grad_norm, self.norms, policy.norm_deviations, policy.norm_floor
        )


def _above(name: str, value: float, before: Sequence[float], deviations: float, floor: float) -> str | None:
    limit = limit_of(before, deviations, floor)
    if value <= limit:
        return None
    median = statistics.median(before)
    return f"{name} {value:.6g} is above {limit:.6g} ({len(before)} steps before it had a median of {median:.6g})"
