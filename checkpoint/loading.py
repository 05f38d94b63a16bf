"""Loading: any topology asks for its regions and reads only the bytes that hold them, from any format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import JsonValue

from evermesh.checkpoint.errors import CheckpointMismatch, ShardMapInvalid
from evermesh.checkpoint.filling import Target, fill
from evermesh.checkpoint.naming import Naming
from evermesh.checkpoint.node_reading import fill_on_node
from evermesh.checkpoint.opening import open_checkpoint
from evermesh.checkpoint.regions import Region, StoredForm
from evermesh.checkpoint.shard_map import ShardMap
from evermesh.checkpoint.sharing import JointLoad, fill_together, is_worth_it
from evermesh.checkpoint.sources import Found, Source, find
from evermesh.checkpoint.stores.places import Place
from evermesh.checkpoint.tensors import Held, dtype_name, local_tensors
from evermesh.parallelism.collectives import Communicator

Wanted = Mapping[str, Target | Sequence[Target]]
FLOATING = ("float64", "float32", "float16", "bfloat16")
"""Types between which values of foreign checkpoints are converted."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What a checkpoint says besides its tensors, which are filled in place."""

    objects: dict[str, JsonValue]
    step: int | None
    """None: the format does not say."""
    description: dict[str, JsonValue]
    world_size: int | None
    """Ranks that saved it; None: the format does not say."""
    bytes_read: int
    """Bytes read from files of tensors by this call: what was wanted, rounded to chunks of 1 MiB where the format has
    checksums."""


def wanted_regions(shard_map: ShardMap, rank: int, tensors: Held) -> dict[str, list[Target]]:
    """What ``rank`` asks of ``load`` to fill the ``tensors`` that it holds by ``shard_map``, given as to ``save``."""
    return local_tensors(shard_map, rank, tensors)


def load(
    checkpoint: Place | str | Source,
    wanted: Wanted,
    *,
    shard_map: ShardMap | None = None,
    strict: bool = True,
    names: Naming | None = None,
    communicator: Communicator | None = None,
) -> LoadResult:
    """Fill the wanted tensors in place, bit for bit as they were saved, whatever topology saved them.

    Regions are in the logical form of their tensor, or, with ``shard_map`` (the map of the caller), in the form it gives;
    padding in a tensor is left as it is. With ``shard_map``, dtypes and shapes of all its tensors are compared, and
    tensors of other ranks do not count as extra. ``names`` is a table of how the tensors of the caller are called and cut
    in the checkpoint; None: by the same names. Floating values of a foreign checkpoint are converted to the types of the
    tensors; other types must be equal. Extra memory is one chunk per call, and copies of tensors that are converted, on a
    device or not contiguous (of a foreign checkpoint 256 MiB at a time); from an object store 128 MiB more.

    Not collective, unless ``communicator`` is given, which takes tensors on the host: then all its ranks call it, with the
    ``shard_map`` of them all. Where they want parts of the same chunks, each chunk is read by one of them, if that saves
    much (``evermesh.checkpoint.sharing``); extra memory is then 64 MiB.

    Raises:
        CheckpointNotFound: there is no checkpoint at a path.
        StoreUnusable: it is in an object store that does not answer, or refuses.
        ForeignUnusable: it is one of another project, and cannot be read.
        CheckpointMismatch: tensors are missing, extra (when ``strict``), or differ in dtype or shape; names all of
            them. Nothing was read.
        CheckpointCorrupt: bytes are not those that were saved; some tensors are filled and some are not.
    """
    source = checkpoint if isinstance(checkpoint, Source) else open_checkpoint(checkpoint)
    targets = {name: _as_list(entry) for name, entry in wanted.items()}
    forms = {name: tensor.form for name, tensor in shard_map.tensors.items()} if shard_map is not None else {}
    found, misfits = find(source, names)
    differences = misfits + _Comparison(source, found, targets, shard_map, forms).differences(names, strict=strict)
    if differences:
        raise CheckpointMismatch(source.path, differences)
    bytes_read = _fill(source, found, targets, shard_map, communicator if names is None else None)
    return LoadResult(dict(source.objects), source.step, dict(source.description), source.world_size, bytes_read)


def _fill(
    source: Source,
    found: Mapping[str, Found],
    targets: Mapping[str, list[Target]],
    shard_map: ShardMap | None,
    communicator: Communicator | None,
) -> int:
    """Alone or together; returns the bytes that this rank has read. What others saved has no chunks: it is read exactly."""
    forms = {name: tensor.form for name, tensor in shard_map.tensors.items()} if shard_map is not None else {}
    if shard_map is None or communicator is None or communicator.size == 1 or source.is_foreign:
        return fill(source, found, targets, forms)
    joint = JointLoad(shard_map, targets, found, communicator)
    if is_worth_it(source, joint):
        return fill_together(source, joint)
    return fill_on_node(source, found, targets, forms, communicator)


def _as_list(entry: Target | Sequence[Target]) -> list[Target]:
    if len(entry) == 2 and isinstance(entry[1], torch.Tensor):
        return [entry]  # type: ignore[list-item]
    return list(entry)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class _Comparison:
    """What a caller wants, against what there is."""

    source: Source
    found: Mapping[str, Found]
    targets: Mapping[str, list[Target]]
    shard_map: ShardMap | None
    forms: Mapping[str, StoredForm]

    def differences(self, names: Naming | None, *, strict: bool) -> list[str]:
        """One line for each; none if everything fits."""
        known = self.targets.keys() | self.forms.keys()
        missing = [f"missing in the checkpoint: {name}{self._sizes(name)}" for name in known - self.found.keys()]
        asked = known if names is None else names.foreign_shapes.keys()
        extra = [
            f"extra in the checkpoint: {name} {tensor.dtype} {list(tensor.shape)}"
            for name, tensor in (self.source.tensors.items() if strict else ())
            if name not in asked and not (names is not None and names.is_unread(name))
        ]
        differing: list[str] = []
        for name in sorted(known & self.found.keys()):
            differing += self._of_tensor(name)
        return sorted(missing) + sorted(extra) + differing

    def _sizes(self, name: str) -> str:
        if name in self.forms:
            return f" {list(self.forms[name].shape)}"
        return "".join(f" {dtype_name(tensor)} {region}" for region, tensor in self.targets[name])

    def _of_tensor(self, name: str) -> list[str]:
        stored = self.found[name]
        if self.shard_map is not None and name in self.forms:
            dtype, shape = self.shard_map.tensors[name].dtype, self.shard_map.tensors[name].shape
            if shape != stored.shape or not self._is_taken(stored.dtype, dtype):
                return [f"{name} is {stored.dtype} {list(stored.shape)} there, {dtype} {list(shape)} is wanted"]
        form = self.forms.get(name, StoredForm(stored.shape))
        return [
            line
            for region, tensor in self.targets.get(name, ())
            for line in self._of_target(name, form, region, tensor)
        ]

    def _of_target(self, name: str, form: StoredForm, region: Region, tensor: torch.Tensor) -> list[str]:
        stored = self.found[name]
        there = f"{name} is {stored.dtype} {list(stored.shape)} there"
        try:
            form.check()
            form.check_inside(region)
        except ShardMapInvalid as error:
            return [f"{there}: {error}"]
        if not self._is_taken(stored.dtype, dtype_name(tensor)):
            return [f"{there}, {dtype_name(tensor)} is wanted; convert after loading"]
        if tensor.numel() != region.num_elements:
            return [f"{there}; {region} of it has {region.num_elements} elements, its tensor {tensor.numel()}"]
        return []

    def _is_taken(self, stored: str, wanted: str) -> bool:
        """Whether values of one type may fill a tensor of the other."""
        return stored == wanted or (self.source.is_foreign and stored in FLOATING and wanted in FLOATING)
