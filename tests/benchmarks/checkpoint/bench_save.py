"""What a save costs: how long training stands still, how long the disk takes, and what an incremental save writes.

Peers in the same rounds, on the same disk: a plain copy of the state, a plain write with fsync, and ``async_save`` of torch
distributed checkpoint with a thread and with a process. Sizes: ``SIZE_MB`` megabytes (300).
"""

import os
import shutil
import statistics
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

from evermesh.checkpoint import BackgroundSaver, Box, Shard, ShardMap, TensorShards, save
from evermesh.checkpoint.files import ChecksummedFile
from tests.benchmarks.harness import Row, exact_row, paired_row

_BYTES = int(os.environ.get("SIZE_MB", "300")) * 10**6
_ROUNDS = 7
_TENSORS = 60


def run() -> list[Row]:
    """All rows, on one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # async_save wants one
    try:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            found = _measure(folder)
    finally:
        dist.destroy_process_group()
    rows = [
        paired_row("stop per asynchronous save", found["stop"], "s", peer="memcpy", peer_values=found["memcpy"]),
        paired_row(
            "stop of the first save", found["first"], "s", peer="memcpy", peer_values=found["memcpy of the first"]
        ),
    ]
    for kind in ("thread", "process"):
        peer = f"torch DCP async_save, {kind}"
        rows.append(paired_row("stop per asynchronous save", found["stop"], "s", peer=peer, peer_values=found[kind]))
        first = statistics.median(found["first"])
        rows.append(exact_row("stop of the first save", first, "s", peer=peer, peer_value=found[f"{kind}, first"][0]))
    raw = {"unit": "MB/s", "peer": "write + fsync", "peer_values": found["raw"]}
    rows.append(paired_row("durable save with checksums", found["durable"], **raw))
    rows.append(paired_row("asynchronous save until it is committed", found["behind"], **raw))
    share = statistics.median(found["checksums"])
    rows.append(Row("checksums, share of the time of a durable save", share, "ratio", goal=0.05))
    rows.append(paired_row("durable save with parity of one rank", found["with parity"], **raw))
    part = found["incremental"] / found["full"]
    rows.append(Row("incremental save, 90% of the weights frozen, share of the bytes", part, "ratio", goal=0.12))
    return rows


def _measure(folder: str) -> dict[str, Any]:
    tensors = {f"block.{i:02}.weight": torch.randn(_BYTES // 4 // _TENSORS) for i in range(_TENSORS)}
    whole = ShardMap({name: _one(tensor) for name, tensor in tensors.items()})
    found: dict[str, Any] = {}
    places = {name: Path(folder) / name for name in ("ours", "thread", "process", "raw", "durable", "parity")}
    copies = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}

    def copy() -> None:
        for name, tensor in tensors.items():
            copies[name].copy_(tensor)

    copy()
    with BackgroundSaver(places["ours"], whole, tensors, keep=1) as saver:
        for step in range(_ROUNDS + 1):
            figures = {
                "memcpy": _seconds(copy),
                **_behind(saver, step),
                **{kind: _peer(kind, places[kind] / str(step), tensors) for kind in ("thread", "process")},
                **_durable(places, step, whole, tensors),
            }
            for name, value in figures.items():
                found.setdefault(name if step else f"{name}, first", []).append(value)
    for number in range(_ROUNDS):  # a first save is one of a saver of its own
        with BackgroundSaver(Path(folder) / "first" / str(number), whole, tensors) as saver:
            found.setdefault("memcpy of the first", []).append(_seconds(copy))
            found.setdefault("first", []).append(_behind(saver, 1)["stop"])
        shutil.rmtree(Path(folder) / "first")
    return found | _incremental(Path(folder) / "incremental", whole, tensors)


def _behind(saver: BackgroundSaver, step: int) -> dict[str, float]:
    began_s = time.monotonic()
    saver.begin(step, {})
    stop_s = time.monotonic() - began_s
    saver.finish()
    return {"stop": stop_s, "behind": _BYTES / 1e6 / (time.monotonic() - began_s)}


def _peer(kind: str, path: Path, tensors: Mapping[str, torch.Tensor]) -> float:
    """Seconds until ``async_save`` returns; its pinned or shared copy is kept by its stager where it has one."""
    types = {"thread": AsyncCheckpointerType.THREAD, "process": AsyncCheckpointerType.PROCESS}
    began_s = time.monotonic()
    writer = FileSystemWriter(path, sync_files=True)
    under_way: Any = async_save(dict(tensors), storage_writer=writer, async_checkpointer_type=types[kind])
    stop_s = time.monotonic() - began_s
    under_way.result()
    shutil.rmtree(path)
    return stop_s


def _durable(
    places: Mapping[str, Path], step: int, whole: ShardMap, tensors: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    raw_s = _seconds(lambda: _write(places["raw"], tensors))
    with _timed_checksums() as checksum_s:
        durable_s = _seconds(lambda: save(places["durable"], step, whole, dict(tensors), {}, keep=1))
    share = sum(checksum_s) / durable_s
    parity_s = _seconds(lambda: save(places["parity"], step, whole, dict(tensors), {}, keep=1, parity=1))
    megabytes = _BYTES / 1e6
    return {
        "raw": megabytes / raw_s,
        "durable": megabytes / durable_s,
        "checksums": share,
        "with parity": megabytes / parity_s,
    }


@contextmanager
def _timed_checksums() -> Iterator[list[float]]:
    """Inside of it: what every call took that computes checksums of bytes which were just written, seconds."""
    taken: list[float] = []
    add = ChecksummedFile._add

    def timed(file: ChecksummedFile, written: memoryview) -> None:
        began_s = time.perf_counter()
        add(file, written)
        taken.append(time.perf_counter() - began_s)

    ChecksummedFile._add = timed  # type: ignore[method-assign,assignment]
    try:
        yield taken
    finally:
        ChecksummedFile._add = add  # type: ignore[method-assign]


def _write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    path.unlink(missing_ok=True)
    with path.open("wb", buffering=0) as file:
        for tensor in tensors.values():
            file.write(tensor.numpy().data)
        os.fsync(file.fileno())


def _incremental(directory: Path, whole: ShardMap, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Bytes of data files that a first and a third save write, when every tenth tensor changes in between."""
    written = []
    with BackgroundSaver(directory, whole, tensors, keep=2, incremental=True) as saver:
        for step in range(3):
            saver.begin(step, {})
            report = saver.finish()
            assert report is not None
            written.append(report.bytes_written)
            for name in list(tensors)[::10]:
                tensors[name].add_(1)
    return {"full": written[0], "incremental": written[-1]}


def _one(tensor: torch.Tensor) -> TensorShards:
    shape = tuple(tensor.shape)
    return TensorShards("float32", shape, (Shard(Box((0,) * len(shape), shape), (0,)),))


def _seconds(work: Callable[[], Any]) -> float:
    began_s = time.monotonic()
    work()
    return time.monotonic() - began_s
