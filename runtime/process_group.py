"""Joining and leaving the process group of all workers."""

import os
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from evermesh.parallelism.collectives import Communicator
from evermesh.runtime.config import CpuDevice, CudaDevice


def start(device: CpuDevice | CudaDevice, rank: int, world_size: int, init_method: str, timeout_s: float) -> None:
    """Join the default group as ``rank``. Collective over ``world_size`` processes; returns when all are there.

    CPU workers use gloo. CUDA workers use NCCL, bound to their device at once: a lazily initialised group would open a
    communicator for every pair of ranks that exchange messages.
    """
    timeout = timedelta(seconds=timeout_s)
    if device.kind == "cuda":
        torch.cuda.set_device(local_device(device))
        dist.init_process_group(
            "nccl",
            init_method=init_method,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=local_device(device),
        )
    else:
        dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size, timeout=timeout)


def stop() -> None:
    """Leave the default group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_device(device: CpuDevice | CudaDevice) -> torch.device:
    """The device of this worker: by ``LOCAL_RANK``, as torchrun sets it, else the first."""
    if device.kind == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


class Groups(NamedTuple):
    """The same ranks, three times, so that traffic of different threads and devices never mixes."""

    training: Communicator
    """Gradients, parameters and rings, on the device's own backend."""
    control: Communicator
    """Batch plans; used by one background thread only."""
    host: Communicator
    """Tensors in host memory, for checkpoints; used by the training thread."""


def communicators(timeout_s: float) -> Groups:
    """The groups of a training process. Collective when a default group exists; otherwise each is this process alone."""
    if not dist.is_initialized():
        return Groups(Communicator(name="hdp"), Communicator(name="control"), Communicator(name="host"))
    timeout = timedelta(seconds=timeout_s)
    control, host = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    return Groups(
        Communicator(dist.group.WORLD, name="hdp"),
        Communicator(control, name="control"),
        Communicator(host, name="host"),
    )
