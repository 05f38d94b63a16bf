"""How much values differ by chance, without being led astray by the few that differ for a reason."""

import numpy as np

SPREAD_FLOOR = 0.02
"""Of logarithms of times: no job is steadier than that for long."""
LEAST_SCORE = 6.0
"""Standard deviations beyond which nothing is chance, many ranks and steps considered."""
FEW = 4
"""Peers, below which their spread says nothing and the spread over steps is taken."""
COMMON = 0.3
"""Of the ranks that do the same: if so many are slow, it is nothing of one rank."""
LEAST_RATIO = 1.15
"""Who is less than that slower than its peers is no finding."""


def spread(values: np.ndarray) -> float:
    """Robust standard deviation, and no less than what is never exceeded by chance alone."""
    return max(1.4826 * float(np.median(np.abs(values - np.median(values)))), SPREAD_FLOOR)


def noise(values: np.ndarray) -> float:
    """Robust standard deviation of a series around whatever it follows."""
    return spread(np.diff(values)) / np.sqrt(2)
