"""What a save and a load of a huge job must compute: per rank, on rank 0 at the commit, and of a reader.

A state of 3,408 tensors (Llama 3 405B and AdamW) on 16,384 ranks, in the layouts of our engines; shapes only. The peer is
the global plan of torch distributed checkpoint, on rank 0, at the sizes that fit into a benchmark.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from evermesh.checkpoint.background.planning import writer_plan
from evermesh.checkpoint.encoding import extents_in_order, index_head, index_payload, sealed
from evermesh.checkpoint.file_plan import placed_part, planned_parts, saved_map
from evermesh.checkpoint.format import Manifest
from evermesh.checkpoint.merging import merged_manifest, told_of
from evermesh.checkpoint.retention import Retention
from evermesh.checkpoint.shard_map import ShardMap
from evermesh.checkpoint.write_plan import WritePlan
from tests.benchmarks.harness import Row, exact_row
from tests.checkpoint.large import own_map, transformers_map, zero3_map

_NOWHERE = Path("checkpoints")
_LAYERS, _RANKS = 126, 16_384
_LAYOUTS: dict[str, tuple[Callable[[], ShardMap], Callable[[], ShardMap]]] = {
    "pp 8 x hdp 256 x tp 8, ZeRO-1": (lambda: own_map(_LAYERS, 8, 256, 8), lambda: own_map(_LAYERS, 4, 64, 4)),
    "transformers, hdp 2048 x tp 8": (
        lambda: transformers_map(_LAYERS, 2048, 8),
        lambda: transformers_map(_LAYERS, 256, 4),
    ),
    "DeepSpeed, stage 3": (lambda: zero3_map(_LAYERS, _RANKS), lambda: zero3_map(_LAYERS, 1024)),
}
"""What saves, and what loads it on 1,024 ranks."""
_CHUNKS_PER_FILE = 280
"""Of a megabyte: 405B parameters, 12 bytes each, over the ranks."""


def run() -> list[Row]:
    """All rows, in one process."""
    rows: list[Row] = []
    for title, (saves, loads) in _LAYOUTS.items():
        rows += _of_layout(title, saves, loads)
    for ranks in (128, 512):
        times = [_seconds(partial(_peer, _plans(ranks, 300)))[0] for _ in range(3)]
        rows.append(Row(f"torch DCP create_global_plan, {ranks} ranks x 300 tensors", statistics.median(times), "s"))
    return rows


def _of_layout(title: str, saves: Callable[[], ShardMap], loads: Callable[[], ShardMap]) -> Iterator[Row]:
    seconds = [_seconds(partial(_plan, saves, rank))[0] for rank in (0, 1, 4711, _RANKS - 1)]
    yield exact_row(f"plan of one rank of 16,384, {title}", max(seconds), "s", goal=1.0)
    whole = saves()
    merge_s, payload = _seconds(lambda: _manifest(whole))
    yield exact_row(f"rank 0 merges the heads of all indexes, {title}", merge_s, "s")
    yield exact_row(f"manifest, {title}", len(payload) / 1e6, "MB", goal=100)
    look_s, asked = _seconds(lambda: _look(payload, loads()))
    yield exact_row(f"a rank of another layout plans its load, {title}", look_s, "s", goal=1.0)
    yield exact_row(f"indexes that it reads, of 16,384, {title}", asked, "files")


def _plan(make: Callable[[], ShardMap], rank: int) -> Any:
    """All that a rank computes before its first save."""
    whole = make()
    whole.check()
    parts = planned_parts(whole, rank)
    return writer_plan(whole, parts, rank, _RANKS, directory=_NOWHERE, retention=Retention(), incremental=False)


def _manifest(whole: ShardMap) -> bytes:
    """The bytes of a manifest, given the index of one rank for all of them."""
    placed = [placed_part(one) for one in planned_parts(whole, 4711)]
    saved = saved_map(whole)
    heads = []
    for rank in range(_RANKS):
        file = f"rank-{rank:05d}.safetensors"
        extents = extents_in_order(file, 0, placed) if rank == 0 else {}
        told = told_of(saved.digest, saved.num_bytes // _RANKS + (rank < saved.num_bytes % _RANKS), 0)
        payload = index_payload({file: (_CHUNKS_PER_FILE << 20, "0" * 16 * _CHUNKS_PER_FILE)}, extents, told)
        heads.append(index_head(payload[: payload.index(b"\n") + 1]))
    values = {"step": 1, "time_s": 0.0, "world_size": _RANKS, "description": {}, "objects": {}}
    return sealed(merged_manifest(saved, heads, values))


def _look(payload: bytes, wanted: ShardMap) -> int:
    """How many ranks' indexes one rank of another layout reads."""
    plan = WritePlan(ShardMap(Manifest.from_json(payload).tensors))
    asked: set[int] = set()
    for name, regions in wanted.of_rank(333).items():
        for region in regions:
            asked.update(plan.writers_near(name, region, wanted.tensors[name].form))
    return len(asked)


def _plans(ranks: int, tensors: int) -> list[SavePlan]:
    """Of all ranks, as they are gathered on rank 0."""
    return [
        SavePlan([_item(f"t{tensor}", rank, ranks) for tensor in range(tensors)], planner_data={})
        for rank in range(ranks)
    ]


def _peer(plans: list[SavePlan]) -> Any:
    planner = DefaultSavePlanner()
    planner.set_up_planner({}, is_coordinator=True)
    return planner.create_global_plan(plans)


def _item(name: str, rank: int, ranks: int) -> WriteItem:
    import torch

    rows = 64
    offsets, sizes = torch.Size([rank * rows, 0]), torch.Size([rows, 128])
    data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), TensorProperties(), torch.Size([ranks * rows, 128]))
    return WriteItem(MetadataIndex(name, offsets, rank), WriteItemType.SHARD, tensor_data=data)


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Of one core: nothing here waits for anything."""
    began_s = time.process_time()
    result = work()
    return time.process_time() - began_s, result
