"""The on-disk format: the manifest, the index of a rank, and the header of a safetensors file.

A checkpoint is a directory: ``manifest.json``, and of every rank an index and the safetensors files that it lists. Every
tensor in such a file is one *extent*: some elements of the row-major storage of one region of a logical tensor. The manifest
says by rules who wrote what, so that a reader opens the indexes that it needs and no others. Nothing is ever unpickled.
"""

import functools
import itertools
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, overload

import xxhash
from pydantic import JsonValue, TypeAdapter, ValidationError

from evermesh.checkpoint.committing import index_name
from evermesh.checkpoint.coverage import check_cover
from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.encoding import FORMAT_VERSION, SEAL, SEAL_END, HeaderEntry, safetensors_head, sealed
from evermesh.checkpoint.encoding import MANIFEST as MANIFEST
from evermesh.checkpoint.errors import CheckpointCorrupt, ShardMapInvalid
from evermesh.checkpoint.files import CHUNK_BYTES, DIGITS
from evermesh.checkpoint.parity import ParityPart, Stripes, payload_sizes
from evermesh.checkpoint.regions import STRICT, Interval, Padding, Permutation, Region, StoredForm
from evermesh.checkpoint.shard_map import ShardMap, TensorShards
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


class LocatedExtents(Sequence[Extent]):
    """Extents that can be asked for by place, so that not all of them are looked at."""

    @abstractmethod
    def near(self, region: Region, form: StoredForm) -> tuple[Extent, ...]:
        """Those that may hold elements of ``region``, which is given in ``form``."""

    @abstractmethod
    def find_all(self) -> tuple[Extent, ...]:
        """Every one; looked for once."""

    def __len__(self) -> int:
        return len(self._all)

    @overload
    def __getitem__(self, index: int) -> Extent: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Extent, ...]: ...
    def __getitem__(self, index: int | slice) -> Extent | tuple[Extent, ...]:
        return self._all[index]

    @functools.cached_property
    def _all(self) -> tuple[Extent, ...]:
        return self.find_all()


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One logical tensor of a checkpoint."""

    dtype: str
    shape: tuple[int, ...]
    """Shape of the logical tensor."""
    extents: "tuple[Extent, ...] | LocatedExtents"
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

    def extents_near(self, region: Region, form: StoredForm) -> Sequence[Extent]:
        """Those that may hold elements of ``region``, which is given in ``form``."""
        return self.extents if isinstance(self.extents, tuple) else self.extents.near(region, form)

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
class RankIndex:
    """What one rank wrote: the second line of its index."""

    __pydantic_config__ = STRICT

    checksums: dict[str, str]
    """By data file: xxh3-64 of every MiB, 16 hexadecimal digits each, one after the other."""
    extents: dict[str, tuple[Extent, ...]]

    @classmethod
    def from_json(cls, payload: bytes) -> Self:
        """The second line of the index that ``encoding.index_payload`` made. Raises ``ValidationError``."""
        return _index_adapter().validate_json(payload)


@dataclass(frozen=True, slots=True)
class RankFiles:
    """The files of one rank, as the manifest knows them."""

    __pydantic_config__ = STRICT

    xxh3_64: str
    """Of the first line of the index, which holds that of the rest."""
    num_bytes: int
    """Of the index."""
    files: dict[str, int]
    """Bytes of the data files."""


@dataclass(frozen=True, slots=True)
class Parity:
    """What protects the files of ranks (``checkpoint.parity``)."""

    __pydantic_config__ = STRICT

    width: int
    """Ranks of a stripe."""
    parts: tuple[RankFiles, ...]
    """By stripe, then by number."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about a checkpoint but what each rank alone knows, and the bytes of its tensors."""

    __pydantic_config__ = STRICT

    step: int
    time_s: float
    """When it was saved, seconds since 1970."""
    world_size: int
    """Ranks that saved it."""
    description: dict[str, JsonValue]
    """Model, tokenizer, topology: whatever tells a person or a program what this is."""
    objects: dict[str, JsonValue]
    tensors: dict[str, TensorShards]
    """Who held what, and so who wrote it (``WritePlan``)."""
    ranks: tuple[RankFiles, ...]
    """By rank."""
    parity: Parity | None = None
    format_version: int = FORMAT_VERSION

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of all files that the manifest knows, by name."""
        indexes = {index_name(rank): of_rank.num_bytes for rank, of_rank in enumerate(self.ranks)}
        return indexes | self.data_sizes | self.parity_sizes

    @property
    def parity_sizes(self) -> dict[str, int]:
        """Bytes of the files of parity and of their indexes, by name."""
        sizes: dict[str, int] = {}
        for part in self.parity.parts if self.parity is not None else ():
            for name, num_bytes in part.files.items():
                sizes |= {name: num_bytes, Path(name).with_suffix(".index").name: part.num_bytes}
        return sizes

    def payload(self, rank: int) -> dict[str, int]:
        """The files of a rank in the order in which parity takes them, with their sizes."""
        return payload_sizes(rank, self.ranks[rank].files, self.ranks[rank].num_bytes)

    def can_do_without(self, names: Collection[str]) -> bool:
        """Whether parity makes up for files that are missing or damaged: of every stripe those of one rank, or parity."""
        if not names or self.parity is None:
            return not names
        stripes, lost = Stripes(self.world_size, self.parity.width), set(names)
        hit = Counter(stripes.of_rank(rank) for rank in range(self.world_size) if lost & self.payload(rank).keys())
        hit.update({part.stripe for part in self.parity_parts if lost & {part.name, part.index_name}})
        known = {name for rank in range(self.world_size) for name in self.payload(rank)} | self.parity_sizes.keys()
        return lost <= known and all(count == 1 for count in hit.values())

    @property
    def parity_parts(self) -> list[ParityPart]:
        """What the files of parity hold."""
        if self.parity is None:
            return []
        stripes = Stripes(self.world_size, self.parity.width)
        lengths = [sum(self.payload(rank).values()) for rank in range(self.world_size)]
        return [part for stripe in range(stripes.number) for part in stripes.parts(stripe, lengths.__getitem__)]

    @property
    def data_sizes(self) -> dict[str, int]:
        """Bytes of all data files, by name."""
        return {name: num_bytes for of_rank in self.ranks for name, num_bytes in of_rank.files.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all data files."""
        return sum(self.data_sizes.values())

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
        digits, body = payload[len(SEAL) :][:DIGITS], b"{" + payload[len(SEAL) + DIGITS + len(SEAL_END) :]
        if not payload.startswith(SEAL + digits + SEAL_END) or digits != xxhash.xxh3_64_hexdigest(body).encode():
            raise CheckpointCorrupt(file, "the manifest is not what was saved")
        try:
            manifest = _manifest_adapter().validate_json(body)
        except ValidationError as error:
            version = _version(body)
            if version not in (None, FORMAT_VERSION):
                raise CheckpointCorrupt(file, f"format {version}; this version reads {FORMAT_VERSION}") from error
            raise CheckpointCorrupt(file, f"not a manifest of format {FORMAT_VERSION}: {error.errors()[0]}") from error
        if manifest.format_version != FORMAT_VERSION:
            raise CheckpointCorrupt(file, f"format {manifest.format_version}; this version reads {FORMAT_VERSION}")
        fact = manifest._impossible()
        if fact is not None:
            raise CheckpointCorrupt(file, fact)
        return manifest

    def _impossible(self) -> str | None:
        """What cannot be: whoever can write a manifest can seal it, too."""
        writers = (*self.ranks, *(self.parity.parts if self.parity is not None else ()))
        for name, num_bytes in itertools.chain.from_iterable(of_rank.files.items() for of_rank in writers):
            if Path(name).name != name or not name or "\0" in name:
                return f"it names the file {name[:100]!r}, which is not beside it"
            if num_bytes < 0:
                return f"{name[:100]} is said to have {num_bytes:,} bytes"
        if len(self.ranks) != self.world_size:
            return f"{len(self.ranks)} ranks wrote it, {self.world_size} are said to have"
        if min((of_rank.num_bytes for of_rank in writers), default=0) < 0:
            return "an index is said to have less than no bytes"
        if self.parity is not None:
            if self.parity.width < 1:
                return f"its parity is of stripes of {self.parity.width} ranks"
            expected = {part.name: part.stop - part.start for part in self.parity_parts}
            if expected != {name: size for part in self.parity.parts for name, size in part.files.items()}:
                return "its parity does not fit its files"
        whole = ShardMap(self.tensors)
        try:
            whole.check()
            whole.check_ranks(self.world_size)
        except ShardMapInvalid as error:
            return f"its shard map is impossible: {error}"
        return None


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


def safetensors_header(parts: Sequence[FilePart]) -> bytes:
    """The head of a safetensors file that holds ``parts`` in this order, padded so that the data is aligned."""
    known: set[str] = set()
    for part in parts:
        if part.key in known:
            raise ShardMapInvalid(f"two extents would be stored under the name {part.key!r}. Rename the tensor.")
        known.add(part.key)
    return safetensors_head([part.entry for part in parts])


@functools.cache
def _manifest_adapter() -> TypeAdapter[Any]:
    return TypeAdapter(Manifest)


@functools.cache
def _index_adapter() -> TypeAdapter[Any]:
    return TypeAdapter(RankIndex)


def _version(manifest: bytes) -> object:
    """What an object that is no manifest of this version says about its own."""
    values = json.loads(manifest)
    return values.get("format_version") if isinstance(values, dict) else None
