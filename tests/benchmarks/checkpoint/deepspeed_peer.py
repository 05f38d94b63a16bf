"""DeepSpeed as a peer: it saves a checkpoint, converts it to its universal form, and loads that on other ranks."""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

WIDTH = 1024
"""Of the layers of the model: each has WIDTH**2 weights, of 14 bytes with the states of AdamW and the copy in bfloat16."""


def load_library() -> Any:
    """The library, in a rank that gloo connects."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled in minutes otherwise
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


def save(rank: int, ranks: int, folder: str, stage: int, layers: int) -> None:
    """Train one step and save. Collective."""
    engine = _engine(load_library(), stage, layers, universal=False)
    engine.backward(engine(torch.ones(1, WIDTH, dtype=torch.bfloat16)).float().square().mean())
    engine.step()
    engine.save_checkpoint(folder, tag="native", client_state={"iteration": 1})


def load_universal(rank: int, ranks: int, folder: str, stage: int, layers: int) -> tuple[float, int]:
    """Seconds, and bytes this rank has read, of the load alone: neither the start of the library nor that of the engine."""
    engine = _engine(load_library(), stage, layers, universal=True)
    dist.barrier()
    before, began_s = bytes_moved()[0], time.monotonic()
    engine.load_checkpoint(folder, tag="universal")
    dist.barrier()
    return time.monotonic() - began_s, bytes_moved()[0] - before


def bytes_moved() -> tuple[int, int]:
    """Bytes that this process has read and written so far, by system calls."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"]), int(fields["wchar"])


def _engine(deepspeed: Any, stage: int, layers: int, *, universal: bool) -> Any:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))).bfloat16()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": True},
            "checkpoint": {"load_universal": universal},
        },
        dist_init_required=False,
    )
    return engine


def _convert(source: str, target: str, extract_workers: int, merge_workers: int) -> dict[str, float]:
    from deepspeed.checkpoint.ds_to_universal import main

    before, began_s = bytes_moved(), time.monotonic()
    main(
        argparse.Namespace(
            input_folder=source,
            output_folder=target,
            num_extract_workers=extract_workers,
            num_merge_workers=merge_workers,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
    read, written = (now - then for now, then in zip(bytes_moved(), before, strict=True))
    return {"seconds": time.monotonic() - began_s, "read": read, "written": written}


if __name__ == "__main__":  # a process of its own: the library starts pools, and counts no bytes of theirs as ours
    os.environ["DS_ACCELERATOR"] = "cpu"
    print("\n" + json.dumps(_convert(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
