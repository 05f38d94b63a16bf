"""The on-disk format: the manifest, the records that ranks merge into it, and the header of a safetensors file.

A checkpoint is a directory: ``manifest.json`` and one safetensors file per rank that wrote. Every tensor in such a file
is one *extent*: some elements of the row-major storage of one region of a logical tensor. Nothing is ever unpickled.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import xxhash
from pydantic import JsonValue, TypeAdapter, ValidationError

from evermesh.checkpoint.coverage import check_cover
from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.encoding import FORMAT_VERSION, SEAL, HeaderEntry, safetensors_head, sealed
from evermesh.checkpoint.encoding import MANIFEST as MANIFEST
from evermesh.checkpoint.errors import CheckpointCorrupt, ShardMapInvalid
from evermesh.checkpoint.files import CHUNK_BYTES, DIGITS
from evermesh.checkpoint.regions import STRICT, Interval, Padding, Permutation, Region, StoredForm
from evermesh.checkpoint.stores.places import Place


@dataclass(frozen=True, slots=True)
class Extent:
    """Where some elements of a logical tensor are stored."""

    __pydantic_config__ = STRICT

    file: str
    offset: int
    """Position of the first element in the file, bytes."""
    region: Region
    start: int
    """First element of the region's row-major storage that is here."""
    stop: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One logical tensor of a checkpoint."""

    __pydantic_config__ = STRICT

    dtype: str
    shape: tuple[int, ...]
    """Shape of the logical tensor."""
    extents: tuple[Extent, ...]
    """Cover the stored form, padding included, exactly once."""
    permutation: Permutation | None = None
    padding: Padding | None = None

    @property
    def form(self) -> StoredForm:
        """The form that the regions refer to."""
        return StoredForm(self.shape, self.permutation, self.padding)

    def num_bytes(self, extent: Extent) -> int:
        """Bytes of one of the extents."""
        return (extent.stop - extent.start) * DTYPES[self.dtype].num_bytes

    def check_cover(self, name: str) -> None:
        """Prove that the extents cover the tensor exactly once. Raises ``ShardMapInvalid``, which tells its ``name``."""
        try:
            check_cover(self.form, tuple((extent.region, extent.start, extent.stop) for extent in self.extents))
        except ShardMapInvalid as error:
            raise ShardMapInvalid(f"tensor {name} of shape {self.shape}: {error}") from error


@dataclass(frozen=True, slots=True)
class StoredFile:
    """Size and checksums of a file."""

    __pydantic_config__ = STRICT

    num_bytes: int
    checksums: str
    """xxh3-64 of every MiB of the file, 16 hexadecimal digits each, one after the other."""

    def checksum(self, chunk: int) -> str:
        """The digits of one chunk."""
        return self.checksums[chunk * DIGITS : (chunk + 1) * DIGITS]

    @property
    def num_chunks(self) -> int:
        """Chunks of the file; the last one may be short."""
        return -(-self.num_bytes // CHUNK_BYTES)


@dataclass(frozen=True, slots=True)
class RankRecord:
    """What one rank wrote; rank 0 merges the records into the manifest."""

    __pydantic_config__ = STRICT

    digest: str
    """Of the shard map the rank used."""
    file: StoredFile
    extents: dict[str, tuple[Extent, ...]]

    def to_json(self) -> bytes:
        """The record as JSON."""
        return _record_adapter().dump_json(self)

    @classmethod
    def from_json(cls, payload: bytes) -> Self:
        """The record that ``to_json`` wrote."""
        return _record_adapter().validate_json(payload)


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about a checkpoint but the bytes of its tensors."""

    __pydantic_config__ = STRICT

    step: int
    time_s: float
    """When it was saved, seconds since 1970."""
    world_size: int
    """Ranks that saved it."""
    description: dict[str, JsonValue]
    """Model, tokenizer, topology: whatever tells a person or a program what this is."""
    objects: dict[str, JsonValue]
    tensors: dict[str, StoredTensor]
    files: dict[str, StoredFile]
    format_version: int = FORMAT_VERSION

    @property
    def num_bytes(self) -> int:
        """Bytes of all data files."""
        return sum(file.num_bytes for file in self.files.values())

    def check_cover(self, name: str) -> None:
        """Prove that the extents of a tensor cover it exactly once. Raises ``ShardMapInvalid``."""
        self.tensors[name].check_cover(name)

    def to_json(self) -> bytes:
        """The manifest as JSON. Its first field is the xxh3-64 of the object without that field."""
        # not dump_json: it would write null for the infinities and NaN that objects may hold
        return sealed(_manifest_adapter().dump_python(self, mode="json"))

    @classmethod
    def from_json(cls, payload: bytes, file: Place = Path(MANIFEST)) -> Self:
        """The manifest that ``to_json`` wrote; ``file`` is named in errors.

        Raises:
            CheckpointCorrupt: it is truncated, altered, or of another format version.
        """
        digits, body = payload[len(SEAL) :][:DIGITS], b"{" + payload[len(SEAL) + DIGITS + 2 :]
        if payload[: len(SEAL)] != SEAL or digits != xxhash.xxh3_64_hexdigest(body).encode():
            raise CheckpointCorrupt(file, "the manifest is not what was saved")
        try:
            manifest = _manifest_adapter().validate_json(body)
        except ValidationError as error:
            raise CheckpointCorrupt(file, f"not a manifest of format {FORMAT_VERSION}: {error.errors()[0]}") from error
        if manifest.format_version != FORMAT_VERSION:
            raise CheckpointCorrupt(file, f"format {manifest.format_version}; this version reads {FORMAT_VERSION}")
        return manifest


@dataclass(frozen=True, slots=True)
class FilePart:
    """One entry of a data file that is to be written."""

    name: str
    dtype: str
    region: Region
    start: int
    stop: int
    form: StoredForm

    @property
    def num_bytes(self) -> int:
        """Bytes of the entry."""
        return (self.stop - self.start) * DTYPES[self.dtype].num_bytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape under which other readers see it: the shape of a whole box, flat otherwise."""
        is_whole = self.stop - self.start == self.region.num_elements
        return (self.stop - self.start,) if isinstance(self.region, Interval) or not is_whole else self.region.sizes

    @property
    def key(self) -> str:
        """Name under which other readers see it: that of the tensor if it is all of it, else with its place."""
        if self.shape == self.form.stored_shape and self.stop - self.start == self.form.num_elements:
            return self.name
        is_whole = self.stop - self.start == self.region.num_elements
        return f"{self.name}{self.region}" + ("" if is_whole else f"[{self.start}:{self.stop}]")

    @property
    def entry(self) -> HeaderEntry:
        """What the head of the file says about it."""
        return HeaderEntry(self.key, DTYPES[self.dtype].code, self.shape, self.num_bytes)


def safetensors_header(parts: Sequence[FilePart], metadata: Mapping[str, str] | None = None) -> bytes:
    """The head of a safetensors file that holds ``parts`` in this order, padded so that the data is aligned."""
    known: set[str] = set()
    for part in parts:
        if part.key in known:
            raise ShardMapInvalid(f"two extents would be stored under the name {part.key!r}. Rename the tensor.")
        known.add(part.key)
    return safetensors_head([part.entry for part in parts], metadata)


@functools.cache
def _manifest_adapter() -> TypeAdapter[Any]:
    return TypeAdapter(Manifest)


@functools.cache
def _record_adapter() -> TypeAdapter[Any]:
    return TypeAdapter(RankRecord)
