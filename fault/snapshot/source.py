"""The snapshots in memory as a checkpoint: the files are where the ranks have copied them to, and nothing else is new.

What the ranks of a node hold is divided among them, so that its memory has all that they need; and a rank of another layout
finds what it wants there, and in the memory of other nodes, as in any checkpoint.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from evermesh.checkpoint.errors import CheckpointCorrupt
from evermesh.checkpoint.format import Extent, LocatedExtents, RankFiles, RankIndex, StoredFile, StoredTensor
from evermesh.checkpoint.indexed import index_in
from evermesh.checkpoint.locating import Sought, holders_near
from evermesh.checkpoint.regions import Region, StoredForm, are_apart
from evermesh.checkpoint.rules import ShardingRule
from evermesh.checkpoint.shard_map import ShardMap, TensorShards
from evermesh.checkpoint.sources import Source
from evermesh.checkpoint.stores.store import OpenFile
from evermesh.fault.snapshot.choosing import Version
from evermesh.fault.snapshot.keeper.slots import held_by
from evermesh.fault.snapshot.parts import LocalPart, Part, Said, file_of, version_of

_INDEXES_IN_FLIGHT = 8


def versions_of(area: Path, rank: int) -> list[Version]:
    """The snapshots of which the slots of ``rank`` hold its part."""
    return [version_of(held.record) for held in held_by(area, rank)]


def slot_with(area: Path, rank: int, version: Version) -> int | None:
    """The slot of ``rank`` that holds its part of a snapshot; None: neither does."""
    return next((held.number for held in held_by(area, rank) if version_of(held.record) == version), None)


def source_of_node(area: Path, ranks: Sequence[int], version: Version, shard_map: ShardMap, world_size: int) -> Source:
    """A snapshot as the memory of the node with ``ranks`` holds it; see ``source_of_parts``."""
    parts: dict[int, Part] = {}
    for rank in ranks:
        held = next((one for one in held_by(area, rank) if version_of(one.record) == version), None)
        if held is None:
            raise CheckpointCorrupt(area, f"rank {rank} no longer holds step {version.step}")
        parts[rank] = LocalPart(area, held)
    return source_of_parts(parts, [ranks], version, shard_map, world_size)


def source_of_parts(
    parts: Mapping[int, Part],
    groups: Sequence[Sequence[int]],
    version: Version,
    shard_map: ShardMap,
    world_size: int,
    reader: int = 0,
) -> Source:
    """A snapshot as those who have parts of it hold it, by rank; indexes are read and verified when they are needed.

    What several ``groups`` hold (ranks of a node, which together have once what any of them held) is read from one whose
    parts are in local memory, or else from one of the others, which ``reader`` spreads. ``shard_map`` is the one that
    ``version`` names. A load that meets a gap, because nobody who is there held a region, raises ``CheckpointCorrupt``.

    Raises:
        CheckpointCorrupt: the objects are not what was sealed.
    """
    indexes = _Indexes(parts)
    choice = _Choice(parts, groups, reader)
    said = Said(min(parts.values(), key=lambda part: not part.is_local)).values
    return Source(
        Path(f"snapshot of step {version.step}"),
        "evermesh",
        {
            name: StoredTensor(t.dtype, t.shape, _KeptExtents(name, t, indexes, choice), t.permutation, t.padding)
            for name, t in shard_map.tensors.items()
        },
        _Files(indexes),
        said["objects"],
        said["description"],
        version.step,
        world_size,
        is_foreign=False,
        extents_in=indexes.extents_in,
        open_file=indexes.opened,
    )


class _Indexes:
    """What the ranks wrote where."""

    def __init__(self, parts: Mapping[int, Part]) -> None:
        self.parts = parts
        self.owners = {file_of(part): rank for rank, part in parts.items() if part.record.data_bytes}
        self._known: dict[int, RankIndex] = {}

    def of_ranks(self, ranks: Sequence[int]) -> list[RankIndex]:
        """What ranks wrote, by the names of the snapshot's files. Raises ``CheckpointCorrupt``."""
        unknown = [rank for rank in ranks if rank not in self._known]
        if len(unknown) > 1 and any(not self.parts[rank].is_local for rank in unknown):
            with ThreadPoolExecutor(min(len(unknown), _INDEXES_IN_FLIGHT)) as pool:
                self._known.update(zip(unknown, pool.map(self._read, unknown), strict=True))
        self._known.update({rank: self._read(rank) for rank in unknown if rank not in self._known})
        return [self._known[rank] for rank in ranks]

    def extents_in(self, file: str) -> Iterator[tuple[str, Extent]]:
        """The extents of a data file, with the names of their tensors."""
        (index,) = self.of_ranks([self.owners[file]])
        yield from ((name, extent) for name, extents in index.extents.items() for extent in extents)

    def opened(self, file: str) -> OpenFile:
        """One of the data files."""
        return self.parts[self.owners[file]].open()

    def _read(self, rank: int) -> RankIndex:
        part, place = self.parts[rank], Path(self.parts[rank].folder)
        name, record = Path(file_of(part)).name, part.record
        data = {name: record.data_bytes} if record.data_bytes else {}
        try:
            payload = part.index()
        except OSError as error:
            raise CheckpointCorrupt(place, f"its index cannot be read: {error}") from error
        found = index_in(payload, place, RankFiles(record.root, record.index_bytes, data))
        return RankIndex(
            {file_of(part): checksums for checksums in found.checksums.values()},
            {
                name: tuple(replace(extent, file=file_of(part)) for extent in extents)
                for name, extents in found.extents.items()
            },
        )


class _Choice:
    """From whom a region is read that several hold."""

    def __init__(self, parts: Mapping[int, Part], groups: Sequence[Sequence[int]], reader: int) -> None:
        whole = [tuple(group) for group in groups if all(rank in parts for rank in group)]
        self._group_of = {rank: group for group in whole for rank in group}
        self._local = {group for group in whole if all(parts[rank].is_local for rank in group)}
        self._reader = reader

    def group(self, holders: Sequence[int]) -> tuple[int, ...] | None:
        """The ranks whose parts have what each of ``holders`` held; None: nobody's that is there."""
        groups = [self._group_of[rank] for rank in holders if rank in self._group_of]
        local = next((group for group in groups if group in self._local), None)
        return local or (groups[self._reader % len(groups)] if groups else None)


class _KeptExtents(LocatedExtents):
    """The extents of one tensor."""

    def __init__(self, name: str, tensor: TensorShards, indexes: _Indexes, choice: _Choice) -> None:
        self._name, self._tensor, self._indexes, self._choice = name, tensor, indexes, choice

    def near(self, region: Region, form: StoredForm) -> tuple[Extent, ...]:
        """Those that may hold elements of ``region``, which is given in ``form``; reads the indexes of their ranks."""
        return self._chosen(_holders_near(self._tensor, region, form))

    def find_all(self) -> tuple[Extent, ...]:
        """Of all ranks."""
        return self._chosen((shard.region, shard.ranks) for shard in self._tensor.shards)

    def _chosen(self, held: "Iterator[tuple[Region, Sequence[int]]]") -> tuple[Extent, ...]:
        regions: dict[tuple[int, ...], set[Region]] = {}
        for region, holders in held:
            group = self._choice.group(holders)
            if group is not None:
                regions.setdefault(group, set()).add(region)
        return tuple(
            extent
            for group, wanted in regions.items()
            for index in self._indexes.of_ranks(group)
            for extent in index.extents.get(self._name, ())
            if extent.region in wanted
        )


class _Files(Mapping[str, StoredFile]):
    """The data files; to look at one reads the index of its rank."""

    def __init__(self, indexes: _Indexes) -> None:
        self._indexes = indexes

    def __getitem__(self, name: str) -> StoredFile:
        rank = self._indexes.owners[name]
        (index,) = self._indexes.of_ranks([rank])
        return StoredFile(self._indexes.parts[rank].record.data_bytes, index.checksums[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._indexes.owners)

    def __len__(self) -> int:
        return len(self._indexes.owners)


def _holders_near(tensor: TensorShards, region: Region, form: StoredForm) -> Iterator[tuple[Region, Sequence[int]]]:
    """The regions that may have elements of ``region``, with all who held them."""
    rule = tensor.placement
    if not isinstance(rule, ShardingRule):
        for shard in rule:
            if form != tensor.form or not are_apart(shard.region, region):
                yield shard.region, shard.ranks
        return
    for coordinates, _, _ in holders_near(rule, tensor.form, Sought.of(region, form, tensor.form)):
        places = (rule.placed(coordinates, rule.copy_axes, copy) for copy in range(rule.num_copies))
        ranks = tuple(map(rule.grid.rank, places))
        for held in rule.regions(tensor.form, coordinates):
            yield held, ranks
