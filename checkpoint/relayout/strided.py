"""Copying the runs that two storages share in few operations, on any device: runs at equal distances are one copy."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from evermesh.checkpoint.regions import Runs


def copy_runs(source: Tensor, destination: Tensor, runs: Runs) -> None:
    """Copy ``runs`` between two contiguous tensors of one dim and one dtype that share no memory."""
    for first, last in progressions(runs):
        count, length = last - first, int(runs.length[first])
        views = []
        for flat, starts in ((source, runs.source), (destination, runs.destination)):
            begin = int(starts[first])
            step = int(starts[first + 1]) - begin if count > 1 else length
            views.append(flat.as_strided((count, length), (step, 1), flat.storage_offset() + begin))
        views[1].copy_(views[0])


def progressions(runs: Runs) -> Iterator[tuple[int, int]]:
    """[first, last) of runs that are equally long and equally far apart on both sides; together all runs, in order."""
    if not len(runs.length):
        return
    steps = np.stack([np.diff(runs.source), np.diff(runs.destination)])
    is_even = (runs.length[1:] == runs.length[:-1]) & (steps >= runs.length[:-1]).all(axis=0)
    goes_on = is_even[1:] & is_even[:-1] & (steps[:, 1:] == steps[:, :-1]).all(axis=0)
    edges = np.flatnonzero(np.concatenate([[True], ~goes_on, [True]])) if len(is_even) else np.zeros(1, np.int64)
    reached = 0
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):  # steps that are alike
        first = max(begin, reached)
        if is_even[begin] and first < end:
            yield from ((single, single + 1) for single in range(reached, first))
            yield first, end + 1
            reached = end + 1
    yield from ((single, single + 1) for single in range(reached, len(runs.length)))
