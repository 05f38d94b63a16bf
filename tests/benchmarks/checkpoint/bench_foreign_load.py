"""A DeepSpeed checkpoint of two ranks on four: read where it lies, against converting it and loading what comes out.

Peers, in the same rounds: ``ds_to_universal`` with one process and with its own number of them, the faster counts, and then
``load_checkpoint`` with ``load_universal``. Neither the start of Python nor that of the library is counted. What is read lies
on the disk, not in the page cache. ``SIZE_MB`` (400) are the megabytes of weights in bfloat16, masters and two moments.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from evermesh.checkpoint import Interval, Shard, ShardMap, TensorShards, load, open_checkpoint, wanted_regions
from evermesh.checkpoint.foreign import deepspeed  # noqa: F401  (the start of the library is not counted)
from tests.benchmarks.checkpoint import deepspeed_peer as peer
from tests.benchmarks.checkpoint.page_cache import forget
from tests.benchmarks.harness import Row, exact_row, paired_row
from tests.cluster import run_ranks

_LAYERS = max(1, int(os.environ.get("SIZE_MB", "400")) * 10**6 // (14 * peer.WIDTH**2))
_ROUNDS = int(os.environ.get("ROUNDS", "7"))
_SAVED_BY, _LOADED_BY = 2, 4
_STATES = ("parameter", "exp_avg", "exp_avg_sq")


def run() -> list[Row]:
    """Rows for ZeRO-1 and ZeRO-3."""
    rows = []
    for stage in (1, 3):
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            run_ranks(_SAVED_BY, peer.save, folder, stage, _LAYERS, timeout_s=170.0)
            rows += _rows(stage, [_round(Path(folder), stage) for _ in range(_ROUNDS)])
    return rows


def _rows(stage: int, rounds: list[dict[str, float]]) -> list[Row]:
    found = {name: [one[name] for one in rounds] for name in rounds[0]}
    ours = found["ours"]
    what = f"ZeRO-{stage}, {_SAVED_BY} ranks to {_LOADED_BY}: "
    needed = 3 * 4 * _LAYERS * peer.WIDTH**2
    both = [convert + loading for convert, loading in zip(found["convert"], found["load"], strict=True)]
    return [
        paired_row(what + "load", ours, "s", peer="convert + load_universal", peer_values=both),
        paired_row(what + "load", ours, "s", peer="load_universal alone", peer_values=found["load"]),
        exact_row(
            what + "bytes read / needed",
            statistics.median(found["read"]) / needed,
            "ratio",
            goal=1.05,
            peer="convert + load_universal",
            peer_value=(statistics.median(found["convert read"]) + statistics.median(found["load read"])) / needed,
        ),
        exact_row(
            what + "bytes written / needed",
            statistics.median(found["ours written"]) / needed,
            "ratio",
            goal=0.0,
            peer="convert",
            peer_value=statistics.median(found["written"]) / needed,
        ),
    ]


def _round(folder: Path, stage: int) -> dict[str, float]:
    ours = run_ranks(_LOADED_BY, _load, str(folder / "native"), _LAYERS)
    conversions = [_convert(folder, *workers) for workers in ((4, 2), (1, 1))]
    forget(folder / "universal")
    theirs = run_ranks(_LOADED_BY, peer.load_universal, str(folder), stage, _LAYERS, timeout_s=170.0)
    return {
        "ours": max(seconds for seconds, _, _ in ours),
        "read": sum(read for _, read, _ in ours),
        "ours written": sum(written for _, _, written in ours),
        "convert": min(one["seconds"] for one in conversions),
        "convert read": conversions[1]["read"],
        "written": conversions[1]["written"],
        "load": max(seconds for seconds, _ in theirs),
        "load read": sum(read for _, read in theirs),
    }


def _convert(folder: Path, extract_workers: int, merge_workers: int) -> dict[str, float]:
    target = folder / "universal"
    shutil.rmtree(target, ignore_errors=True)
    forget(folder / "native")
    command = [sys.executable, "-m", peer.__name__, str(folder / "native"), str(target)]
    done = subprocess.run(
        [*command, str(extract_workers), str(merge_workers)], check=True, capture_output=True, text=True
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _load(rank: int, ranks: int, folder: str, layers: int) -> tuple[float, int, int]:
    """Seconds, bytes read of the files, and bytes written by this rank."""
    names = [f"{state}.{layer}.weight" for state in _STATES for layer in range(layers)]
    each = peer.WIDTH**2 // ranks
    shards = tuple(Shard(Interval(of * each, (of + 1) * each), (of,)) for of in range(ranks))
    layout = ShardMap({name: TensorShards("float32", (peer.WIDTH, peer.WIDTH), shards) for name in names})
    held = {name: torch.zeros(each) for name in names}
    if rank == 0:
        forget(Path(folder))
    dist.barrier()
    before, began_s = peer.bytes_moved(), time.monotonic()
    load(open_checkpoint(folder), wanted_regions(layout, rank, held), shard_map=layout, strict=False)
    seconds = time.monotonic() - began_s
    read, written = (now - then for now, then in zip(peer.bytes_moved(), before, strict=True))
    dist.barrier()
    return seconds, read, written
