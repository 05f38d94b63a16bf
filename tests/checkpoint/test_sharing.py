"""Ranks that read together: bit for bit what they read alone, and every chunk once."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from evermesh.checkpoint import (
    Box,
    CheckpointCorrupt,
    Interval,
    Padding,
    Permutation,
    Shard,
    ShardMap,
    StoredForm,
    TensorShards,
    load,
    node_reading,
    save,
    sharing,
    wanted_regions,
)
from evermesh.checkpoint.files import CHUNK_BYTES
from evermesh.parallelism.collectives import Communicator
from tests.checkpoint.states import local_storage
from tests.cluster import run_ranks

SHAPES = {"matrix": (1100, 700), "odd": (37, 5, 3), "fused": (90, 64), "scalar": (), "empty": (0, 4)}


def _logical() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return tensors | {"half": torch.randn(301, 50, generator=generator).bfloat16()}


def _rows(ranks: int) -> ShardMap:
    """By rows as ZeRO pads them, of ``fused`` in another order of its rows."""
    order = Permutation(0, ((60, 0, 30), (0, 30, 60)))
    return ShardMap(
        {name: _flat(tensor, ranks, order if name == "fused" else None) for name, tensor in _logical().items()}
    )


def _flat(tensor: Tensor, ranks: int, permutation: Permutation | None) -> TensorShards:
    each = -(-tensor.numel() // ranks)
    padding = Padding(None, each * ranks - tensor.numel()) if each * ranks > tensor.numel() else None
    shards = tuple(Shard(Interval(rank * each, (rank + 1) * each), (rank,)) for rank in range(ranks) if each)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorShards(dtype, tuple(tensor.shape), shards, permutation, padding)


def _columns(ranks: int) -> ShardMap:
    """By the last dim, and what cannot be cut on all ranks."""
    return ShardMap({name: _by_last(tensor, ranks) for name, tensor in _logical().items()})


def _by_last(tensor: Tensor, ranks: int) -> TensorShards:
    dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    if not tensor.numel() or not shape or shape[-1] < ranks:
        shards = (Shard(Box((0,) * len(shape), shape), tuple(range(ranks))),) if tensor.numel() else ()
        return TensorShards(dtype, shape, shards)
    edges = [shape[-1] * rank // ranks for rank in range(ranks + 1)]
    before, zeros = shape[:-1], (0,) * (len(shape) - 1)
    return TensorShards(
        dtype,
        shape,
        tuple(Shard(Box((*zeros, edges[of]), (*before, edges[of + 1] - edges[of])), (of,)) for of in range(ranks)),
    )


def _held(shard_map: ShardMap, rank: int, logical: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    of_rank = shard_map.of_rank(rank)
    return {
        name: [local_storage(region, shard_map.tensors[name].form, logical[name]).contiguous() for region in regions]
        for name, regions in of_rank.items()
    }


def _load(rank: int, ranks: int, folder: str, chunks: int, nodes: tuple[int, ...] = (0, 1, 2)) -> tuple[bool, int]:
    """Whether this rank has what it wanted, and the bytes that it read."""
    sharing._LEAST_SAVED_BYTES, sharing._ROUND_CHUNKS = 0, chunks
    node_reading._LEAST_SHARED_BYTES, node_reading._LEAST_RANKS = 0, 2
    node_reading._NODE_CHUNKS, node_reading._LEAST_CHUNKS = chunks, 1
    layout = _columns(ranks)
    right = _held(layout, rank, _logical())
    found = {name: [torch.full_like(tensor, 7) for tensor in tensors] for name, tensors in right.items()}
    wanted = wanted_regions(layout, rank, found)
    communicator = Communicator(dist.group.WORLD, nodes=nodes)
    result = load(Path(folder) / "step-00000001", wanted, shard_map=layout, communicator=communicator)
    return all(torch.equal(a, b) for n in right for a, b in zip(found[n], right[n], strict=True)), result.bytes_read


def _save(rank: int, ranks: int, folder: str) -> None:
    layout = _rows(ranks)
    save(folder, 1, layout, _held(layout, rank, _logical()), {}, communicator=Communicator(dist.group.WORLD))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two ranks."""
    folder = tmp_path_factory.mktemp("rows")
    run_ranks(2, _save, str(folder))
    return folder


@pytest.mark.parametrize(("chunks", "nodes"), [(1, (0, 1, 2)), (16, (0, 1, 2)), (1, (0, 0, 0)), (4, (0, 0, 0))])
def test_every_chunk_is_read_once_and_every_rank_gets_its_columns(
    saved: Path, chunks: int, nodes: tuple[int, ...]
) -> None:
    results = run_ranks(3, _load, str(saved), chunks, nodes)
    assert [is_right for is_right, _ in results] == [True] * 3
    sizes = [file.stat().st_size for file in saved.glob("step-*/rank-*.safetensors")]
    assert sum(num_bytes for _, num_bytes in results) == sum(sizes)
    assert max(num_bytes for _, num_bytes in results) <= sum(sizes) // 3 + CHUNK_BYTES


def _refused(rank: int, ranks: int, folder: str) -> str:
    try:
        _load(rank, ranks, folder, 1)
    except CheckpointCorrupt as error:
        return str(error)
    return ""


def test_a_flipped_bit_that_one_rank_reads_is_told_by_all(saved: Path, tmp_path: Path) -> None:
    import shutil

    path = Path(shutil.copytree(saved, tmp_path / "flipped"))
    file = path / "step-00000001" / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[CHUNK_BYTES + 17] ^= 4
    file.write_bytes(content)
    texts = run_ranks(3, _refused, str(path))
    assert all("chunk 1" in text for text in texts), texts
    assert sum("could not read its part" in text for text in texts) == 2


def test_the_stored_forms_of_this_test_are_not_those_of_plain_tensors() -> None:
    """So that permutation and padding are crossed."""
    forms = [tensor.form for tensor in _rows(2).tensors.values()]
    assert any(form.permutation for form in forms)
    assert any(form.padding for form in forms)
    assert StoredForm((1100, 700)) in forms
