"""Loading: any topology asks for its regions and reads only the chunks that hold them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import JsonValue

from evermesh.checkpoint.coverage import check_cover
from evermesh.checkpoint.directory import read_manifest
from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.errors import CheckpointCorrupt, CheckpointMismatch, ShardMapInvalid
from evermesh.checkpoint.format import MANIFEST, Manifest, StoredTensor
from evermesh.checkpoint.reading import ChunkReader, FileRuns, read_runs
from evermesh.checkpoint.regions import Region, StoredForm, intersect, logical_runs
from evermesh.checkpoint.shard_map import ShardMap
from evermesh.checkpoint.tensors import Held, byte_view, dtype_name, local_tensors

Target = tuple[Region, torch.Tensor]
"""A region, and the tensor whose row-major elements it is to fill."""
Wanted = Mapping[str, Target | Sequence[Target]]


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What a checkpoint says besides its tensors, which are filled in place."""

    objects: dict[str, JsonValue]
    step: int
    description: dict[str, JsonValue]
    world_size: int
    """Ranks that saved it."""
    bytes_read: int
    """Bytes read from data files by this call: the chunks of 1 MiB that hold wanted elements."""


def wanted_regions(shard_map: ShardMap, rank: int, tensors: Held) -> dict[str, list[Target]]:
    """What ``rank`` asks of ``load`` to fill the ``tensors`` that it holds by ``shard_map``, given as to ``save``."""
    return local_tensors(shard_map, rank, tensors)


def load(path: Path | str, wanted: Wanted, *, shard_map: ShardMap | None = None, strict: bool = True) -> LoadResult:
    """Fill the wanted tensors in place, bit for bit as they were saved, whatever topology saved them.

    Not collective. Regions are in the logical form of their tensor, or, with ``shard_map`` (the map of the caller), in
    the form it gives; padding in a tensor is left as it is. With ``shard_map``, dtypes and shapes of all its tensors
    are compared, and tensors of other ranks do not count as extra. Extra memory is one chunk per call, and a copy of
    a tensor that is on a device or not contiguous.

    Raises:
        CheckpointNotFound: there is no checkpoint at ``path``.
        CheckpointMismatch: tensors are missing, extra (when ``strict``), or differ in dtype or shape; names all of
            them. Nothing was read.
        CheckpointCorrupt: bytes are not those that were saved; some tensors are filled and some are not.
    """
    path = Path(path)
    manifest = read_manifest(path)
    targets = {name: _as_list(entry) for name, entry in wanted.items()}
    forms = {name: tensor.form for name, tensor in shard_map.tensors.items()} if shard_map is not None else {}
    differences = _differences(manifest, targets, shard_map, forms, strict)
    if differences:
        raise CheckpointMismatch(path, differences)
    bytes_read = _fill(path, manifest, targets, forms)
    return LoadResult(manifest.objects, manifest.step, manifest.description, manifest.world_size, bytes_read)


def _as_list(entry: Target | Sequence[Target]) -> list[Target]:
    if len(entry) == 2 and isinstance(entry[1], torch.Tensor):
        return [entry]  # type: ignore[list-item]
    return list(entry)  # type: ignore[arg-type]


def _differences(
    manifest: Manifest,
    targets: Mapping[str, list[Target]],
    shard_map: ShardMap | None,
    forms: Mapping[str, StoredForm],
    strict: bool,
) -> list[str]:
    known = targets.keys() | forms.keys()
    missing = [
        f"missing in the checkpoint: {name}{_sizes(targets, name, forms)}" for name in known - manifest.tensors.keys()
    ]
    extra = [
        f"extra in the checkpoint: {name} {manifest.tensors[name].dtype} {list(manifest.tensors[name].shape)}"
        for name in (manifest.tensors.keys() - known if strict else ())
    ]
    differing: list[str] = []
    for name in sorted(known & manifest.tensors.keys()):
        stored = manifest.tensors[name]
        if shard_map is not None and name in forms:
            dtype, shape = shard_map.tensors[name].dtype, shard_map.tensors[name].shape
            if (dtype, shape) != (stored.dtype, stored.shape):
                differing.append(
                    f"{name} is {stored.dtype} {list(stored.shape)} there, {dtype} {list(shape)} is wanted"
                )
                continue
        for region, tensor in targets.get(name, ()):
            differing += _target_differences(name, stored, forms.get(name, StoredForm(stored.shape)), region, tensor)
    return sorted(missing) + sorted(extra) + differing


def _sizes(targets: Mapping[str, list[Target]], name: str, forms: Mapping[str, StoredForm]) -> str:
    if name in forms:
        return f" {list(forms[name].shape)}"
    return "".join(f" {dtype_name(tensor)} {region}" for region, tensor in targets[name])


def _target_differences(
    name: str, stored: StoredTensor, form: StoredForm, region: Region, tensor: torch.Tensor
) -> list[str]:
    there = f"{name} is {stored.dtype} {list(stored.shape)} there"
    try:
        form.check()
        form.check_inside(region)
    except ShardMapInvalid as error:
        return [f"{there}: {error}"]
    if dtype_name(tensor) != stored.dtype:
        return [f"{there}, {dtype_name(tensor)} is wanted; convert after loading"]
    if tensor.numel() != region.num_elements:
        return [f"{there}; {region} of it has {region.num_elements} elements, its tensor {tensor.numel()}"]
    return []


def _fill(path: Path, manifest: Manifest, targets: Mapping[str, list[Target]], forms: Mapping[str, StoredForm]) -> int:
    runs: dict[str, list[FileRuns]] = {}
    staged: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, of_tensor in targets.items():
        stored = manifest.tensors[name]
        for region, tensor in of_tensor:
            host = tensor.detach()
            if host.device.type != "cpu" or not host.is_contiguous():
                # a copy, not an empty tensor: padding stays as it is
                host = host.cpu().clone(memory_format=torch.contiguous_format)
                staged.append((tensor, host))
            form = forms.get(name, StoredForm(stored.shape))
            _plan(path, name, stored, form, region, host, runs)
    bytes_read = _read(path, manifest, runs)
    with torch.no_grad():
        for tensor, host in staged:
            tensor.copy_(host)
    return bytes_read


def _plan(
    path: Path,
    name: str,
    stored: StoredTensor,
    form: StoredForm,
    region: Region,
    host: torch.Tensor,
    runs: dict[str, list[FileRuns]],
) -> None:
    """Add to ``runs``, by file, what fills one target; prove first that the extents hold all of it."""
    item, found = DTYPES[stored.dtype].num_bytes, 0
    for extent in stored.extents:
        shared = intersect(extent.region, stored.form, region, form).clip(extent.start, extent.stop)
        if not len(shared.length):
            continue
        found += shared.num_elements
        entry = FileRuns(
            extent.offset + shared.source * item, shared.destination * item, shared.length * item, byte_view(host), item
        )
        runs.setdefault(extent.file, []).append(entry)
    if found != logical_runs(region, form).num_elements:
        _refuse_cover(path, name, stored)


def _refuse_cover(path: Path, name: str, stored: StoredTensor) -> None:
    try:
        check_cover(stored.form, tuple((extent.region, extent.start, extent.stop) for extent in stored.extents))
    except ShardMapInvalid as error:
        raise CheckpointCorrupt(path / MANIFEST, f"tensor {name}: {error}") from error
    raise AssertionError(f"{name}: runs do not add up although its extents cover it")


def _read(path: Path, manifest: Manifest, runs: Mapping[str, list[FileRuns]]) -> int:
    bytes_read = 0
    for name in sorted(runs):
        with ChunkReader(path, manifest, name) as reader:
            read_runs(reader, runs[name])
        bytes_read += reader.bytes_read
    return bytes_read
