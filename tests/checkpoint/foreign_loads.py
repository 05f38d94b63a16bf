"""Loading a foreign checkpoint whole, and into layouts of ours, with exact counts of bytes."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from evermesh.checkpoint import (
    Box,
    Interval,
    Padding,
    Permutation,
    Region,
    Shard,
    ShardMap,
    StoredForm,
    TensorShards,
    load,
)
from evermesh.checkpoint.errors import CheckpointCorrupt, ForeignUnusable, ShardMapInvalid
from evermesh.checkpoint.loading import wanted_regions
from evermesh.checkpoint.naming import Naming
from evermesh.checkpoint.opening import open_checkpoint
from evermesh.checkpoint.regions import logical_runs
from evermesh.checkpoint.sources import Source
from tests.checkpoint.states import local_storage


def load_whole(source: Source) -> dict[str, Tensor]:
    """All tensors, each read once, and by its bytes alone where there are no checksums."""
    found = {name: torch.empty(t.shape, dtype=getattr(torch, t.dtype)) for name, t in source.tensors.items()}
    result = load(source, {name: (Interval(0, tensor.numel()), tensor) for name, tensor in found.items()})
    assert result.bytes_read == sum(tensor.nbytes for tensor in found.values()) or not source.is_foreign
    return found


def refusal(path: Path) -> str | None:
    """Why the checkpoint at ``path`` is refused; None: it was read whole. Any other error is one of ours."""
    try:
        source = open_checkpoint(path)
        gaps = [] if source.is_foreign else gaps_in(source)
        if gaps:
            return f"{path}: {gaps[0]}"
        load_whole(source)
    except (ForeignUnusable, CheckpointCorrupt) as error:
        return str(error)
    return None


def gaps_in(source: Source) -> list[str]:
    """What its tensors lack, which a checkpoint of ours tells when it is verified or loaded."""
    found = []
    for name, tensor in source.tensors.items():
        try:
            tensor.check_cover(name)
        except ShardMapInvalid as error:
            found.append(str(error))
    return found


def assert_loads_into_any_layout(source: Source, whole: Mapping[str, Tensor], ranks: int) -> None:
    """Every rank of a layout of ours gets its regions bit for bit and reads exactly their bytes."""
    assert_loads(source, whole, _layout(whole, ranks), range(ranks))


def assert_loads(
    source: Source, whole: Mapping[str, Tensor], layout: ShardMap, ranks: Iterable[int], names: Naming | None = None
) -> None:
    """Every one of ``ranks`` of ``layout`` gets its regions of ``whole`` bit for bit and reads exactly their bytes, or, if
    it is one of ours, whole chunks of files. Other names of tied weights and buffers may
    remain."""
    aliases = source.objects.get("aliases", {})
    assert isinstance(aliases, dict)
    extra = source.tensors.keys() - whole.keys() if names is None else set()
    assert {name.partition(".")[2] for name in extra if not name.startswith("buffer.")} <= aliases.keys()
    layout.check()
    for rank in ranks:
        of_rank = layout.of_rank(rank)
        held = {name: [_untouched(region, whole[name]) for region in of_rank[name]] for name in of_rank}
        result = load(source, wanted_regions(layout, rank, held), shard_map=layout, names=names, strict=not extra)
        needed = 0
        for name, regions in of_rank.items():
            for region, tensor in zip(regions, held[name], strict=True):
                expected, num_read = _expected(region, layout.tensors[name].form, whole[name])
                assert torch.equal(_raw(tensor), _raw(expected)), (name, region)
                needed += num_read * tensor.dtype.itemsize
        assert result.bytes_read == needed or not source.is_foreign


def _untouched(region: Region, like: Tensor) -> Tensor:
    return torch.full((region.num_elements,), 7).to(like.dtype)


def _expected(region: Region, form: StoredForm, logical: Tensor) -> tuple[Tensor, int]:
    """The storage of a region whose padding was left as it was, and its elements that are no padding."""
    storage, expected = local_storage(region, form, logical).flatten(), _untouched(region, logical)
    runs = logical_runs(region, form)
    for start, length in zip(runs.destination.tolist(), runs.length.tolist(), strict=True):
        expected[start : start + length] = storage[start : start + length]
    return expected, runs.num_elements


def _raw(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


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
