"""A time that no plan of a batch can beat under its cost model: the yardstick of every certificate."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.errors import SequenceTooLong


class LowerBound(NamedTuple):
    """Seconds, and the constraint that gives them."""

    seconds: float
    binding: Literal["work", "longest sequence", "memory", "nothing"]


def smallest_ring(length: int, capacity: int) -> int:
    """Fewest ranks whose shares of ``length`` tokens fit into ``capacity``."""
    return -(-length // capacity)


def lower_bound(
    lengths: Sequence[int], hdp: int, capacity: int, cost: CostModel, *, pp: int = 1, chain: float = 1.0
) -> LowerBound:
    """The larger of two bounds: all work spread evenly, and the longest sequence on its best ring.

    Work: a sequence costs its ring members together at least min over d of d x T(s, d); every micro-batch holds at most
    ``capacity`` tokens, so their fixed cost is paid at least ceil(tokens / capacity) times. "memory" binds when the work
    is more than it would be without a capacity, because long sequences have to be shared.

    In a pipeline of ``pp`` equal ranks the work is spread over all of them. A micro-batch still takes ``chain`` of its time:
    it passes through one stage after the other, there and back, and at most the gradients of weights are put off. How long
    the pipeline takes to fill is left out, since nothing says how small its first micro-batch is.
    """
    if not lengths:
        return LowerBound(0.0, "nothing")
    distinct = sorted(set(lengths))
    work = {length: _least(length, hdp, capacity, cost, together=True) for length in distinct}
    alone = {length: min(cost.whole_s(length), work[length]) for length in distinct}
    fixed = -(-sum(lengths) // capacity) * cost.micro_batch_s
    spread = (sum(work[length] for length in lengths) + fixed) / (hdp * pp)
    unconstrained = (sum(alone[length] for length in lengths) + cost.micro_batch_s) / (hdp * pp)
    longest = max(_least(length, hdp, capacity, cost, together=False) for length in distinct) + cost.micro_batch_s
    longest *= chain
    if longest >= spread:
        return LowerBound(longest, "longest sequence")
    return LowerBound(spread, "work" if spread <= 1.01 * unconstrained else "memory")


def _least(length: int, hdp: int, capacity: int, cost: CostModel, *, together: bool) -> float:
    first = smallest_ring(length, capacity)
    if first > hdp:
        raise SequenceTooLong(-1, length, capacity, hdp)
    sizes = range(first, max(first, min(hdp, length)) + 1)
    return min((size if together else 1) * cost.ring_s(length, size) for size in sizes)
