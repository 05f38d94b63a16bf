"""Joining the ranks of a script: one call at its head."""

import os
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from evermesh.parallelism.layout import Layout
from evermesh.runtime import process_group
from evermesh.runtime.config import CpuDevice, CudaDevice
from evermesh.runtime.process_group import Groups


def start(layout: Layout, *, device: Literal["cpu", "cuda"] | None = None, timeout_s: float = 600.0) -> Groups:
    """Join the ranks that ``evermesh launch`` or torchrun started and return their groups along every axis.

    Collective over all ranks; without either launcher this process is the only one. A default group that exists already
    is used as it is.

    Args:
        layout: degrees whose product is the number of ranks; ``Layout(...).fitted_to(world_size)`` makes one.
        device: where this rank computes; by default a GPU where there is one.
        timeout_s: after which a collective without answer fails.

    Raises:
        LayoutDoesNotFit: another number of ranks was started; the message says how many fit.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if not dist.is_initialized():
        layout.check_world(world_size)  # before anybody waits for ranks that will not come
        store: dist.Store = dist.HashStore()
        if "RANK" in os.environ:
            store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
        process_group.start(CudaDevice() if kind == "cuda" else CpuDevice(), rank, world_size, store, timeout_s)
    return process_group.communicators(timeout_s, layout)
