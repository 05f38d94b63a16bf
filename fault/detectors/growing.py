"""Ranks that become slower little by little, next to those that do the same."""

import numpy as np

from evermesh.fault.detectors import kinds
from evermesh.fault.detectors.comparing import Compared
from evermesh.fault.detectors.joining import Joined, Survey
from evermesh.fault.detectors.spreads import COMMON, FEW, LEAST_RATIO, LEAST_SCORE, deviation
from evermesh.fault.events import Finding

_GROWTH, _LEAST_TREND, _LEAST_STEPS = 1.15, 10.0, 9
"""Least growth, least slope over its standard error, and least number of steps."""


def growing(compared: Compared) -> dict[int, float]:
    """By trace: by how much ranks became slower next to their peers, little by little."""
    known = ~np.isnan(compared.ratio)
    usable = np.flatnonzero(known.sum(axis=1) >= _LEAST_STEPS)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(known, np.log(np.maximum(compared.ratio, 1e-6)), 0)[usable]
    weights, steps = known[usable].astype(float), np.arange(compared.ratio.shape[1])
    counts = weights.sum(axis=1)
    centred = (steps - (weights @ steps / counts)[:, None]) * weights
    squares = (centred**2).sum(axis=1)
    slopes = (centred * logs).sum(axis=1) / squares
    fitted = (weights * logs).sum(axis=1)[:, None] / counts[:, None] + slopes[:, None] * centred
    residual = (logs - fitted) * weights
    errors = np.sqrt(np.maximum((residual**2).sum(axis=1) / (counts - 2), 1e-6) / squares)
    first, last = fitted[np.arange(len(usable)), known[usable].argmax(axis=1)], fitted.max(axis=1)
    grows = (last - first > np.log(_GROWTH)) & (slopes > _LEAST_TREND * errors)
    grows &= (first < np.log(LEAST_RATIO) / 2) & (slopes > LEAST_SCORE * _spread_of_slopes(slopes))
    found = {}
    for index in np.flatnonzero(grows).tolist():
        own = logs[index][known[usable[index]]]
        if (residual[index] ** 2).sum() < _step_error(own):
            found[int(usable[index])] = float(np.exp(last[index] - first[index]))
    return found if len(found) <= max(1, COMMON * len(compared.ratio)) else {}


def _spread_of_slopes(slopes: np.ndarray) -> float:
    """How much the trends of ranks differ; of few ranks nobody knows."""
    return deviation(slopes) if len(slopes) > FEW else 0.0


def _step_error(logs: np.ndarray) -> float:
    """Squared error of the best two levels: what became slow at once is no gradual slowdown."""
    errors = [
        ((logs[:at] - logs[:at].mean()) ** 2).sum() + ((logs[at:] - logs[at:].mean()) ** 2).sum()
        for at in range(2, len(logs) - 1)
    ]
    return float(min(errors))


def gradual(joined: Joined, survey: Survey, trace: int, compared: Compared, growth: float) -> Finding:
    """The finding about one of these."""
    steps = survey.first_step + np.flatnonzero(~np.isnan(compared.ratio[trace]))
    state = joined.traces[trace]
    return Finding(
        kind=kinds.GRADUAL,
        rank=state.rank,
        node=joined.node(trace),
        step=int(steps[0]),
        text=f"{joined.where(trace)} computes longer and longer: {growth:.2f} times as long in step {steps[-1]} as in step "
        f"{steps[0]}, next to {compared.peers[trace]} ranks that do the same",
        evidence={"growth": round(growth, 3), "steps": len(steps), "peers": int(compared.peers[trace])},
        confidence=0.85,
    )
