"""Files of ``torch.save``, indexed: a tensor becomes the place of its bytes, everything else a plain value.

Such a file is a zip archive whose entries are not compressed: ``data.pkl`` describes the object, ``data/N`` are the
bytes of its storages. Only the directory of the archive and the pickle are read. Imports no torch.
"""

import io
import math
import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.errors import DAMAGE, ForeignUnusable, StoreUnusable
from evermesh.checkpoint.foreign.pickle_machine import MOST_PICKLE_BYTES, Class, Constant, Maker, PickleRefused
from evermesh.checkpoint.foreign.pickles import read_pickle
from evermesh.checkpoint.stores.looking import opened
from evermesh.checkpoint.stores.places import Place

_STORAGES = {
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "ComplexFloatStorage": "complex64",
}
_BYTES = "uint8"
_MOST_DIMS = 64
_BLOCK_BYTES = 1 << 20
_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
_AGAIN = "Copy the checkpoint again, or load an earlier one."


@dataclass(frozen=True, slots=True)
class StorageType:
    """A class of storages."""

    dtype: str


@dataclass(frozen=True, slots=True)
class Storage:
    """The bytes that tensors are views of."""

    position: int
    """Of the first byte in the file."""
    num_bytes: int
    dtype: str


@dataclass(frozen=True, slots=True)
class TorchTensor:
    """Where the elements of a tensor are."""

    file: Place
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """Elements from one index to the next, by dim."""
    position: int
    """Of the first element in the file, bytes."""

    @property
    def num_elements(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return self.num_elements == 0
            expected *= size
        return True


@dataclass(frozen=True, slots=True)
class Part:
    """A file, or a stretch of one that is a file of its own."""

    file: Place
    start: int = 0
    num_bytes: int | None = None
    """None: up to the end of the file."""


def read_torch_file(
    part: Part, makers: Mapping[str, Maker | Constant] | None = None, *, refuse_unknown: bool = True
) -> Any:
    """The object that was saved: tensors as ``TorchTensor``, those of classes in ``makers`` as these make them.

    Raises:
        ForeignUnusable: it is no such file, damaged, of another byte order, or holds a global that is not known.
    """
    try:
        with opened(part.file) as stream:
            archive = _Archive(part, stream)
            makers = TORCH | _rebuilders(part.file) | dict(makers or {})
            payload = archive.read("data.pkl", MOST_PICKLE_BYTES)
            return read_pickle(payload, makers, archive.storage, refuse_unknown=refuse_unknown)
    except StoreUnusable:
        raise
    except OSError as error:
        raise ForeignUnusable(part.file, f"it cannot be read: {error.strerror or error}", _AGAIN) from error
    except PickleRefused as error:
        raise ForeignUnusable(part.file, str(error), _AGAIN) from error


def check_torch_file(part: Part) -> int:
    """Read a file of ``torch.save`` and compare the CRC-32 that ``torch`` has written for each of its entries, which its
    own readers pass over; returns the bytes read.

    Raises:
        ForeignUnusable: it is no such file, or bytes are not those that were saved; names the entry.
    """
    num_bytes = 0
    try:
        with opened(part.file) as stream:
            archive = _Archive(part, stream)
            for entry in archive.zip.infolist():
                try:
                    with archive.zip.open(entry) as payload:
                        while block := payload.read(_BLOCK_BYTES):
                            num_bytes += len(block)
                except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
                    raise archive.unusable(f"its entry {entry.filename[:100]!r} is not what was saved") from error
    except StoreUnusable:
        raise
    except OSError as error:
        raise ForeignUnusable(part.file, f"it cannot be read: {error.strerror or error}", _AGAIN) from error
    return num_bytes


class _Archive:
    """The directory of the zip archive in a part of a file."""

    def __init__(self, part: Part, stream: Any) -> None:
        self.file = part.file
        size = stream.seek(0, os.SEEK_END)
        end = size if part.num_bytes is None else part.start + part.num_bytes
        if not 0 <= part.start <= end <= size:
            raise self.unusable(f"it has {size:,} bytes, of which {part.start:,} to {end:,} are asked for")
        self.view = _View(stream, part.start, end - part.start)
        self.start, self.size = part.start, end - part.start
        try:
            self.zip = zipfile.ZipFile(io.BufferedReader(self.view))
            names = self.zip.namelist()
        except (zipfile.BadZipFile, EOFError, NotImplementedError, struct.error, *DAMAGE) as error:
            raise self.unusable(
                f"it is no file of torch.save since 1.6, or damaged ({str(error)[:100] or type(error).__name__})"
            ) from error
        pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl" and name.count("/") == 1]
        if len(pickles) != 1:
            raise self.unusable("it is no file of torch.save: it has not one data.pkl")
        self.root = pickles[0].removesuffix("data.pkl")
        self.entries = {entry.filename: entry for entry in self.zip.infolist()}
        if f"{self.root}byteorder" in self.entries and self.read("byteorder", 16) != b"little":
            raise self.unusable("its numbers are not little-endian")

    def unusable(self, fact: str) -> ForeignUnusable:
        return ForeignUnusable(self.file, fact, _AGAIN)

    def read(self, name: str, most: int) -> bytes:
        """The bytes of an entry."""
        start, num_bytes = self.place(name)
        if num_bytes > most:
            raise self.unusable(f"its {name} has {num_bytes:,} bytes, more than {most:,}")
        self.view.seek(start)
        payload = self.view.read(num_bytes)
        if payload is None or len(payload) != num_bytes:
            raise self.unusable(f"it ends in the middle of {name}")
        return payload

    def place(self, name: str) -> tuple[int, int]:
        """First byte of an entry, counted from the start of the archive, and its size."""
        entry = self.entries.get(self.root + name)
        if entry is None:
            raise self.unusable(f"it has no entry {name[:100]!r}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
            raise self.unusable(f"its entry {name[:100]!r} is compressed or encrypted")
        self.view.seek(max(entry.header_offset, 0))
        header = self.view.read(_LOCAL_HEADER.size) or b""
        if len(header) != _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
            raise self.unusable(f"its entry {name[:100]!r} is not where its directory says")
        *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        start = entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if entry.header_offset < 0 or start + entry.file_size > self.size:
            raise self.unusable(f"its entry {name[:100]!r} reaches beyond its end")
        return start, entry.file_size

    def storage(self, identity: Any) -> Storage:
        """What a persistent id stands for."""
        match identity:
            case ("storage", StorageType(dtype), str(key), _, int()):
                start, num_bytes = self.place(f"data/{key}")
                return Storage(self.start + start, num_bytes, dtype)
        raise PickleRefused("it refers to an object that is no storage of a known type")


class _View(io.RawIOBase):
    """A stretch of a stream as a stream of its own, so that an archive inside a file is opened where it is."""

    def __init__(self, stream: Any, start: int, num_bytes: int) -> None:
        self._stream, self._start, self._size, self._at = stream, start, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self._at, self._size)[whence]
        if at < 0:
            raise ValueError("a position before the start")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        self._stream.seek(self._start + min(self._at, self._size))
        taken = self._stream.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(taken)] = taken
        self._at += len(taken)
        return len(taken)


def _rebuilders(file: Place) -> dict[str, Maker | Constant]:
    """Makers of the tensors of ``file``."""

    def tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> TorchTensor:
        return _tensor(file, storage, storage.dtype, offset, shape, stride)

    def typed_tensor(
        storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
    ) -> TorchTensor:
        return _tensor(file, storage, dtype, offset, shape, stride)

    def parameter(tensor: Any, *_: Any) -> Any:
        return tensor

    def from_type(function: Any, cls: Any, arguments: Any, state: Any) -> Any:
        if function not in (tensor, typed_tensor, parameter):
            raise PickleRefused("it holds a tensor of a kind that is not known")
        return function(*arguments)

    return {
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_tensor_v3": typed_tensor,
        "torch._utils._rebuild_parameter": parameter,
        "torch._utils._rebuild_parameter_with_state": parameter,
        "torch._tensor._rebuild_from_type_v2": from_type,
    }


def _tensor(file: Place, storage: Any, dtype: Any, offset: Any, shape: Any, stride: Any) -> TorchTensor:
    """A view of a storage, if it lies inside."""
    sizes = (*shape, *stride)
    if not isinstance(storage, Storage) or dtype not in DTYPES or len(shape) != len(stride) or len(shape) > _MOST_DIMS:
        raise PickleRefused("it holds a tensor that is not described as torch does")
    if any(type(size) is not int or size < 0 for size in (offset, *sizes)):
        raise PickleRefused("it holds a tensor with a size that is no number")
    item = DTYPES[dtype].num_bytes
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if math.prod(shape) and (offset + last + 1) * item > storage.num_bytes:
        raise PickleRefused(
            f"it holds a tensor of {list(shape)} {dtype} that reaches beyond its {storage.num_bytes:,} bytes"
        )
    return TorchTensor(file, dtype, tuple(shape), tuple(stride), storage.position + offset * item)


def _ordered(*pairs: Any) -> dict[Any, Any]:
    if pairs:
        raise PickleRefused("an OrderedDict is made of values")
    return {}


def _size(values: Any = ()) -> tuple[Any, ...]:
    return tuple(values)


TORCH: dict[str, Maker | Constant] = {
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": lambda *_: {},
    "builtins.dict": Constant("builtins.dict"),
    "builtins.set": lambda values=(): list(values),
    "__builtin__.set": lambda values=(): list(values),
    "torch.Size": _size,
    "torch.device": Class("torch.device"),
    "torch.storage.UntypedStorage": Constant(StorageType(_BYTES)),
    "torch.nn.parameter.Parameter": Constant("torch.nn.parameter.Parameter"),
    "torch.Tensor": Constant("torch.Tensor"),
    **{f"torch.{name}": Constant(StorageType(dtype)) for name, dtype in _STORAGES.items()},
    **{f"torch.{name}": Constant(name) for name in DTYPES},
}
