"""What it costs to give a state another layout: through memory, and by a save that the ranks load again.

Four ranks on one machine, gloo. The state is that of an optimizer under ZeRO-1: three float32 tensors of every parameter in
intervals of flat storage, which go to ranks that share every matrix. ``SIZE_MB`` megabytes in all (300).
"""

import itertools
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from evermesh.checkpoint import Box, Interval, Shard, ShardMap, TensorShards, load, save, wanted_regions
from evermesh.checkpoint.cutting import regions_of_interval
from evermesh.checkpoint.relayout import Carrier, Holding, relayout
from evermesh.parallelism.collectives import Communicator
from tests.benchmarks.harness import Row, exact_row, paired_row
from tests.cluster import peak_memory, run_ranks

_BYTES = int(os.environ.get("SIZE_MB", "300")) * 10**6
_RANKS, _ROUNDS, _TENSORS, _WIDTH = 4, 7, 30, 1024
_STAGED = 16 << 20
_HEIGHT = _BYTES // 4 // _TENSORS // _WIDTH // (2 * _RANKS) * 2 * _RANKS


class _Figures(NamedTuple):
    """Of one rank."""

    times: list[list[float]]
    """Seconds of every round: through memory, through the disk, of plain messages."""
    missing_bytes: int
    sent_bytes: int
    """Of all ranks."""
    disk_bytes: int
    """Written and read by all ranks."""
    peak_bytes: int


def run() -> list[Row]:
    """All rows."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        found = run_ranks(_RANKS, _measure, folder, timeout_s=230.0)
    memory, disk, raw = (
        [max(of_round) for of_round in zip(*(rank.times[kind] for rank in found), strict=True)] for kind in range(3)
    )
    missing, sent = sum(rank.missing_bytes for rank in found), found[0].sent_bytes
    peak = max(rank.peak_bytes for rank in found)
    return [
        paired_row("state of 4 ranks into another layout", memory, "s", peer="save + load", peer_values=disk),
        paired_row("the same", memory, "s", peer="as many bytes in one message for each pair", peer_values=raw),
        exact_row("bytes between ranks", sent / missing, "of those that are missing", goal=1.0),
        exact_row("bytes between ranks", sent / 1e6, "MB", peer="written + read", peer_value=found[0].disk_bytes / 1e6),
        exact_row("memory at the peak, over the two layouts", peak / 2**20, "MiB", goal=40.0),
    ]


def _measure(rank: int, ranks: int, folder: str) -> _Figures:
    source, target = _flat(ranks), _shared(ranks)
    held = _tensors(source, rank)
    communicator = Communicator(dist.group.WORLD)
    carrier = Carrier(communicator, most_staged_bytes=_STAGED)
    times: list[list[float]] = [[], [], []]
    peaks, read = [], 0
    wanted, loaded = _tensors(target, rank), _tensors(target, rank)
    for step in range(_ROUNDS + 1):
        communicator.barrier("round")
        began_s = time.monotonic()
        with peak_memory() as peak:
            moved = relayout(Holding(source, held), Holding(target, wanted), carrier)
        times[0].append(time.monotonic() - began_s)
        peaks.append(peak.num_bytes)
        communicator.barrier("round")
        began_s = time.monotonic()
        path = save(Path(folder), step, source, held, {}, communicator=communicator, keep=1)
        read = load(path, wanted_regions(target, rank, loaded), shard_map=target).bytes_read
        times[1].append(time.monotonic() - began_s)
        times[2].append(_raw_s(communicator, moved.total_bytes // ranks // (ranks - 1)))
    for name, tensors in wanted.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, loaded[name], strict=True))
    read_by_all = torch.tensor([read])
    communicator.all_reduce(read_by_all, "figures")
    of_disk = source.num_bytes + int(read_by_all)
    # the first round makes connections
    kept = [of_kind[1:] for of_kind in times]
    return _Figures(kept, _missing_bytes(source, target, rank), moved.total_bytes, of_disk, max(peaks[1:]))


def _raw_s(communicator: Communicator, num_bytes: int) -> float:
    """Seconds in which every rank sends so many bytes to every other."""
    others = [rank for rank in range(communicator.size) if rank != communicator.rank]
    sends, receives = ([(torch.ones(num_bytes, dtype=torch.uint8), rank) for rank in others] for _ in range(2))
    communicator.barrier("round")
    began_s = time.monotonic()
    for work in communicator.exchange(sends, receives, "raw"):
        work.wait()
    return time.monotonic() - began_s


def _flat(ranks: int) -> ShardMap:
    """Intervals of all matrices laid end to end, one for each rank, as ZeRO cuts them."""
    size = _HEIGHT * _WIDTH
    share = -(-_TENSORS // 3 * size // ranks)
    tensors = {}
    for kind in ("parameter", "exp_avg", "exp_avg_sq"):
        for number in range(_TENSORS // 3):
            cuts = [min(max(rank * share - number * size, 0), size) for rank in range(ranks + 1)]
            shards = tuple(
                Shard(Interval(start, stop), (rank,))
                for rank, (start, stop) in enumerate(itertools.pairwise(cuts))
                if start < stop
            )
            tensors[f"{kind}.{number:02}"] = TensorShards("float32", (_HEIGHT, _WIDTH), shards)
    return ShardMap(tensors)


def _shared(ranks: int) -> ShardMap:
    """Two ranks share every matrix by its columns; the two of each half divide it further by ZeRO."""
    half, tensors = _WIDTH // 2, {}
    for name in _flat(ranks).tensors:
        shards = []
        for rank in range(ranks):
            box = Box((0, half * (rank % 2)), (_HEIGHT, half))
            start = box.num_elements // 2 * (rank // 2)
            regions = regions_of_interval(box, (_HEIGHT, _WIDTH), start, start + box.num_elements // 2)
            shards += [Shard(region, (rank,)) for region in regions]
        tensors[name] = TensorShards("float32", (_HEIGHT, _WIDTH), tuple(shards))
    return ShardMap(tensors)


def _tensors(side: ShardMap, rank: int) -> dict[str, Any]:
    return {
        name: [torch.randn(region.num_elements) for region in regions] for name, regions in side.of_rank(rank).items()
    }


def _missing_bytes(source: ShardMap, target: ShardMap, rank: int) -> int:
    """What a rank wants and does not hold, counted element by element."""
    missing = 0
    for name, tensor in target.tensors.items():
        is_held, is_wanted = torch.zeros(tensor.shape, dtype=torch.bool), torch.zeros(tensor.shape, dtype=torch.bool)
        for side, mask in ((source, is_held), (target, is_wanted)):
            for region in side.of_rank(rank).get(name, ()):
                if isinstance(region, Interval):
                    mask.view(-1)[region.start : region.stop] = True
                else:
                    mask[tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))] = True
        missing += 4 * int((is_wanted & ~is_held).sum())
    return missing
