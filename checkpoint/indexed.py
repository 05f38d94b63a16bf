"""Our own format as a source: the index of a rank is read when something that it wrote is first asked for."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash
from pydantic import ValidationError

from evermesh.checkpoint.committing import index_name
from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.encoding import index_head
from evermesh.checkpoint.errors import CheckpointCorrupt, ShardMapInvalid
from evermesh.checkpoint.files import CHUNK_BYTES, DIGITS
from evermesh.checkpoint.format import Extent, LocatedExtents, Manifest, RankFiles, RankIndex, StoredFile, StoredTensor
from evermesh.checkpoint.recovery import Recovery
from evermesh.checkpoint.regions import Region, StoredForm
from evermesh.checkpoint.shard_map import ShardMap, TensorShards
from evermesh.checkpoint.sources import Source
from evermesh.checkpoint.stores.places import ObjectPath, Place
from evermesh.checkpoint.stores.store import store_of
from evermesh.checkpoint.write_plan import WritePlan

_INDEXES_IN_FLIGHT = 8


class Indexes:
    """The indexes of one checkpoint; each is read once, and verified against the manifest."""

    def __init__(self, path: Place, manifest: Manifest, *, recovers: bool = True) -> None:
        self.path, self.manifest = path, manifest
        self.plan = WritePlan(ShardMap(manifest.tensors))
        """Who wrote what."""
        self.owners = {name: rank for rank, files in enumerate(manifest.ranks) for name in files.files}
        """The rank that wrote a data file."""
        self.recovery: Recovery | None = None
        """What makes lost bytes again; None: nothing does."""
        if recovers and manifest.parity is not None and isinstance(path, Path):
            self.recovery = Recovery(path, manifest)
        self._known: dict[int, RankIndex] = {}

    def of_rank(self, rank: int) -> RankIndex:
        """What a rank wrote. Raises ``CheckpointCorrupt``."""
        if rank not in self._known:
            self._known[rank] = self._read(rank)
        return self._known[rank]

    def of_ranks(self, ranks: Sequence[int]) -> list[RankIndex]:
        """What ranks wrote. From an object store several are read at a time. Raises ``CheckpointCorrupt``."""
        unknown = [rank for rank in ranks if rank not in self._known]
        if isinstance(self.path, ObjectPath) and len(unknown) > 1:
            with ThreadPoolExecutor(min(len(unknown), _INDEXES_IN_FLIGHT)) as pool:
                self._known.update(zip(unknown, pool.map(self._read, unknown), strict=True))
        return [self.of_rank(rank) for rank in ranks]

    def rank_of_index(self, name: str) -> int:
        """The rank whose index has this name."""
        return next(rank for rank in range(len(self.manifest.ranks)) if index_name(rank) == name)

    def extents_in(self, file: str) -> Iterator[tuple[str, Extent]]:
        """The extents of a data file, with the names of their tensors."""
        for name, extents in self.of_rank(self.owners[file]).extents.items():
            yield from ((name, extent) for extent in extents if extent.file == file)

    def payload_of(self, rank: int) -> bytes:
        """The bytes of an index, verified, and made again where they are lost or damaged. Raises ``CheckpointCorrupt``."""
        name, expected = index_name(rank), self.manifest.ranks[rank]
        try:
            payload = store_of(self.path).read(self.path / name)
        except FileNotFoundError:
            payload = None
        if payload is not None and _is_whole(payload, expected):
            return payload
        again = self.recovery.bytes_of(name, 0, expected.num_bytes) if self.recovery is not None else None
        if self.recovery is None or again is None or not _is_whole(again, expected):
            fact = "the file is missing" if payload is None else "the index is not what was saved"
            raise CheckpointCorrupt(self.path / name, fact)
        self.recovery.tell(name)
        return again

    def _read(self, rank: int) -> RankIndex:
        path, expected = self.path / index_name(rank), self.manifest.ranks[rank]
        index = _parsed(path, self.payload_of(rank), expected)
        for name, extents in index.extents.items():
            fact = _misfit(self.manifest.tensors.get(name), extents, expected)
            if fact is not None:
                raise CheckpointCorrupt(path, f"tensor {name[:100]}: {fact}")
        return index


def index_of(path: Place, expected: RankFiles) -> RankIndex:
    """An index as it is on the disk. Raises ``CheckpointCorrupt`` unless it is what was saved."""
    try:
        payload = store_of(path).read(path)
    except FileNotFoundError as error:
        raise CheckpointCorrupt(path, "the file is missing") from error
    return index_in(payload, path, expected)


def index_in(payload: bytes, path: Place, expected: RankFiles) -> RankIndex:
    """The index whose bytes these are; ``path`` is told in errors. Raises ``CheckpointCorrupt`` unless it is what was
    saved."""
    if not _is_whole(payload, expected):
        raise CheckpointCorrupt(path, "the index is not what was saved")
    return _parsed(path, payload, expected)


def _parsed(path: Place, payload: bytes, expected: RankFiles) -> RankIndex:
    try:
        index = RankIndex.from_json(payload.partition(b"\n")[2])
    except ValidationError as error:
        raise CheckpointCorrupt(path, f"not an index of this format: {error.errors()[0]}") from error
    if index.checksums.keys() != expected.files.keys():
        raise CheckpointCorrupt(path, "it lists other files than the manifest")
    for name, num_bytes in expected.files.items():
        if len(index.checksums[name]) != -(-num_bytes // CHUNK_BYTES) * DIGITS:
            raise CheckpointCorrupt(path, f"it has not one checksum for every chunk of {name[:100]}")
    return index


def _misfit(tensor: TensorShards | None, extents: Sequence[Extent], expected: RankFiles) -> str | None:
    """What is impossible about the extents of a tensor: whoever can write a checkpoint can make its checksums, too."""
    if tensor is None:
        return "the manifest does not know it"
    form, item = tensor.form, DTYPES[tensor.dtype].num_bytes
    for extent in extents:
        try:
            form.check_inside(extent.region)
        except ShardMapInvalid as error:
            return str(error)
        size = expected.files.get(extent.file, -1)
        is_part = 0 <= extent.start <= extent.stop <= extent.region.num_elements
        if not is_part or not 0 <= extent.offset <= size - (extent.stop - extent.start) * item:
            return (
                f"elements {extent.start} to {extent.stop} of {extent.region} are not at byte {extent.offset} of a file"
            )
    return None


def _is_whole(payload: bytes, expected: RankFiles) -> bool:
    """Whether both lines of an index are those that were saved."""
    line, rest = payload[: payload.find(b"\n") + 1], payload[payload.find(b"\n") + 1 :]
    if len(payload) != expected.num_bytes or xxhash.xxh3_64_hexdigest(line) != expected.xxh3_64:
        return False
    try:
        return bool(xxhash.xxh3_64_hexdigest(rest) == index_head(line).told.get("rest"))
    except ValueError:  # it was saved as something else
        return False


class WrittenExtents(LocatedExtents):
    """The extents of one tensor, in the order of the ranks that wrote them; as a whole it reads the index of every rank."""

    def __init__(self, name: str, indexes: Indexes) -> None:
        self._name, self._indexes = name, indexes

    def near(self, region: Region, form: StoredForm) -> tuple[Extent, ...]:
        """Those that may hold elements of ``region``, which is given in ``form``; reads the indexes of their ranks."""
        return self._of_ranks(sorted(set(self._indexes.plan.writers_near(self._name, region, form))))

    def find_all(self) -> tuple[Extent, ...]:
        """Of all ranks."""
        return self._of_ranks(range(len(self._indexes.manifest.ranks)))

    def _of_ranks(self, ranks: Sequence[int]) -> tuple[Extent, ...]:
        return tuple(extent for index in self._indexes.of_ranks(ranks) for extent in index.extents.get(self._name, ()))


class IndexedFiles(Mapping[str, StoredFile]):
    """The data files of all ranks; to look at one reads the index of its rank."""

    def __init__(self, indexes: Indexes) -> None:
        self._indexes = indexes

    def __getitem__(self, name: str) -> StoredFile:
        rank = self._indexes.owners[name]
        num_bytes = self._indexes.manifest.ranks[rank].files[name]
        return StoredFile(num_bytes, self._indexes.of_rank(rank).checksums[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._indexes.owners)

    def __len__(self) -> int:
        return len(self._indexes.owners)


def source_of(indexes: Indexes) -> Source:
    """Our own format as a source."""
    manifest = indexes.manifest
    return Source(
        indexes.path,
        "evermesh",
        {
            name: StoredTensor(t.dtype, t.shape, WrittenExtents(name, indexes), t.permutation, t.padding)
            for name, t in manifest.tensors.items()
        },
        IndexedFiles(indexes),
        manifest.objects,
        manifest.description,
        manifest.step,
        manifest.world_size,
        is_foreign=False,
        extents_in=indexes.extents_in,
        sizes=lambda: manifest.data_sizes,
        recovery=indexes.recovery,
    )
