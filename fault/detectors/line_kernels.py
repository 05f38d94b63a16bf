"""Which lines lie between bounds; see ``clocks``."""

from typing import Any

import numpy as np

from evermesh.parallelism.planner.compiling import compiled


@compiled
def least_above(times: Any, values: Any, slope: float) -> float:
    """The least of ``values`` less a line through 0, arrays [bounds]."""
    least = np.inf
    for index in range(len(times)):
        least = min(least, values[index] - slope * times[index])
    return least


@compiled
def steepest(times: Any, lower: Any, upper: Any, inside: float, outside: float) -> float:
    """The slope nearest to ``outside`` with which a line fits between the bounds, or one just beyond it."""
    if least_above(times, upper, outside) >= -least_above(times, -lower, -outside):
        return outside
    for _ in range(60):
        middle = (inside + outside) / 2
        if least_above(times, upper, middle) >= -least_above(times, -lower, -middle):
            inside = middle
        else:
            outside = middle
    return outside


@compiled
def reach_of_lines(times: Any, lower: Any, upper: Any, most_slope: float) -> Any:
    """Lowest and highest value at time 0 of lines between ``lower`` and ``upper``, and their least and greatest slope.

    All arrays [bounds]. The lowest is above the highest if there is no such line. What is sought is highest, or lowest, of
    concave functions of the slope, in thirds.
    """
    below = -lower
    left, right = -most_slope, most_slope
    for _ in range(100):
        one, other = left + (right - left) / 3, right - (right - left) / 3
        room = least_above(times, upper, one) + least_above(times, below, -one)
        if room < least_above(times, upper, other) + least_above(times, below, -other):
            left = one
        else:
            right = other
    widest = (left + right) / 2
    top, bottom = least_above(times, upper, widest), -least_above(times, below, -widest)
    if top < bottom:
        return bottom, top, widest, widest
    least = steepest(times, lower, upper, widest, -most_slope)
    most = steepest(times, lower, upper, widest, most_slope)
    for side in range(2):
        sign = 1.0 if side == 0 else -1.0
        values = upper if side == 0 else below
        left, right = least, most
        for _ in range(100):
            one, other = left + (right - left) / 3, right - (right - left) / 3
            if least_above(times, values, sign * one) < least_above(times, values, sign * other):
                left = one
            else:
                right = other
        for slope in (left, least, most):
            found = least_above(times, values, sign * slope)
            if side == 0:
                top = max(top, found)
            else:
                bottom = min(bottom, -found)
    return bottom, top, least, most
