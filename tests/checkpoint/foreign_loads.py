"""Loading a foreign checkpoint whole, and into layouts of ours, with exact counts of bytes."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from evermesh.checkpoint import Box, Interval, Padding, Permutation, Region, Shard, ShardMap, TensorShards, load
from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.loading import wanted_regions
from evermesh.checkpoint.regions import logical_runs
from evermesh.checkpoint.sources import Source
from tests.checkpoint.states import local_storage


def load_whole(source: Source) -> dict[str, Tensor]:
    """All tensors, each read once and by its bytes alone."""
    found = {name: torch.empty(t.shape, dtype=getattr(torch, t.dtype)) for name, t in source.tensors.items()}
    result = load(source, {name: (Interval(0, tensor.numel()), tensor) for name, tensor in found.items()})
    assert result.bytes_read == sum(tensor.nbytes for tensor in found.values())
    return found


def assert_loads_into_any_layout(source: Source, whole: Mapping[str, Tensor], ranks: int) -> None:
    """Every rank of a layout of ours gets its regions bit for bit and reads exactly their bytes."""
    layout = _layout(whole, ranks)
    layout.check()
    for rank in range(ranks):
        held = {n: [torch.full((r.num_elements,), 7, dtype=whole[n].dtype) for r in regions] for n, regions in layout.of_rank(rank).items()}
        result = load(source, wanted_regions(layout, rank, held), shard_map=layout)
        needed = 0
        for name, regions in layout.of_rank(rank).items():
            form = layout.tensors[name].form
            for region, tensor in zip(regions, held[name], strict=True):
                runs = logical_runs(region, form)
                needed += runs.num_elements * DTYPES[source.tensors[name].dtype].num_bytes
                expected = local_storage(region, form, whole[name]).flatten()
                for start, length in zip(runs.destination.tolist(), runs.length.tolist(), strict=True):
                    part = slice(start, start + length)
                    assert torch.equal(_raw(tensor[part]), _raw(expected[part])), (name, region)
                assert tensor.numel() - runs.num_elements == int((tensor == 7).sum()) or tensor.dtype == torch.uint8
        assert result.bytes_read == needed


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _layout(whole: Mapping[str, Tensor], ranks: int) -> ShardMap:
    """Matrices as columns of a fused dim on some ranks, as padded intervals, or as rows; other tensors as intervals."""
    return ShardMap({name: _cut(index, tensor, ranks) for index, (name, tensor) in enumerate(whole.items())})


def _cut(index: int, tensor: Tensor, ranks: int) -> TensorShards:
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    if len(shape) < 2 or index % 3 == 0:
        share = -(-tensor.numel() // ranks)
        padding = Padding(None, share * ranks - tensor.numel())
        shards = [Shard(Interval(rank * share, (rank + 1) * share), (rank,)) for rank in range(ranks)]
        return TensorShards(dtype, shape, tuple(shards), padding=padding)
    dim = index % 2
    half = shape[0] // 2
    swapped = Permutation(0, ((0, shape[0] - half, half), (half, 0, shape[0] - half)))
    regions = list(_slabs(shape, dim, ranks))
    return TensorShards(
        dtype, shape, tuple(Shard(region, (rank,)) for rank, region in enumerate(regions)), permutation=swapped
    )


def _slabs(shape: tuple[int, ...], dim: int, ranks: int) -> Iterator[Region]:
    for rank in range(ranks):
        start, stop = (shape[dim] * edge // ranks for edge in (rank, rank + 1))
        yield Box(
            tuple(start * (d == dim) for d in range(len(shape))),
            tuple(stop - start if d == dim else size for d, size in enumerate(shape)),
        )
