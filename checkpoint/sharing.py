"""Loading together: where ranks want parts of the same chunks, one of them reads each chunk and passes on what others want.

A chunk is read and verified whole. Ranks that hold columns, of a tensor that was saved in rows, would each read all of it; so
would replicas. Here the chunks of the checkpoint are dealt out in the order of the files, every rank reads its own once, and
the parts travel as in a live re-layout. Universal Checkpointing (arXiv 2406.18820, section 3.4) names the gain, and divides
whole files among data-parallel ranks.
"""

import itertools
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch

from evermesh.checkpoint.agreement import RankFailure, together
from evermesh.checkpoint.cutting import regions_of_interval
from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.files import CHUNK_BYTES
from evermesh.checkpoint.filling import Target, fill
from evermesh.checkpoint.format import Extent, StoredTensor
from evermesh.checkpoint.load_planning import reads_of_rank
from evermesh.checkpoint.node_reading import refusal
from evermesh.checkpoint.regions import Interval, Region
from evermesh.checkpoint.relayout import Carrier, Holding
from evermesh.checkpoint.relayout.moving import move_part
from evermesh.checkpoint.shard_map import Shard, ShardMap, TensorShards
from evermesh.checkpoint.sources import Found, Source
from evermesh.parallelism.collectives import Communicator

_ROUND_CHUNKS = 16
"""That a rank reads before it passes on."""
_STAGED_BYTES = 32 << 20
"""Of messages under way; with what was read and what is being read it stays below 64 MiB."""
_LEAST_GAIN = 1.05
_LEAST_SAVED_BYTES = 64 << 20
"""Of reading; below it ranks are faster alone."""
_CALL_SITE = "checkpoint"


@dataclass(frozen=True, slots=True)
class JointLoad:
    """What the ranks of a communicator want of a source of ours: this one ``targets``, all together ``shard_map``."""

    shard_map: ShardMap
    targets: Mapping[str, Sequence[Target]]
    found: Mapping[str, Found]
    communicator: Communicator

    def is_whole(self) -> bool:
        """Whether this rank wants exactly what the map gives it, into tensors that parts can be copied into."""
        regions = {name: tuple(region for region, _ in of) for name, of in self.targets.items() if of}
        is_flat = all(tensor.is_contiguous() for of in self.targets.values() for _, tensor in of)
        return is_flat and regions == self.shard_map.of_rank(self.communicator.rank)


def is_worth_it(source: Source, joint: JointLoad) -> bool:
    """Whether nodes whose ranks read alone would fetch much more than there is; the same answer on every rank. Collective.

    What one rank of a node has read, others find in the page cache, or in the memory that they share (``node_reading``).
    """
    communicator = joint.communicator
    nodes = sorted(set(communicator.nodes))
    if len(nodes) == 1:
        return False
    sums = torch.zeros(1 + len(nodes), dtype=torch.int64)
    sums[0] = 0 if joint.is_whole() else 1
    place = 1 + nodes.index(communicator.nodes[communicator.rank])
    sums[place] = reads_of_rank(source, joint.shard_map, joint.found, communicator.rank).bytes_read
    communicator.all_reduce(sums, _CALL_SITE)
    once = joint.shard_map.num_bytes
    alone = sum(min(fetched, once) for fetched in sums[1:].tolist())
    return not int(sums[0]) and alone > max(_LEAST_GAIN * once, once + _LEAST_SAVED_BYTES)


def fill_together(source: Source, wanted: JointLoad) -> int:
    """Fill the targets of all ranks; returns the bytes that this one has read of files of tensors. Collective.

    Every rank reads the index of every file. Targets are contiguous. Extra memory is 64 MiB on every rank.

    Raises:
        CheckpointCorrupt: on every rank, if any found bytes that are not those that were saved.
    """
    communicator, bytes_read = wanted.communicator, 0
    tensors = {name: [tensor for _, tensor in of] for name, of in wanted.targets.items()}
    parts = (_Part(source, wanted, dealt) for dealt in _rounds(source, wanted))
    with ThreadPoolExecutor(1, thread_name_prefix="checkpoint-read") as pool:  # the next part is read while one travels
        under_way = deque((part, pool.submit(part.read)) for part in itertools.islice(parts, 1))
        while under_way:
            part, read = under_way.popleft()
            try:
                bytes_read += together(communicator, read.result)
            except RankFailure as failure:
                raise refusal(source, failure) from failure
            under_way.extend((part, pool.submit(part.read)) for part in itertools.islice(parts, 1))
            names = part.shard_map.tensors
            held: dict[str, torch.Tensor | Sequence[torch.Tensor]] = {n: tensors[n] for n in names if n in tensors}
            move_part(
                Holding(part.shard_map, part.staged),
                Holding(ShardMap({name: wanted.shard_map.tensors[name] for name in names}), held),
                Carrier(communicator, most_staged_bytes=_STAGED_BYTES),
                part.staged.pop,
            )
    return bytes_read


class _Span(NamedTuple):
    """Elements [start, stop) of the storage of the region of an extent."""

    name: str
    extent: Extent
    start: int
    stop: int


class _Part:
    """One round: what each rank reads in it, as the source of a move."""

    def __init__(self, source: Source, wanted: JointLoad, dealt: Sequence[Sequence[_Span]]) -> None:
        self._source, self._wanted, self._rank = source, wanted, wanted.communicator.rank
        shards: dict[str, list[Shard]] = {}
        self._own: dict[str, list[Region]] = {}
        for rank, spans in enumerate(dealt):
            for span in spans:
                for region in _regions(source.tensors[span.name], span):
                    shards.setdefault(span.name, []).append(Shard(region, (rank,)))
                    if rank == self._rank:
                        self._own.setdefault(span.name, []).append(region)
        self.shard_map = ShardMap({name: _as_shards(source.tensors[name], tuple(of)) for name, of in shards.items()})
        self.staged: dict[str, torch.Tensor | Sequence[torch.Tensor]] = {}

    def read(self) -> int:
        """Read this rank's regions into ``staged``; returns the bytes read."""
        forms = {name: self._source.tensors[name].form for name in self._own}
        targets = {
            name: [(region, torch.empty(region.num_elements, dtype=self._dtype(name))) for region in regions]
            for name, regions in self._own.items()
        }
        self.staged.update({name: [tensor for _, tensor in of] for name, of in targets.items()})
        return fill(self._source, self._wanted.found, targets, forms)

    def _dtype(self, name: str) -> torch.dtype:
        found: torch.dtype = getattr(torch, self._source.tensors[name].dtype)
        return found


def _rounds(source: Source, wanted: JointLoad) -> Iterator[list[list[_Span]]]:
    """By round and rank: what is read. Chunks in the order of the files, each rank a stretch of them."""
    by_file: dict[str, list[tuple[int, int, str, Extent]]] = {}
    for name in wanted.shard_map.tensors:
        stored = source.tensors[name]
        for extent in stored.extents:
            begin = source.locate(extent)
            by_file.setdefault(extent.file, []).append((begin, begin + stored.num_bytes(extent), name, extent))
    files = {file: sorted(of, key=lambda entry: entry[:2]) for file, of in sorted(by_file.items())}
    chunks = [(file, chunk) for file, of in files.items() for chunk in _touched(of)]
    size = wanted.communicator.size
    edges = [len(chunks) * rank // size for rank in range(size + 1)]
    own = [chunks[first:last] for first, last in itertools.pairwise(edges)]
    for begin in range(0, max(map(len, own), default=0), _ROUND_CHUNKS):
        yield [
            [
                span
                for file, of_file in itertools.groupby(
                    of_rank[begin : begin + _ROUND_CHUNKS], key=lambda chunk: chunk[0]
                )
                for first, last in _stretches([chunk for _, chunk in of_file])
                for span in _spans(source, files[file], first * CHUNK_BYTES, last * CHUNK_BYTES)
            ]
            for of_rank in own
        ]


def _touched(entries: Sequence[tuple[int, int, str, Extent]]) -> list[int]:
    """The chunks of a file that hold some of its extents, ascending."""
    touched: dict[int, None] = {}
    for begin, end, _, _ in entries:
        touched.update(dict.fromkeys(range(begin // CHUNK_BYTES, -(-end // CHUNK_BYTES))))
    return list(touched)


def _stretches(chunks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[first, last) of chunks that follow each other."""
    first = 0
    for at in range(1, len(chunks) + 1):
        if at == len(chunks) or chunks[at] != chunks[at - 1] + 1:
            yield chunks[first], chunks[at - 1] + 1
            first = at


def _spans(source: Source, entries: Sequence[tuple[int, int, str, Extent]], low: int, high: int) -> Iterator[_Span]:
    """What lies in bytes [low, high) of a file. Elements never lie across two chunks: they are aligned in the file."""
    at = bisect_left(entries, low, key=lambda entry: entry[1])
    while at < len(entries) and entries[at][0] < high:
        begin, end, name, extent = entries[at]
        item = DTYPES[source.tensors[name].dtype].num_bytes
        first, last = (max(low, begin) - begin) // item, (min(high, end) - begin) // item
        if first < last:
            yield _Span(name, extent, extent.start + first, extent.start + last)
        at += 1


def _regions(stored: StoredTensor, span: _Span) -> tuple[Region, ...]:
    region = span.extent.region
    if isinstance(region, Interval):
        return (Interval(region.start + span.start, region.start + span.stop),)
    return regions_of_interval(region, stored.form.stored_shape, span.start, span.stop)


def _as_shards(stored: StoredTensor, shards: tuple[Shard, ...]) -> TensorShards:
    return TensorShards(stored.dtype, stored.shape, shards, stored.permutation, stored.padding)
