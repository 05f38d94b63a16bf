"""Which layers make up which stage of a pipeline."""

import itertools
from collections.abc import Callable, Sequence

from evermesh.parallelism.errors import LayoutDoesNotFit


def split_layers(
    layer_s: Sequence[float],
    num_stages: int,
    *,
    embedding_s: float = 0.0,
    head_s: float = 0.0,
    speeds: Sequence[float] = (),
) -> tuple[range, ...]:
    """The layers of every stage: consecutive, at least one each, the slowest stage as fast as it can be.

    Exact, by dynamic programming over (stages, layers), in O(stages x layers x log layers), or layers^2 where speeds differ.
    Of several best splits it returns the one whose first stages have the fewest layers: they keep the most micro-batches.

    Args:
        layer_s: seconds of every layer, on a device of speed 1.
        num_stages: stages of the whole pipeline.
        embedding_s: seconds that the first stage takes besides its layers.
        head_s: seconds that the last stage takes besides its layers (head and loss).
        speeds: of every stage's devices (Holmes, arXiv 2312.03549); none: all are equally fast.

    Raises:
        LayoutDoesNotFit: there are fewer layers than stages.
    """
    layers = len(layer_s)
    if num_stages > layers:
        raise LayoutDoesNotFit(
            f"{num_stages} pipeline stages, but the model has {layers} layers, and every stage takes at least one. "
            f"Set layout.pp x layout.virtual_stages to at most {layers}.",
            "pp",
        )
    before = [0.0, *itertools.accumulate(layer_s)]

    def stage_s(stage: int, start: int, stop: int) -> float:
        extra = (embedding_s if stage == 0 else 0.0) + (head_s if stage == num_stages - 1 else 0.0)
        seconds = before[stop] - before[start] + extra
        return seconds / speeds[stage] if speeds else seconds

    slowest = [stage_s(0, 0, stop) if stop else float("inf") for stop in range(layers + 1)]
    starts: list[list[int]] = []
    for stage in range(1, num_stages):
        previous, slowest = slowest, [float("inf")] * (layers + 1)
        starts.append([0] * (layers + 1))
        for stop in range(stage + 1, layers + 1):
            candidates = range(stage, stop)
            if len(set(speeds)) <= 1:  # else a stage more layers may be no slower: nothing is monotonic
                candidates = _where_they_meet(previous, lambda start: stage_s(stage, start, stop), candidates)  # noqa: B023
            slowest[stop], starts[-1][stop] = min(
                (max(previous[start], stage_s(stage, start, stop)), start) for start in candidates
            )
    edges = [layers]
    for of_stage in reversed(starts):
        edges.append(of_stage[edges[-1]])
    edges.append(0)
    return tuple(range(start, stop) for start, stop in itertools.pairwise(reversed(edges)))


def _where_they_meet(before_s: Sequence[float], own_s: Callable[[int], float], starts: range) -> range:
    """The one or two starts that can be best: with a later one the stages before get slower, and this one faster."""
    first, last = starts.start, starts.stop - 1
    while first < last:
        middle = (first + last) // 2
        if before_s[middle] >= own_s(middle):
            last = middle
        else:
            first = middle + 1
    return range(max(starts.start, first - 1), first + 1)


__all__ = ["split_layers"]
