"""Checkpoints of torch.distributed.checkpoint (DCP): a pickled ``.metadata`` and files of chunks. Imports no torch.

Every chunk is a file of ``torch.save`` inside a file; where its elements begin is looked up when it is first read.
Tensors have their names there (``model.layers.0.weight``), everything else is an object. Ranks that saved without
collectives have a ``.metadata`` each.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from evermesh.checkpoint.cutting import regions_of_interval
from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.errors import DAMAGE, ForeignUnusable, ShardMapInvalid, StoreUnusable
from evermesh.checkpoint.foreign.fragments import whole
from evermesh.checkpoint.foreign.pickle_machine import MOST_PICKLE_BYTES, Class, Constant, Maker, PickleRefused
from evermesh.checkpoint.foreign.pickle_machine import Record as Made
from evermesh.checkpoint.foreign.pickles import read_pickle
from evermesh.checkpoint.foreign.torch_files import TORCH, Part, TorchTensor, read_torch_file
from evermesh.checkpoint.foreign.values import Values
from evermesh.checkpoint.format import Extent, StoredTensor
from evermesh.checkpoint.regions import Box, Region
from evermesh.checkpoint.sources import Source, inside, plain_files
from evermesh.checkpoint.stores.looking import files_in, is_file, num_bytes
from evermesh.checkpoint.stores.places import Place
from evermesh.checkpoint.stores.store import store_of

METADATA = ".metadata"
_AGAIN = "Copy the checkpoint again, or load an earlier one."
_PLACE = "torch.distributed.checkpoint"
_CLASSES = (
    *(f"{_PLACE}.metadata.{name}" for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata")),
    *(f"{_PLACE}.metadata.{name}" for name in ("ChunkStorageMetadata", "MetadataIndex", "TensorProperties")),
    *(f"{_PLACE}.metadata.{name}" for name in ("StorageMeta", "_MEM_FORMAT_ENCODING")),
    *(f"{_PLACE}.planner.{name}" for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    f"{_PLACE}.planner.BytesIOWriteData",
    *(f"megatron.core.dist_checkpointing.strategies.torch.{name}" for name in ("MCoreMetadata", "MCoreSavePlan")),
    f"{_PLACE}.filesystem._StorageInfo",
    f"{_PLACE}.filesystem._StoragePrefix",
    "torch.serialization._get_layout",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
)
_MAKERS: dict[str, Maker | Constant] = TORCH | {name: Class(name.rpartition(".")[2]) for name in _CLASSES}


_OF_RANK = re.compile(r"__(\d+)\.metadata")
_FLATTENED = "nd_reformulated_orig_global_shape"
"""Under which Megatron Core notes that chunks of a tensor are intervals of its boxes."""
_Key = tuple[str, tuple[int, ...] | None]
"""Name and offsets of a chunk (objects: None)."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Where a chunk of a tensor, or an object, is a file inside a file."""

    file: str
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Place:
    """A part of a chunk that is an extent."""

    chunk: _Chunk
    sizes: tuple[int, ...]
    """Of the chunk."""
    dtype: str


def open_torch_distributed(path: Place) -> Source:
    """Index the checkpoint in a folder.

    Raises:
        ForeignUnusable: ``.metadata`` is damaged or asks for what is not known, a file is missing, or chunks are
            compressed.
    """
    try:
        read = _Index(path)
    except DAMAGE as error:
        if isinstance(error, ForeignUnusable):
            raise
        fact = f"it is not as torch writes it ({type(error).__name__}: {str(error)[:200]})"
        raise ForeignUnusable(path / METADATA, fact, _AGAIN) from error
    values, tensors = Values(path), read.tensors
    files = plain_files(path, tensors)
    for chunk in {place.chunk: None for place in read.places.values()}:
        if chunk.start + chunk.num_bytes > files[chunk.file].num_bytes:
            fact = f"it ends at byte {files[chunk.file].num_bytes:,}, in the middle of a chunk"
            raise ForeignUnusable(path / chunk.file, fact, _AGAIN)
    found: dict[str, JsonValue] = {}
    for name, chunk in read.objects:
        place = Part(inside(path, chunk.file), chunk.start, chunk.num_bytes)
        found |= values.objects({name: read_torch_file(place, refuse_unknown=False)}, "")
    of_objects = {name: whole(path, name, tensor) for name, tensor in values.tensors.items() if name not in tensors}
    return Source(
        path,
        "torch-distributed",
        tensors | of_objects,
        files | plain_files(path, of_objects),
        found,
        {"library": "torch", "version": values.json(read.version, "version")},
        left_out=tuple(values.left_out),
        locate=_Locator(path, read.places),
    )


def archives(source: Source) -> Iterator[Part]:
    """The files inside the files of a checkpoint, none if it has another form."""
    places = source.locate.places if isinstance(source.locate, _Locator) else {}
    for chunk in dict.fromkeys(place.chunk for place in places.values()):
        yield Part(inside(source.path, chunk.file), chunk.start, chunk.num_bytes)


class _Index:
    """What ``.metadata`` says, or those of all ranks together."""

    def __init__(self, path: Place) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self.objects: list[tuple[str, _Chunk]] = []
        self.places: dict[tuple[str, int], _Place] = {}
        every = [_metadata(file) for file in _metadata_files(path)]
        self.version = every[0].get("version")
        chunks: dict[_Key, _Chunk] = {}
        boxes: dict[str, dict[tuple[int, ...], Box]] = {}
        entries: dict[str, Made] = {}
        for metadata in every:
            for key, chunk in _chunks(metadata):
                chunks.setdefault(key, chunk)
            for name, entry in metadata.get("state_dict_metadata").items():
                known = entries.setdefault(name, entry)
                if entry.name == "TensorStorageMetadata":
                    self._check_same(name, known, entry)
                    of_entry = ((tuple(c.get("offsets")), tuple(c.get("sizes"))) for c in entry.get("chunks"))
                    boxes.setdefault(name, {}).update((offsets, Box(offsets, sizes)) for offsets, sizes in of_entry)
        whole_shapes = every[0].get("mcore_data") or {}
        for name, entry in entries.items():
            if entry.name != "TensorStorageMetadata":
                self.objects.append((name, chunks[name, None]))
                continue
            flattened = whole_shapes.get(name, {}).get(_FLATTENED)
            parts = [(box, chunks[name, box.offsets]) for box in boxes[name].values()]
            self.tensors[name] = self._tensor(name, entry, parts, None if flattened is None else tuple(flattened))

    def _check_same(self, name: str, one: Made, other: Made) -> None:
        if one.name != other.name or tuple(one.get("size")) != tuple(other.get("size")):
            raise ShardMapInvalid(f"ranks differ in the shape of {name}")

    def _tensor(
        self, name: str, entry: Made, parts: "list[tuple[Box, _Chunk]]", flattened: tuple[int, ...] | None
    ) -> StoredTensor:
        extents, dtype, size = [], entry.get("properties").state[0], tuple(entry.get("size"))
        for box, chunk in parts:
            if box.num_elements * DTYPES[dtype].num_bytes > chunk.num_bytes:
                raise ShardMapInvalid(f"{name} {box} of {dtype} is said to be in {chunk.num_bytes:,} bytes")
            position = chunk.start
            for region in (box,) if flattened is None else _flat_regions(box, size, flattened):
                extents.append(Extent(chunk.file, position, region, 0, region.num_elements))
                self.places[chunk.file, position] = _Place(chunk, box.sizes, dtype)
                position += region.num_elements * DTYPES[dtype].num_bytes
        stored = StoredTensor(dtype, flattened or size, tuple(extents))
        stored.check_cover(name)
        return stored


def _flat_regions(box: Box, size: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[Region]:
    """What a chunk of Megatron Core before 0.14 is of a tensor whose boxes were flattened and cut.

    Its first dims count the boxes of a grid, the last one the elements of a box.
    """
    counts, at = size[:-1], box.offsets[:-1]
    if len(counts) != len(shape) or math.prod(box.sizes[:-1]) != 1:
        raise ShardMapInvalid(f"a flattened chunk is {box} of {size} for {shape}")
    local = tuple(whole // count for whole, count in zip(shape, counts, strict=True))
    if tuple(n * count for n, count in zip(local, counts, strict=True)) != shape or math.prod(local) != size[-1]:
        raise ShardMapInvalid(f"flattened boxes {counts} of {size[-1]} elements are not those of {shape}")
    offsets = tuple(index * n for index, n in zip(at, local, strict=True))
    yield from regions_of_interval(Box(offsets, local), shape, box.offsets[-1], box.offsets[-1] + box.sizes[-1])


def _metadata_files(path: Place) -> list[Place]:
    """Of the checkpoint, or of every rank."""
    if is_file(path / METADATA):
        return [path / METADATA]
    ranks = {int(match[1]): file for file in files_in(path) if (match := _OF_RANK.fullmatch(file.name))}
    if sorted(ranks) != list(range(len(ranks))):
        raise ForeignUnusable(path, f"of ranks 0 to {max(ranks)} some lack their metadata", _AGAIN)
    return [ranks[rank] for rank in sorted(ranks)]


def _metadata(file: Place) -> Made:
    try:
        if num_bytes(file) > MOST_PICKLE_BYTES:
            raise ForeignUnusable(file, f"it has more than {MOST_PICKLE_BYTES:,} bytes", _AGAIN)
        found = read_pickle(store_of(file).read(file), _MAKERS)
    except StoreUnusable:
        raise
    except OSError as error:
        raise ForeignUnusable(file, f"it cannot be read: {error.strerror}", _AGAIN) from error
    except PickleRefused as error:
        raise ForeignUnusable(file, str(error), _AGAIN) from error
    if not isinstance(found, Made) or found.name not in ("Metadata", "MCoreMetadata"):
        raise ForeignUnusable(file, "it is no metadata of a distributed checkpoint", _AGAIN)
    return found


def _chunks(metadata: Made) -> Iterator[tuple[_Key, _Chunk]]:
    """By name and offsets (objects: None)."""
    for index, info in metadata.get("storage_data").items():
        if info.get("transform_descriptors"):
            raise ShardMapInvalid(f"{index.get('fqn')} is compressed: {str(info.get('transform_descriptors'))[:50]}")
        file, start, num_bytes = (info.get(key) for key in ("relative_path", "offset", "length"))
        if (
            not isinstance(file, str)
            or type(start) is not int
            or type(num_bytes) is not int
            or min(start, num_bytes) < 0
        ):
            raise TypeError("a place in a file is not described as torch does")
        offsets = index.get("offset")
        yield (index.get("fqn"), None if offsets is None else tuple(offsets)), _Chunk(file, start, num_bytes)


class _Locator:
    """Looks up where the elements of a chunk begin, once."""

    def __init__(self, path: Place, places: Mapping[tuple[str, int], _Place]) -> None:
        self.path, self.places = path, places
        self.found: dict[_Chunk, int] = {}

    def __call__(self, extent: Extent) -> int:
        place = self.places.get((extent.file, extent.offset))
        if place is None:  # of a tensor in an object, which is where its extent says
            return extent.offset
        chunk = place.chunk
        if chunk not in self.found:
            self.found[chunk] = self._position(Part(inside(self.path, chunk.file), chunk.start, chunk.num_bytes), place)
        return self.found[chunk] + extent.offset - chunk.start

    def _position(self, part: Part, place: _Place) -> int:
        tensor = read_torch_file(part)
        if not isinstance(tensor, TorchTensor) or (tensor.shape, tensor.dtype) != (place.sizes, place.dtype):
            fact = f"the bytes from {part.start:,} on are not a chunk of {list(place.sizes)} {place.dtype}"
            raise ForeignUnusable(part.file, fact, _AGAIN)
        if not tensor.is_contiguous:
            fact = f"the chunk of {list(place.sizes)} at byte {part.start:,} has the strides {list(tensor.stride)}"
            raise ForeignUnusable(part.file, fact, "Make the tensor contiguous before it is saved.")
        return tensor.position
