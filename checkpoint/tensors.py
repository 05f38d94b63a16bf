"""Tensors as the bytes of their row-major storage."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch

from evermesh.checkpoint.errors import ShardMapInvalid
from evermesh.checkpoint.files import ByteArray
from evermesh.checkpoint.shard_map import Region, ShardMap

Held = Mapping[str, torch.Tensor | Sequence[torch.Tensor]]
"""The local storage of each region that a rank holds of each tensor, in the order of the shard map."""

SLICE_BYTES = 16 << 20


@runtime_checkable
class Elements(Protocol):
    """What stands for a tensor that is not in memory when it is saved."""

    dtype: torch.dtype

    def numel(self) -> int:
        """Elements of the tensor."""

    def slices(self, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes of elements [start, stop) in row-major order, at most 16 MiB at a time."""


def dtype_name(tensor: torch.Tensor | Elements) -> str:
    """Name of the dtype of a tensor, such as ``bfloat16``."""
    return str(tensor.dtype).removeprefix("torch.")


def host_slices(tensor: torch.Tensor | Elements, start: int, stop: int) -> Iterator[memoryview]:
    """The bytes of elements [start, stop) of ``tensor`` in row-major order, at most 16 MiB at a time.

    A contiguous tensor on the host is not copied; one on a device is copied slice by slice.
    """
    if not isinstance(tensor, torch.Tensor):
        yield from tensor.slices(start, stop)
        return
    flat = tensor.detach().reshape(-1)
    step = max(1, SLICE_BYTES // flat.element_size())
    for begin in range(start, stop, step):
        yield byte_view(flat[begin : min(begin + step, stop)].cpu()).data


def byte_view(tensor: torch.Tensor) -> ByteArray:
    """The storage of a contiguous host tensor as bytes; writing to it writes the tensor. Any dtype, bfloat16 too."""
    return tensor.detach().view(-1).view(torch.uint8).numpy()


def held_tensor(held: Held, name: str, index: int) -> torch.Tensor:
    """The storage of one of the regions that are held of a tensor."""
    regions = held[name]
    return regions if isinstance(regions, torch.Tensor) else regions[index]


def local_tensors(shard_map: ShardMap, rank: int, tensors: Held) -> dict[str, list[tuple[Region, torch.Tensor]]]:
    """Pair the regions that ``rank`` holds with the tensors that store them.

    Raises:
        ShardMapInvalid: names every tensor that is missing, unknown to the map, or of another dtype or size.
    """
    regions = shard_map.of_rank(rank)
    given = {name: [held] if isinstance(held, torch.Tensor) else list(held) for name, held in tensors.items()}
    problems = [f"{name} is not in the shard map for rank {rank}" for name in given.keys() - regions.keys()]
    for name, wanted in regions.items():
        problems += _problems(name, shard_map.tensors[name].dtype, wanted, given.get(name, []))
    if problems:
        raise ShardMapInvalid(
            f"the tensors of rank {rank} do not fit the shard map: {'; '.join(sorted(problems))}. Give for each tensor "
            f"of the map the storage of every region that the rank holds, and nothing else."
        )
    return {name: list(zip(regions[name], given[name], strict=True)) for name in regions}


def _problems(name: str, dtype: str, regions: Sequence[Region], tensors: Sequence[torch.Tensor]) -> list[str]:
    if len(regions) != len(tensors):
        return [f"{name} has {len(tensors)} tensors for {len(regions)} regions"]
    return [
        f"{name}{region} is {dtype} of {region.num_elements} elements, but its tensor is {dtype_name(tensor)} of "
        f"{tensor.numel()}"
        for region, tensor in zip(regions, tensors, strict=True)
        if (dtype_name(tensor), tensor.numel()) != (dtype, region.num_elements)
    ]
