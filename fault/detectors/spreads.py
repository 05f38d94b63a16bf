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


def deviation(values: np.ndarray, middle: float | None = None) -> float:
    """Standard deviation of most of the values, around ``middle`` or their median: 1.4826 times the median distance from it,
    which is the same of normal ones."""
    around = np.median(values) if middle is None else middle
    return 1.4826 * float(np.median(np.abs(values - around)))


def spread(values: np.ndarray) -> float:
    """Robust standard deviation, and no less than what is never exceeded by chance alone."""
    return max(deviation(values), SPREAD_FLOOR)


def noise(values: np.ndarray) -> float:
    """Robust standard deviation of a series around whatever it follows."""
    return spread(np.diff(values)) / np.sqrt(2)
