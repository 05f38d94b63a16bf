"""Loading a checkpoint of four ranks, which hold rows, on three, which hold columns: time, bytes and memory.

Ours reads alone where the page cache of the node is shared, through shared memory where many ranks of a node want the same,
and by messages between nodes: all are measured, on this one node. Peers in the same rounds: a plain read of as many bytes
from the same disk, in as many processes, and torch distributed checkpoint with its own and with its safetensors files. What
is read lies on the disk, not in the page cache. Seconds of processors say more than the clock where others use the machine.
``SIZE_MB`` is 600 unless set.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Rows

from evermesh.checkpoint import Box, Shard, ShardMap, TensorShards, load, node_reading, save, wanted_regions
from evermesh.parallelism.collectives import Communicator
from tests.benchmarks.checkpoint.page_cache import forget
from tests.benchmarks.harness import Row, exact_row, paired_row
from tests.cluster import run_ranks

_WIDTH = 1536
_TENSORS = max(1, int(os.environ.get("SIZE_MB", "600")) * 10**6 // (4 * _WIDTH**2))
_ROUNDS = int(os.environ.get("ROUNDS", "7"))
_BYTES = 4 * _WIDTH**2 * _TENSORS
_SAVED_BY, _LOADED_BY = 4, 3


def run() -> list[Row]:
    """Rows of all peers."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        run_ranks(_SAVED_BY, _save, folder, timeout_s=170.0)
        rounds = list(zip(*run_ranks(_LOADED_BY, _load, folder, timeout_s=600.0), strict=True))
    names = tuple(rounds[0][0])
    rate = {name: [_BYTES / 1e6 / max(of[name].seconds for of in ranks) for ranks in rounds] for name in names}
    ours, peers = names[:3], names[3:]
    rows = [paired_row(one, rate[one], "MB/s", peer=name, peer_values=rate[name]) for one in ours for name in peers]
    for what, goal, unit, of in (
        ("from the disk / needed", 1.05, _BYTES, lambda ranks: sum(one.from_disk for one in ranks)),
        ("read by calls / needed", 1.05, _BYTES, lambda ranks: sum(one.by_calls for one in ranks)),
        ("seconds of processors", None, 1, lambda ranks: sum(one.processor_s for one in ranks)),
        ("MiB beside the destination", 64.0, 2**20, lambda ranks: max(one.peak for one in ranks)),
    ):
        median = {
            name: statistics.median(of([one[name] for one in ranks]) for ranks in rounds) / unit for name in names
        }
        rows += [
            exact_row(f"{one}: {what}", median[one], "", goal=goal, peer=name, peer_value=median[name])
            for one in ours
            for name in peers
        ]
    return rows


class _Figures(NamedTuple):
    """Of one rank and one load."""

    seconds: float
    from_disk: int
    """Bytes that the kernel fetched for it; what other ranks have fetched already is in the page cache."""
    by_calls: int
    """Bytes that it asked for with system calls; memory maps are not among them."""
    processor_s: float
    """Of all its threads: what does not change when others use the machine, too."""
    peak: int
    """Bytes of memory at the peak beside what was there before."""


def _save(rank: int, ranks: int, folder: str) -> None:
    generator = torch.Generator().manual_seed(1)
    whole = {f"w{i:03}": torch.randn(_WIDTH, _WIDTH, generator=generator) for i in range(_TENSORS)}
    each = _WIDTH // ranks
    own = {name: tensor[rank * each : (rank + 1) * each] for name, tensor in whole.items()}
    save(Path(folder) / "ours", 1, _layout(ranks, 0), own, {}, communicator=Communicator(dist.group.WORLD))
    mesh = init_device_mesh("cpu", (ranks,))
    sharded = {name: distribute_tensor(tensor, mesh, [Rows(0)]) for name, tensor in whole.items()}
    dcp_save(sharded, storage_writer=FileSystemWriter(Path(folder) / "dcp"))
    dcp_save(sharded, storage_writer=HuggingFaceStorageWriter(str(Path(folder) / "dcp hf"), save_distributed=True))
    if rank == 0:
        (Path(folder) / "raw").write_bytes(os.urandom(1 << 20) * (_BYTES >> 20))


def _load(rank: int, ranks: int, folder: str) -> list[dict[str, _Figures]]:
    """By round and peer. What a first load imports and allocates is there before."""
    each, layout = _WIDTH // ranks, _layout(ranks, 1)
    ours = {f"w{i:03}": torch.zeros(_WIDTH, each) for i in range(_TENSORS)}
    columns = [Rows(1)] if ranks > 1 else [Replicate()]
    mesh = init_device_mesh("cpu", (ranks,))
    theirs = {name: DTensor.from_local(tensor, mesh, columns, run_check=False) for name, tensor in ours.items()}
    wanted = wanted_regions(layout, rank, ours)
    saved = Path(folder) / "ours" / "step-00000001"
    on_one_node = Communicator(dist.group.WORLD)
    on_several = Communicator(dist.group.WORLD, nodes=tuple(range(ranks)))

    def sharing_memory() -> None:
        least, node_reading._LEAST_RANKS = node_reading._LEAST_RANKS, 2
        try:
            load(saved, wanted, shard_map=layout, communicator=on_one_node)
        finally:
            node_reading._LEAST_RANKS = least

    readers: dict[str, Callable[[], Any]] = {
        "ours": lambda: load(saved, wanted, shard_map=layout, communicator=on_one_node),
        "ours, in shared memory": sharing_memory,
        "ours, as on three nodes": lambda: load(saved, wanted, shard_map=layout, communicator=on_several),
        "raw read": lambda: _read(Path(folder) / "raw", rank, ranks),
        "torch DCP": lambda: dcp_load(theirs, storage_reader=FileSystemReader(Path(folder) / "dcp")),
        "torch DCP, safetensors": lambda: dcp_load(
            theirs, storage_reader=HuggingFaceStorageReader(str(Path(folder) / "dcp hf"))
        ),
    }
    rounds = [{name: _measured(Path(folder), rank, read) for name, read in readers.items()} for _ in range(1 + _ROUNDS)]
    return rounds[1:]


def _measured(folder: Path, rank: int, read: Callable[[], Any]) -> _Figures:
    if rank == 0:
        forget(folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    dist.barrier()
    before, resident, began_s, used_s = _bytes_read(), _status("VmRSS"), time.monotonic(), time.process_time()
    read()
    seconds, processor_s = time.monotonic() - began_s, time.process_time() - used_s
    from_disk, by_calls = (now - then for now, then in zip(_bytes_read(), before, strict=True))
    found = _Figures(seconds, from_disk, by_calls, processor_s, _status("VmHWM") - resident)
    dist.barrier()
    return found


def _read(path: Path, rank: int, ranks: int) -> None:
    """This rank's share, in calls of 8 MiB."""
    buffer, each = bytearray(8 << 20), _BYTES // ranks
    with path.open("rb", buffering=0) as file:
        file.seek(rank * each)
        for _ in range(0, each, len(buffer)):
            file.readinto(buffer)


def _bytes_read() -> tuple[int, int]:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"]), int(fields["rchar"])


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def _layout(ranks: int, dim: int) -> ShardMap:
    each = _WIDTH // ranks
    sizes = (each, _WIDTH) if dim == 0 else (_WIDTH, each)
    shards = tuple(Shard(Box((of * each, 0) if dim == 0 else (0, of * each), sizes), (of,)) for of in range(ranks))
    return ShardMap({f"w{i:03}": TensorShards("float32", (_WIDTH, _WIDTH), shards) for i in range(_TENSORS)})
