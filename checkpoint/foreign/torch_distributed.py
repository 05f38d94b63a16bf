"""Checkpoints of torch.distributed.checkpoint (DCP): a pickled ``.metadata`` and files of chunks. Imports no torch.

Every chunk is a file of ``torch.save`` inside a file; where its elements begin is looked up when it is first read.
Tensors have their names there (``model.layers.0.weight``), everything else is an object.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from evermesh.checkpoint.errors import ForeignUnusable, ShardMapInvalid
from evermesh.checkpoint.foreign.fragments import whole
from evermesh.checkpoint.foreign.pickle_machine import MOST_PICKLE_BYTES, Class, Constant, Maker, PickleRefused
from evermesh.checkpoint.foreign.pickle_machine import Record as Made
from evermesh.checkpoint.foreign.pickles import read_pickle
from evermesh.checkpoint.foreign.torch_files import TORCH, Part, TorchTensor, read_torch_file
from evermesh.checkpoint.foreign.values import Values
from evermesh.checkpoint.format import Extent, StoredTensor
from evermesh.checkpoint.regions import Box
from evermesh.checkpoint.sources import Source, inside, plain_files

METADATA = ".metadata"
_AGAIN = "Copy the checkpoint again, or load an earlier one."
_PLACE = "torch.distributed.checkpoint"
_CLASSES = (
    *(f"{_PLACE}.metadata.{name}" for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata")),
    *(f"{_PLACE}.metadata.{name}" for name in ("ChunkStorageMetadata", "MetadataIndex", "TensorProperties")),
    *(f"{_PLACE}.metadata.{name}" for name in ("StorageMeta", "_MEM_FORMAT_ENCODING")),
    f"{_PLACE}.filesystem._StorageInfo",
    f"{_PLACE}.filesystem._StoragePrefix",
    "torch.serialization._get_layout",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
)
_MAKERS: dict[str, Maker | Constant] = TORCH | {name: Class(name.rpartition(".")[2]) for name in _CLASSES}


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Where a chunk of a tensor, or an object, is a file inside a file."""

    file: str
    start: int
    num_bytes: int


def open_torch_distributed(path: Path) -> Source:
    """Index the checkpoint in a folder.

    Raises:
        ForeignUnusable: ``.metadata`` is damaged or asks for what is not known, a file is missing, or chunks are
            compressed.
    """
    metadata = _metadata(path / METADATA)
    try:
        chunks = dict(_chunks(metadata))
        tensors, objects = {}, []
        for name, entry in metadata.get("state_dict_metadata").items():
            if entry.name == "TensorStorageMetadata":
                tensors[name] = _tensor(name, entry, chunks)
            else:
                objects.append((name, chunks[name, None]))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, ForeignUnusable):
            raise
        fact = f"it is not as torch writes it ({type(error).__name__}: {str(error)[:200]})"
        raise ForeignUnusable(path / METADATA, fact, _AGAIN) from error
    values = Values(path)
    files = plain_files(path, tensors)
    found: dict[str, JsonValue] = {}
    for name, chunk in objects:
        place = Part(inside(path, chunk.file), chunk.start, chunk.num_bytes)
        found |= values.objects({name: read_torch_file(place, refuse_unknown=False)}, "")
    of_objects = {name: whole(path, name, tensor) for name, tensor in values.tensors.items() if name not in tensors}
    dtypes = {(e.file, e.offset): tensor.dtype for tensor in tensors.values() for e in tensor.extents}
    locator = _Locator(path, {(c.file, c.start): c.num_bytes for c in chunks.values()}, dtypes)
    return Source(
        path,
        "torch-distributed",
        tensors | of_objects,
        files | plain_files(path, of_objects),
        found,
        {"library": "torch", "version": values.json(metadata.get("version"), "version")},
        left_out=tuple(values.left_out),
        locate=locator,
    )


def archives(source: Source) -> Iterator[Part]:
    """The files inside the files of a checkpoint that ``open_torch_distributed`` opened."""
    assert isinstance(source.locate, _Locator)
    for (file, start), num_bytes in source.locate.num_bytes.items():
        yield Part(inside(source.path, file), start, num_bytes)


def _metadata(file: Path) -> Made:
    try:
        if file.stat().st_size > MOST_PICKLE_BYTES:
            raise ForeignUnusable(file, f"it has more than {MOST_PICKLE_BYTES:,} bytes", _AGAIN)
        found = read_pickle(file.read_bytes(), _MAKERS)
    except OSError as error:
        raise ForeignUnusable(file, f"it cannot be read: {error.strerror}", _AGAIN) from error
    except PickleRefused as error:
        raise ForeignUnusable(file, str(error), _AGAIN) from error
    if not isinstance(found, Made) or found.name != "Metadata":
        raise ForeignUnusable(file, "it is no metadata of a distributed checkpoint", _AGAIN)
    return found


def _chunks(metadata: Made) -> Iterator[tuple[tuple[str, tuple[int, ...] | None], _Chunk]]:
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


def _tensor(name: str, entry: Made, chunks: dict[tuple[str, tuple[int, ...] | None], _Chunk]) -> StoredTensor:
    extents = []
    for chunk in entry.get("chunks"):
        box = Box(tuple(chunk.get("offsets")), tuple(chunk.get("sizes")))
        place = chunks[name, box.offsets]
        extents.append(Extent(place.file, place.start, box, 0, box.num_elements))
    dtype = entry.get("properties").state[0]
    stored = StoredTensor(dtype, tuple(entry.get("size")), tuple(extents))
    stored.check_cover(name)
    return stored


class _Locator:
    """Looks up where the elements of a chunk begin, once."""

    def __init__(self, path: Path, num_bytes: dict[tuple[str, int], int], dtypes: dict[tuple[str, int], str]) -> None:
        self.path, self.num_bytes, self.dtypes = path, num_bytes, dtypes
        self.found: dict[tuple[str, int], int] = {}

    def __call__(self, extent: Extent) -> int:
        place = (extent.file, extent.offset)
        if place not in self.num_bytes:  # of a tensor in an object, which is where its extent says
            return extent.offset
        if place not in self.found:
            part = Part(inside(self.path, extent.file), extent.offset, self.num_bytes[place])
            self.found[place] = self._position(part, extent)
        return self.found[place]

    def _position(self, part: Part, extent: Extent) -> int:
        tensor = read_torch_file(part)
        region = extent.region
        assert isinstance(region, Box)
        expected = (region.sizes, self.dtypes[extent.file, extent.offset])
        if not isinstance(tensor, TorchTensor) or (tensor.shape, tensor.dtype) != expected:
            raise ForeignUnusable(part.file, f"the bytes from {part.start:,} on are not the chunk {region}", _AGAIN)
        if not tensor.is_contiguous:
            fact = f"the chunk {region} at byte {part.start:,} has the strides {list(tensor.stride)}"
            raise ForeignUnusable(part.file, fact, "Make the tensor contiguous before it is saved.")
        return tensor.position
