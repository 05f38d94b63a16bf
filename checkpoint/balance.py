"""Division of bytes among ranks that could all take them."""

from collections.abc import Sequence


def quotas(loads: Sequence[int], num_bytes: int, least: int = 1) -> list[int]:
    """Divide ``num_bytes`` so that the highest of ``loads`` plus quotas is least.

    At most ``num_bytes // least`` ranks get a share, the least loaded first, ties by position; at least one does.
    """
    allowed = max(1, min(len(loads), num_bytes // least))
    order = sorted(range(len(loads)), key=lambda at: (loads[at], at))[:allowed]
    count, below = _filled(sorted(loads)[:allowed], num_bytes)
    level, rest = divmod(num_bytes + below, count)
    shares = [0] * len(loads)
    for position, at in enumerate(order[:count]):
        shares[at] = level + (position < rest) - loads[at]
    return shares


def _filled(ascending: Sequence[int], num_bytes: int) -> tuple[int, int]:
    """How many of the lowest loads rise when ``num_bytes`` are poured over them, and the sum of those loads."""
    below = 0
    for count, load in enumerate(ascending, 1):
        below += load
        if count == len(ascending) or count * ascending[count] - below >= num_bytes:
            return count, below
    raise AssertionError("no ranks to divide bytes among")
