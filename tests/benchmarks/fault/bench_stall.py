"""How long training stands still for a snapshot, next to a plain copy and to ``async_save`` of torch in the same rounds.

Sizes: ``SIZE_MB`` mebibytes (512).
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

from evermesh.checkpoint import Box, Shard, ShardMap, TensorShards
from evermesh.fault.snapshot.keeper.area import area_of
from evermesh.fault.snapshot.keeper.process import KeeperProcess
from evermesh.fault.snapshot.snapshots import Keeping, Snapshots
from evermesh.parallelism.collectives import Communicator
from tests.benchmarks.harness import Row, paired_row

_BYTES = int(os.environ.get("SIZE_MB", "512")) << 20
_ROUNDS, _TENSORS = 9, 64
_PEERS = {"thread": AsyncCheckpointerType.THREAD, "process": AsyncCheckpointerType.PROCESS}


def run() -> list[Row]:
    """All rows, on one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # async_save wants one
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = _measure(Path(folder))
    finally:
        dist.destroy_process_group()
    stall = paired_row("stall of a snapshot", found["stall"], "s", peer="memcpy, warm", peer_values=found["memcpy"])
    assert stall.ratio is not None
    return [
        stall,
        Row("the same, over a copy", stall.ratio, "ratio", stall.ratio_spread, goal=1.25),
        *(
            paired_row(
                "stall of a snapshot", found["stall"], "s", peer=f"DCP async_save, {kind}", peer_values=found[kind]
            )
            for kind in _PEERS
        ),
        paired_row(
            "from the copy to the agreement", found["agreed"], "s", peer="memcpy, warm", peer_values=found["memcpy"]
        ),
    ]


def _measure(folder: Path) -> dict[str, list[float]]:
    tensors = {f"block.{i:02}.weight": torch.randn(_BYTES // 4 // _TENSORS) for i in range(_TENSORS)}
    copies = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    found: dict[str, list[float]] = {}

    def copy() -> None:
        for name, tensor in tensors.items():
            copies[name].copy_(tensor)

    with _snapshots(folder, tensors) as snapshots:
        for step in range(_ROUNDS + 1):
            figures = {"memcpy": _seconds(copy), **_ours(snapshots, step)}
            figures |= {kind: _theirs(kind, folder / f"{kind}-{step}", tensors) for kind in _PEERS}
            for name, value in figures.items() if step else ():  # the first round makes everything warm
                found.setdefault(name, []).append(value)
    return found


@contextmanager
def _snapshots(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Iterator[Snapshots]:
    keeper = KeeperProcess(area_of(folder, "node-0"), "benchmark", folder / "keeper.log")
    try:
        whole = ShardMap({name: _one(tensor) for name, tensor in tensors.items()})
        yield Snapshots(Keeping(keeper.area, 1), whole, tensors, Communicator())
    finally:
        keeper.end()


def _ours(snapshots: Snapshots, step: int) -> dict[str, float]:
    began_s = time.monotonic()
    assert snapshots.begin(step, {"step": step}, {})
    stall_s = time.monotonic() - began_s
    while snapshots.count(snapshots.vote(is_due=False))[0] != "committed":
        time.sleep(0.001)
    return {"stall": stall_s, "agreed": time.monotonic() - began_s}


def _theirs(kind: str, path: Path, tensors: Mapping[str, torch.Tensor]) -> float:
    """Seconds until ``async_save`` returns."""
    began_s = time.monotonic()
    under_way: Any = async_save(
        dict(tensors), storage_writer=FileSystemWriter(path), async_checkpointer_type=_PEERS[kind]
    )
    stall_s = time.monotonic() - began_s
    under_way.result()
    shutil.rmtree(path)
    return stall_s


def _one(tensor: torch.Tensor) -> TensorShards:
    shape = tuple(tensor.shape)
    return TensorShards("float32", shape, (Shard(Box((0,) * len(shape), shape), (0,)),))


def _seconds(work: Callable[[], Any]) -> float:
    began_s = time.monotonic()
    work()
    return time.monotonic() - began_s
