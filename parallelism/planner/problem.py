"""A batch and a pool of ranks as the planner's loops see them."""

from typing import NamedTuple

from evermesh.parallelism.planner.costs import Coefficients
from evermesh.parallelism.planner.rings import Floats, Integers


class Problem(NamedTuple):
    """What the loops need of a batch and a pool."""

    costs: Coefficients
    lengths: Integers
    """Of every sequence, longest first."""
    slowness: Floats
    """What the time of every rank is multiplied by."""
    node_of: Integers
    node_end: Integers
    """Of every rank, the first rank behind its node."""
    node_size: int
