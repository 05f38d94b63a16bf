"""Online calibration: a window of observations, and a new cost model when it would clearly predict better."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from evermesh.parallelism.calibration.fitting import COEFFICIENTS, Fit, Floats, fit, predicted_s
from evermesh.parallelism.calibration.observing import Observation
from evermesh.parallelism.calibration.policy import CalibrationPolicy
from evermesh.parallelism.cost import CostModel

_SURE = 6.0
"""Logarithm of the ratio of likelihoods on unseen observations, from which a new model is used."""
_HICCUPS, _WIDEST = 0.05, 8.0
"""Share of observations that no model explains, and how widely the logarithms of their errors are spread."""
_SCALES = tuple(np.geomspace(1e-3, 4.0, 60).tolist())
"""Widths of noise, as logarithms of what was measured by what was predicted."""
_LEAST_S = 1e-12
_LEAST_HICCUP = 0.2
"""A relative error that is not called an outlier."""
_MOST_UNCERTAIN = 0.05
"""Relative standard error of the time predicted for the whole window; a third of the gain, where that is more."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A better cost model, and why."""

    model: CostModel
    """Its version is one above that of ``old``."""
    old: CostModel
    fit: Fit
    error_before: float
    """Of the old model on the newest observations, relative: the mean, weighted by time, without outliers."""
    error_after: float
    """There, of a model that was fitted to the others."""

    @property
    def changes(self) -> dict[str, tuple[float | None, float | None]]:
        """Coefficients that are no longer the same: before and now, seconds."""
        names = (*COEFFICIENTS, "expert_token_s")
        pairs = {name: (getattr(self.old, name), getattr(self.model, name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def __str__(self) -> str:
        changes = ", ".join(
            f"{name} {_short(old)} -> {_short(new)}"
            + (f" +- {self.fit.standard_errors[name]:.2g}" if name in self.fit.standard_errors else "")
            for name, (old, new) in self.changes.items()
        )
        unknown = f"; not told apart: {', '.join(self.fit.undetermined)}" if self.fit.undetermined else ""
        errors = f"error {self.error_before:.1%} -> {self.error_after:.1%}"
        return f"version {self.model.version}, {errors}: {changes}{unknown}"


class Calibration:
    """Collects observations and proposes cost models. Not collective: one process observes for all.

    Args:
        model: the cost model in use.
        policy: how much data and gain a new one needs.
    """

    def __init__(self, model: CostModel, policy: CalibrationPolicy | None = None) -> None:
        self.model, self.policy = model, policy or CalibrationPolicy()
        self._window: deque[Observation] = deque(maxlen=self.policy.window)
        self._fresh = 0
        """Observations since the last proposal."""

    def observe(self, found: Iterable[Observation]) -> None:
        """Take note of what was measured, in the order in which it was."""
        for observation in found:
            self._window.append(observation)
            self._fresh += 1

    def proposal(self) -> Proposal | None:
        """A model that predicts clearly better than the one in use, and is from now on the one in use; None: there is none.

        The newest quarter of the window judges a model that is fitted to the rest. What is proposed is then fitted to all.
        """
        policy, found = self.policy, list(self._window)
        if len(found) < policy.least_observations or 3 * self._fresh < policy.least_observations:
            return None
        cut = len(found) - len(found) // 4
        weights = [0.5 ** (age / (policy.window / 2)) for age in range(len(found) - 1, -1, -1)]
        tried = fit(found[:cut], self.model, weights[:cut])
        before, after = (_errors(model, found[cut:]) for model in (self.model, tried.model))
        # what neither explains was a hiccup of the machine
        time_s = predicted_s(tried.model, found[cut:])
        time_s[np.minimum(before, after) > max(_LEAST_HICCUP, 5.0 * tried.noise)] = 0.0
        error_before, error_after = _mean(before, time_s), _mean(after, time_s)
        # the noise of single observations is in both, and no model takes it away
        gain = np.sqrt(max(0.0, error_before**2 - error_after**2))
        if error_after >= error_before or gain < policy.least_gain:
            return None
        if not _is_sure(_log_errors(self.model, found[cut:]), _log_errors(tried.model, found[cut:]), tried.noise):
            return None
        fitted = fit(found, self.model, weights)
        if fitted.relative_error > max(_MOST_UNCERTAIN, gain / 3):
            return None
        model = fitted.model.model_copy(update={"version": self.model.version + 1})
        proposal = Proposal(model, self.model, fitted, error_before, error_after)
        self.model, self._fresh = model, 0
        return proposal

    def to_state(self) -> dict[str, Any]:
        """Everything but the policy, as JSON values."""
        window = [observation.to_list() for observation in self._window]
        return {"model": self.model.model_dump(mode="json"), "window": window, "fresh": self._fresh}

    @classmethod
    def from_state(cls, state: dict[str, Any], policy: CalibrationPolicy | None = None) -> Self:
        """The calibration that ``to_state`` described."""
        calibration = cls(CostModel.model_validate(state["model"]), policy)
        calibration._window.extend(Observation.from_list(values) for values in state["window"])
        calibration._fresh = int(state["fresh"])
        return calibration


def _errors(model: CostModel, found: Sequence[Observation]) -> Floats:
    """Relative error of every observation, [N]."""
    seconds = np.array([observation.seconds for observation in found])
    errors: Floats = np.abs(predicted_s(model, found) - seconds) / seconds
    return errors


def _mean(errors: Floats, weights: Floats) -> float:
    total = float(weights.sum())
    return float(np.minimum(errors, 1.0) @ weights) / total if total > 0 else 1.0


def _log_errors(model: CostModel, found: Sequence[Observation]) -> Floats:
    """By which power of e every observation took longer than ``model`` says, [N]."""
    seconds = np.array([observation.seconds for observation in found])
    errors: Floats = np.log(seconds / np.maximum(predicted_s(model, found), _LEAST_S))
    return errors


def _is_sure(before: Floats, after: Floats, noise: float) -> bool:
    """Whether what was measured is far likelier under the new model, which did not see it, nor did the width of its noise.

    Were the old one right, with noise of any width, a ratio of likelihoods above 1 / p would have a probability below p,
    however the new one was found (Wasserman, Ramdas and Balakrishnan, Universal inference, PNAS 117, 2020): neither few
    observations nor a coefficient that is in few of them make that wrong.
    """
    best = max(_log_likelihood(before, scale) for scale in _SCALES)
    return _log_likelihood(after, max(_SCALES[0], noise)) - best > _SURE


def _log_likelihood(errors: Floats, scale: float) -> float:
    """Of all errors under normal noise, and now and then a hiccup of any size."""
    normal = np.exp(-0.5 * np.square(errors / scale)) / (scale * np.sqrt(2.0 * np.pi))
    return float(np.log((1.0 - _HICCUPS) * normal + _HICCUPS / _WIDEST).sum())


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


__all__ = ["Calibration", "Proposal"]
