"""Fits the coefficients of the cost model to measured times while a run goes on; imports no torch."""

from evermesh.parallelism.calibration.calibration import Calibration, Proposal
from evermesh.parallelism.calibration.fitting import COEFFICIENTS, Fit, fit
from evermesh.parallelism.calibration.observing import Observation, observations, observe_micro_batch
from evermesh.parallelism.calibration.policy import CalibrationPolicy

__all__ = [
    "COEFFICIENTS",
    "Calibration",
    "CalibrationPolicy",
    "Fit",
    "Observation",
    "Proposal",
    "fit",
    "observations",
    "observe_micro_batch",
]
