"""Twenty ways in which a training script communicates, each with the operations that it must leave.

Every path prepares on all ranks and returns what is then run while it is watched.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

Run = Callable[[], object]


def all_reduce(rank: int) -> Run:
    return lambda: dist.all_reduce(torch.ones(4))


def all_reduce_in_background(rank: int) -> Run:
    def run() -> None:
        work = dist.all_reduce(torch.ones(4), async_op=True)
        assert work is not None
        work.wait()

    return run


def broadcast(rank: int) -> Run:
    return lambda: dist.broadcast(torch.ones(4), 1)


def all_gather(rank: int) -> Run:
    return lambda: dist.all_gather([torch.empty(4) for _ in range(2)], torch.ones(4))


def all_gather_into_tensor(rank: int) -> Run:
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    return lambda: gather(torch.empty(8), torch.ones(4))


def reduce_scatter_tensor(rank: int) -> Run:
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    return lambda: scatter(torch.empty(4), torch.ones(8))


def all_to_all(rank: int) -> Run:
    return lambda: dist.all_to_all_single(torch.empty(4), torch.ones(4))


def to_one_and_back(rank: int) -> Run:
    def run() -> None:
        parts = [torch.empty(2) for _ in range(2)] if rank == 0 else None
        dist.gather(torch.ones(2), parts, 0)
        dist.scatter(torch.empty(2), parts, 0)
        dist.reduce(torch.ones(2), 0)

    return run


def barrier(rank: int) -> Run:
    return lambda: dist.barrier()


def monitored_barrier(rank: int) -> Run:
    return lambda: dist.monitored_barrier()


def send_and_receive(rank: int) -> Run:
    tensor = torch.ones(3)
    return (lambda: dist.send(tensor, 1)) if rank == 0 else (lambda: dist.recv(tensor, 0))


def batch_of_messages(rank: int) -> Run:
    def run() -> None:
        operations = [dist.P2POp(dist.isend, torch.ones(3), 1 - rank), dist.P2POp(dist.irecv, torch.empty(3), 1 - rank)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return run


def subgroup(rank: int) -> Run:
    group = dist.new_group([0, 1], group_desc="pair")
    return lambda: dist.all_reduce(torch.ones(4), group=group)


def group_of_a_mesh(rank: int) -> Run:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("outer", "inner"))
    return lambda: dist.all_reduce(torch.ones(4), group=mesh.get_group("inner"))


def objects(rank: int) -> Run:
    found: list[Any] = [None, None]
    return lambda: dist.all_gather_object(found, {"rank": rank})


def fully_sharded(rank: int) -> Run:
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(8, 8)
    fully_shard(model, mesh=_mesh())
    return lambda: model(torch.ones(2, 8)).sum().backward()


def distributed_data_parallel(rank: int) -> Run:
    model = nn.parallel.DistributedDataParallel(nn.Linear(8, 8))
    model(torch.ones(2, 8)).sum().backward()  # the first backward is like no other
    return lambda: model(torch.ones(2, 8)).sum().backward()


def functional(rank: int) -> Run:
    import torch.distributed._functional_collectives as functions

    def run() -> None:
        summed = functions.all_reduce(torch.ones(4), "sum", [0, 1])
        assert summed.sum() == 8

    return run


def distributed_tensor(rank: int) -> Run:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    matrix = distribute_tensor(torch.ones(4, 4), _mesh(), [Shard(0)])
    return lambda: matrix.redistribute(placements=[Replicate()]).to_local()


def pipelined(rank: int) -> Run:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    stage = PipelineStage(nn.Linear(4, 4), rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 2, loss_fn=lambda output, target: (output - target).sum())

    def run() -> None:
        if rank == 0:
            schedule.step(torch.ones(4, 4))
        else:
            schedule.step(target=torch.ones(4, 4))

    return run


def _mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2,))


PATHS: tuple[tuple[Callable[[int], Run], frozenset[str]], ...] = (
    (all_reduce, frozenset({"all_reduce"})),
    (all_reduce_in_background, frozenset({"all_reduce"})),
    (broadcast, frozenset({"broadcast"})),
    (all_gather, frozenset({"all_gather"})),
    (all_gather_into_tensor, frozenset({"all_gather"})),
    (reduce_scatter_tensor, frozenset({"reduce_scatter"})),
    (all_to_all, frozenset({"all_to_all"})),
    (to_one_and_back, frozenset({"gather", "scatter", "reduce"})),
    (barrier, frozenset({"barrier"})),
    (monitored_barrier, frozenset({"barrier"})),
    (send_and_receive, frozenset({"send", "receive"})),
    (batch_of_messages, frozenset({"send", "receive"})),
    (subgroup, frozenset({"all_reduce"})),
    (group_of_a_mesh, frozenset({"all_reduce"})),
    (objects, frozenset({"all_gather"})),
    (fully_sharded, frozenset({"all_gather", "reduce_scatter"})),
    (distributed_data_parallel, frozenset({"all_reduce"})),
    (functional, frozenset({"all_reduce"})),
    (distributed_tensor, frozenset({"all_gather"})),
    (pipelined, frozenset({"send", "receive"})),
)
"""With what both ranks together must leave."""
