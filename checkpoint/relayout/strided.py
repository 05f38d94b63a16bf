"""Copying the runs that two storages share in few operations, on any device: runs at equal distances are one copy."""

from torch import Tensor

from evermesh.checkpoint.regions import Runs
from evermesh.checkpoint.scattering import progressions


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
