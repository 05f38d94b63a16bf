"""Robust non-negative least squares for the coefficients of the cost model, with what the data can tell apart.

Errors are relative to the time that is predicted. The first rounds minimise their absolute values, which outliers cannot
pull; the last weight them by Tukey's biweight around a scale from the median (Beaton and Tukey, Technometrics 16, 1974).
A prior holds every coefficient at its present value as far as the data do not say otherwise: directions in which they say
nothing stay where they are. Non-negative solutions are found with the active sets of Lawson and Hanson (Solving Least Squares
Problems, 1974, chapter 23).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from evermesh.parallelism.calibration.observing import COEFFICIENTS, Observation
from evermesh.parallelism.cost import CostModel

Floats = NDArray[np.float64]

_ABSOLUTE_ROUNDS, _BIWEIGHT_ROUNDS = 12, 12
_TUKEY = 4.685
"""In scales; 95 % efficient where errors are normal."""
_PRIOR = 1.0
"""Standard deviation of a coefficient before anything is measured, in its own size."""
_LEAST_SHARE = 0.02
"""A coefficient is at least of the size with which it would make up this share of all time: one of zero can grow."""
_LEAST_SCALE = 1e-3
"""Of relative errors, so that data without noise leave a trace of the prior."""
_FAR_OFF = 0.1
"""Larger errors are those of the model while the first rounds go on, not noise: the prior must not win by them."""
_KNOWN = 0.5
"""Of ``_PRIOR``: a coefficient with a smaller standard error is told by the data."""
_TOKEN, _PAIR, _RECOMPUTE_PAIR = (COEFFICIENTS.index(name) for name in ("token_s", "pair_s", "recompute_pair_s"))
_RING, _NETWORK = (COEFFICIENTS.index(name) for name in ("ring_token_s", "network_token_s"))
_TRAFFIC = np.isin(np.arange(len(COEFFICIENTS)), (_RING, _NETWORK))
_STARTS = (0.0, 10.0)
"""What traffic is multiplied by in further starts, in which attention hides all of it, and little."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients that were fitted, seconds, by name."""

    model: CostModel
    standard_errors: dict[str, float]
    """Of every coefficient that is in some observation, seconds."""
    undetermined: tuple[str, ...]
    """Of these, those that the data cannot tell, alone or apart from others; together they move as little as they can."""
    relative_error: float
    """Standard error of the time predicted for all observations together, as a share of it."""
    noise: float
    """Relative error of a single observation, from the median."""


class Design(NamedTuple):
    """Observations as arrays; N of them, K overlaps, P coefficients."""

    seconds_N: Floats
    counts_NP: Floats
    owner_K: NDArray[np.int64]
    overlaps_K4: Floats
    """Pairs, whether they are computed again, tokens passed, whether to another node."""

    @classmethod
    def of(cls, found: Sequence[Observation], experts: float) -> Self:
        """``experts`` seconds come with every second per token."""
        counts = np.array([observation.counts for observation in found], np.float64).reshape(-1, len(COEFFICIENTS))
        counts[:, _TOKEN] *= 1.0 + experts
        owner = [index for index, observation in enumerate(found) for _ in observation.overlaps]
        overlaps = [overlap for observation in found for overlap in observation.overlaps]
        return cls(
            np.array([observation.seconds for observation in found]),
            counts,
            np.array(owner, np.int64),
            np.array(overlaps, np.float64).reshape(-1, 4),
        )

    def rows(self, coefficients_P: Floats) -> Floats:
        """How often each coefficient counts, [N, P], where the longer of attention and traffic does."""
        pairs, again, tokens, crosses = self.overlaps_K4.T
        attention = pairs * (coefficients_P[_PAIR] + again * coefficients_P[_RECOMPUTE_PAIR])
        passed = tokens * np.where(crosses > 0, coefficients_P[_NETWORK], coefficients_P[_RING])
        computes = attention >= passed
        rows = self.counts_NP.copy()
        for column, counts in (
            (_PAIR, pairs * computes),
            (_RECOMPUTE_PAIR, pairs * again * computes),
            (_RING, tokens * ~computes * (crosses == 0)),
            (_NETWORK, tokens * ~computes * (crosses > 0)),
        ):
            np.add.at(rows[:, column], self.owner_K, counts)
        return rows

    def predicted(self, coefficients_P: Floats) -> Floats:
        """Seconds of every observation, [N]."""
        predicted: Floats = self.rows(coefficients_P) @ coefficients_P
        return predicted


def coefficients_of(model: CostModel) -> Floats:
    """In the order of ``COEFFICIENTS``, with what is left out filled in."""
    filled = {"network_step_s": model.ring_step_s, "network_token_s": model.ring_token_s}
    values = (getattr(model, name) for name in COEFFICIENTS)
    return np.array([filled[n] if v is None else v for n, v in zip(COEFFICIENTS, values, strict=True)], np.float64)


def predicted_s(model: CostModel, found: Sequence[Observation]) -> Floats:
    """What ``model`` says of every observation, seconds."""
    return Design.of(found, model.expert_token_s / model.token_s).predicted(coefficients_of(model))


def fit(found: Sequence[Observation], prior: CostModel, weights: Sequence[float] | None = None) -> Fit:
    """The coefficients under which ``found`` is most likely, at least one observation; never negative.

    Args:
        found: what was measured.
        prior: what is known already; its version stays.
        weights: of every observation; None: all count alike.
    """
    design = Design.of(found, prior.expert_token_s / prior.token_s)
    before = coefficients_of(prior)
    base = np.ones(len(found)) if weights is None else np.asarray(weights, np.float64)
    fitting = _Fitting(design, before, _sizes(design, before), base)
    # whether attention hides the traffic of a ring decides what is fitted: both are tried
    starts = [
        before * np.where(_TRAFFIC, factor, 1.0) for factor in ((1.0, *_STARTS) if len(design.owner_K) else (1.0,))
    ]
    now = min((fitting.absolute(start) for start in starts), key=fitting.absolute_error)
    now, noise, hessian = fitting.biweight(now)
    return _result(prior, now, design, (hessian, fitting.size), noise)


@dataclass(frozen=True, slots=True)
class _Fitting:
    """Rounds of weighted least squares from a start, seconds, [P]."""

    design: Design
    before: Floats
    size: Floats
    base: Floats
    """Weights of the observations, [N]."""

    def absolute(self, now: Floats) -> Floats:
        """With the least absolute values of relative errors."""
        # a prediction that is far off yet would weigh by its own error
        unit = self.design.seconds_N
        for _ in range(_ABSOLUTE_ROUNDS):
            errors = np.abs(self.design.predicted(now) - unit) / unit
            noise = min(self._noise(errors), _FAR_OFF)
            now, _ = self._solved(now, unit, noise / np.maximum(errors, 0.1 * noise), noise)
        return now

    def absolute_error(self, now: Floats) -> float:
        """What ``absolute`` makes small."""
        unit = self.design.seconds_N
        return float(self.base @ (np.abs(self.design.predicted(now) - unit) / unit))

    def biweight(self, now: Floats) -> tuple[Floats, float, Floats]:
        """With Tukey's weights around the scale of the errors, which is the second; the third is the last matrix."""
        noise, hessian = 1.0, np.eye(len(now))
        for _ in range(_BIWEIGHT_ROUNDS):
            predicted = self.design.predicted(now)
            unit = np.maximum(predicted, 0.1 * np.median(self.design.seconds_N))
            errors = np.abs(predicted - self.design.seconds_N) / unit
            noise = self._noise(errors)
            robust = np.square(np.clip(1.0 - np.square(errors / (_TUKEY * noise)), 0.0, None))
            now, hessian = self._solved(now, unit, robust, noise)
        return now, noise, hessian

    def _noise(self, errors: Floats) -> float:
        return max(_LEAST_SCALE, 1.4826 * float(np.median(errors)) * _for_freedom(self.design, self.size))

    def _solved(self, now: Floats, unit: Floats, robust: Floats, noise: float) -> tuple[Floats, Floats]:
        """The coefficients with the least weighted squares, and the matrix that they were found with."""
        rows = self.design.rows(now)
        scaled = rows * self.size / unit[:, None]
        weighted = scaled * (self.base * robust / noise**2)[:, None]
        hessian = weighted.T @ scaled + np.eye(len(self.size)) / _PRIOR**2
        # traffic that attention hides by now stays as it is; at its old value it might not be hidden
        held = np.where(rows.any(axis=0), self.before, now)
        right = weighted.T @ (self.design.seconds_N / unit) + held / self.size / _PRIOR**2
        return self.size * _non_negative(hessian, right), hessian


def _sizes(design: Design, before: Floats) -> Floats:
    """What a coefficient is counted in, seconds, [P]."""
    # of an overlap both sides count here, since nobody knows yet which is longer
    pairs, again, tokens, crosses = design.overlaps_K4.T
    counts = design.counts_NP.sum(axis=0)
    counts[_PAIR] += pairs.sum()
    counts[_RECOMPUTE_PAIR] += (pairs * again).sum()
    counts[_RING] += (tokens * (crosses == 0)).sum()
    counts[_NETWORK] += (tokens * (crosses > 0)).sum()
    total_s = float(np.median(design.seconds_N)) * len(design.seconds_N)
    least = np.divide(_LEAST_SHARE * total_s, counts, out=np.zeros_like(counts), where=counts > 0)
    size = np.maximum(before, least)
    return np.where(size > 0, size, 1.0)


def _for_freedom(design: Design, size: Floats) -> float:
    """By how much the errors of a fit are too small, because it was fitted to them."""
    used = int(np.count_nonzero(design.counts_NP.any(axis=0) & (size > 0)))
    number = len(design.seconds_N)
    return float(np.sqrt(number / max(1, number - used)))


def _non_negative(hessian: Floats, right: Floats) -> Floats:
    """The x >= 0 with the least x' H x / 2 - r' x; ``hessian`` is positive definite."""
    x = np.zeros(len(right))
    free = np.zeros(len(right), np.bool_)
    tolerance = 1e-12 * max(1.0, float(np.abs(right).max()))
    for _ in range(3 * len(right)):
        slope = np.where(free, -np.inf, right - hessian @ x)
        if slope.max() <= tolerance:
            break
        free[int(slope.argmax())] = True
        while True:
            wanted = np.zeros_like(x)
            wanted[free] = np.linalg.solve(hessian[np.ix_(free, free)], right[free])
            if (wanted[free] > 0).all():
                x = wanted
                break
            leaving = free & (wanted <= 0)
            way = float((x[leaving] / (x[leaving] - wanted[leaving])).min())
            x = x + way * (wanted - x)
            free &= x > 1e-14
            x[~free] = 0.0
    return x


def _result(prior: CostModel, now: Floats, design: Design, scaled: tuple[Floats, Floats], noise: float) -> Fit:
    hessian, size = scaled
    covariance = np.linalg.inv(hessian)
    own = np.sqrt(np.diag(covariance))
    rows = design.rows(now)
    seen = [bool(count) for count in rows.sum(axis=0)]
    total = rows.sum(axis=0) * size
    names = [name for name, is_seen in zip(COEFFICIENTS, seen, strict=True) if is_seen]
    errors = dict(zip(COEFFICIENTS, (own * size).tolist(), strict=True))
    unknown = dict(zip(COEFFICIENTS, (own > _KNOWN * _PRIOR).tolist(), strict=True))
    predicted = float(rows.sum(axis=0) @ now)
    return Fit(
        model=_model(prior, now),
        standard_errors={name: errors[name] for name in names},
        undetermined=tuple(name for name in names if unknown[name]),
        relative_error=float(np.sqrt(total @ covariance @ total)) / predicted if predicted > 0 else 1.0,
        noise=noise,
    )


def _model(prior: CostModel, coefficients: Floats) -> CostModel:
    """``prior`` with other coefficients; what it leaves out stays out where that means the same."""
    values: dict[str, float | None] = dict(zip(COEFFICIENTS, coefficients.tolist(), strict=True))
    token_s = max(coefficients[_TOKEN], 1e-3 * prior.token_s)  # a token is never free
    values["token_s"] = float(token_s)
    for inside, outside in (("ring_step_s", "network_step_s"), ("ring_token_s", "network_token_s")):
        slower, faster = values[outside], values[inside]
        assert slower is not None
        assert faster is not None
        is_told = getattr(prior, outside) is not None or slower != getattr(prior, inside)
        values[outside] = max(slower, faster) if is_told else None
    values["expert_token_s"] = prior.expert_token_s / prior.token_s * float(token_s)
    if prior.offload_saves_token_s:
        again_s = values["recompute_token_s"]
        assert again_s is not None
        values["offload_saves_token_s"] = prior.offload_saves_token_s / prior.recompute_token_s * again_s
    return CostModel.model_validate(prior.model_dump() | values)


__all__ = ["COEFFICIENTS", "Fit", "fit", "predicted_s"]
