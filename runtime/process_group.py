"""Joining and leaving the process group of all workers."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import Store

from evermesh.parallelism.collectives import Communicator, Moment, Sink
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.mesh import Mesh
from evermesh.runtime.config import CpuDevice, CudaDevice


def start(device: CpuDevice | CudaDevice, rank: int, world_size: int, store: Store, timeout_s: float) -> None:
    """Join the default group as ``rank``. Collective over ``world_size`` processes; returns when all are there.

    They meet in ``store``, which no other attempt may have used: keys of dead ranks make gloo hang.

    CPU workers use gloo. CUDA workers use NCCL, bound to their device at once: a lazily initialised group would open a
    communicator for every pair of ranks that exchange messages.
    """
    timeout = timedelta(seconds=timeout_s)
    if device.kind == "cuda":
        torch.cuda.set_device(local_device(device))
        dist.init_process_group(
            "nccl",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=local_device(device),
        )
    else:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)


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
    """The communicators of one rank, apart from each other so that traffic of different threads and devices never mixes.

    All but control share one ``Moment``, which the trainer moves on; the thread that uses control is ahead of them and
    has its own.
    """

    hdp: Communicator
    """The ranks that hold the same part of the model: gradients, parameters and rings, on the device's own backend."""
    tp: Communicator
    """The ranks that share one model with this one: activations and the gradients of what they all hold."""
    control: Communicator
    """All ranks. Batch plans; used by one background thread only."""
    host: Communicator
    """All ranks. Tensors in host memory, for checkpoints; used by the training thread."""

    @contextmanager
    def listen(self, sink: Sink) -> Iterator[None]:
        """Send a record of every operation of all of them to ``sink``, on the thread that issues it, until the block ends."""
        with ExitStack() as stack:
            for communicator in self:
                stack.enter_context(communicator.listen(sink))
            yield


def communicators(timeout_s: float, layout: Layout) -> Groups:
    """The groups of a training process. Collective when a default group exists; otherwise each is this process alone.

    Raises:
        LayoutDoesNotFit: the default group has another number of ranks than the layout.
    """
    layout.check_world(dist.get_world_size() if dist.is_initialized() else 1)
    control, host = None, None
    timeout = timedelta(seconds=timeout_s)
    if dist.is_initialized():
        control, host = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    nodes, moment = nodes_of_ranks(), Moment()
    return Groups(
        *_axes(Mesh(layout.hdp, layout.tp), nodes, moment, timeout),
        Communicator(control, name="control", nodes=nodes),
        Communicator(host, name="host", nodes=nodes, moment=moment),
    )


def _axes(mesh: Mesh, nodes: Sequence[int], moment: Moment, timeout: timedelta) -> tuple[Communicator, Communicator]:
    """The communicators of this rank along hdp and tp. Every rank makes every group, in one order, as torch wants it."""
    if mesh.tp == 1:
        world = dist.group.WORLD if dist.is_initialized() else None
        return (
            Communicator(world, name="hdp", nodes=tuple(nodes), moment=moment),
            Communicator(name="tp", moment=moment),
        )
    columns = {f"hdp of tp {index}": mesh.column(index) for index in range(mesh.tp)}
    rows = {f"tp of hdp {index}": mesh.row(index) for index in range(mesh.hdp)}
    groups = {name: dist.new_group(list(ranks), timeout=timeout) for name, ranks in (columns | rows).items()}
    row, column = mesh.coordinates(dist.get_rank())
    return (
        _along("hdp", f"hdp of tp {column}", mesh.column(column), groups, nodes, moment),
        _along("tp", f"tp of hdp {row}", mesh.row(row), groups, nodes, moment),
    )


def _along(
    axis: str, name: str, ranks: Sequence[int], groups: Mapping[str, Any], nodes: Sequence[int], moment: Moment
) -> Communicator:
    return Communicator(groups[name], name=name, axis=axis, nodes=tuple(nodes[rank] for rank in ranks), moment=moment)


def nodes_of_ranks() -> tuple[int, ...]:
    """Index of the node of every rank: ``LOCAL_WORLD_SIZE`` consecutive ranks on each, as torchrun sets it; else one node."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    return tuple(rank // ranks_per_node for rank in range(ranks))
