"""Joining and leaving the process group of all workers."""

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import Store

from evermesh.parallelism.collectives import Communicator, Moment, Sink
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.mesh import Axis, Coordinates, Mesh
from evermesh.parallelism.pipeline.links import Links
from evermesh.parallelism.pipeline.schedule import PipelineSchedule
from evermesh.parallelism.tiers import LEVELS, Division
from evermesh.runtime.config import CpuDevice, CudaDevice
from evermesh.runtime.group_making import Maker, connect_on_demand
from evermesh.runtime.parameter_set import Owners


class StartTimes(NamedTuple):
    """What joining took, seconds."""

    device_s: float
    """Until the device could be used: on CUDA the context; 0 on CPU."""
    group_s: float
    """From then on until this rank had the default group."""


def start(device: CpuDevice | CudaDevice, rank: int, world_size: int, store: Store, timeout_s: float) -> StartTimes:
    """Join the default group as ``rank``. Collective over ``world_size`` processes, which ``communicators`` lets meet.

    They meet in ``store``, which no other attempt may have used: keys of dead ranks make gloo hang. It has to be there for as
    long as they train.

    CPU workers use gloo. CUDA workers use NCCL; the default group opens no communicator of its own, for one that was bound to
    a device would have all ranks meet for every group (``group_making``).
    """
    connect_on_demand()
    began_s = ready_s = time.monotonic()
    if device.kind == "cuda":
        torch.cuda.set_device(local_device(device))
        torch.cuda.synchronize()  # makes the context
        ready_s = time.monotonic()
    backend, timeout = "nccl" if device.kind == "cuda" else "gloo", timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return StartTimes(ready_s - began_s, time.monotonic() - ready_s)


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
    has its own. An axis with one rank is that rank alone.
    """

    world: Communicator
    """All ranks, on the device's own backend: the few numbers that a step agrees on."""
    hdp: Communicator
    """The ranks that hold the same part of the model: gradients, parameters and rings."""
    tp: Communicator
    """The ranks that share one model with this one: activations and the gradients of what they all hold."""
    edp: Communicator
    """The ranks that hold the same part of the same experts; the rank alone where no model has experts."""
    ep: Communicator
    """The ranks that share the experts among them: tokens."""
    etp: Communicator
    """The ranks that share the matrices of the same experts."""
    owners: Owners
    """The ranks of ``hdp``, and how they divide parameters, gradients and optimizer states."""
    expert_owners: Owners
    """The ranks of ``edp``, likewise."""
    place: Coordinates
    """Of this rank."""
    links: Links
    """To and from the neighbours in the pipeline, by (sender, receiver)."""
    tied: Communicator | None
    """The first and the last rank of this pipeline, if this is one of them and the model ties their embeddings."""
    control: Communicator
    """All ranks. Batch plans; used by one background thread only."""
    host: Communicator
    """All ranks. Tensors in host memory, for checkpoints; used by the training thread."""
    readers: Communicator
    """The ranks of this node that train on the same tokens, of which the first reads them; used as ``control`` is."""

    @property
    def moment(self) -> Moment:
        """Where the training thread stands."""
        return self.world.moment

    @contextmanager
    def listen(self, sink: Sink) -> Iterator[None]:
        """Send a record of every operation of all of them to ``sink``, on the thread that issues it, until the block ends."""
        with ExitStack() as stack:
            for communicator in self._all:
                stack.enter_context(communicator.listen(sink))
            yield

    @property
    def _all(self) -> tuple[Communicator, ...]:
        """Each once."""
        axes = (self.world, self.hdp, self.tp, self.edp, self.ep, self.etp, self.control, self.host, self.readers)
        levels = (owners.at(level) for owners in (self.owners, self.expert_owners) for level in LEVELS)
        found = (*axes, *levels, *self.links.values(), *([self.tied] if self.tied else []))
        return tuple({id(communicator): communicator for communicator in found}.values())

    def leave(self, after: "Groups") -> None:
        """Leave those that ``after``, the groups of the layout that takes the place of this one, has not taken over.

        Every rank calls it, when nobody uses them any more.
        """
        kept = {communicator.group for communicator in after._all}
        gone = {communicator.group for communicator in self._all} - kept - {None}
        for group in sorted(gone, key=lambda group: group.group_name):  # type: ignore[union-attr]
            dist.destroy_process_group(group)


def communicators(
    timeout_s: float, layout: Layout, *, experts: bool = False, tied: bool = False, before: Groups | None = None
) -> Groups:
    """The groups of a training process. Collective when a default group exists; otherwise each is this process alone.

    Args:
        timeout_s: after which a collective without answer fails.
        layout: degrees of all axes.
        experts: whether there are parameters on the expert side.
        tied: whether embedding and head are one parameter.
        before: those of another layout; what does not depend on the layout is taken over, and where the threads stand.

    Raises:
        LayoutDoesNotFit: the default group has another number of ranks than the layout.
    """
    layout.check_world(dist.get_world_size() if dist.is_initialized() else 1)
    connect_on_demand()  # also where a script has made the default group
    mesh, nodes = Mesh.of(layout), nodes_of_ranks()
    maker = Maker(mesh, nodes, timedelta(seconds=timeout_s))
    world, control, host = (before.world, before.control, before.host) if before else _of_all(maker)
    axes = {axis: _along(axis, maker, world) for axis in (*_DENSE, *(_EXPERTS if experts else ()))}
    alone = {axis: Communicator(name=axis, moment=world.moment) for axis in _EXPERTS if not experts}
    owners = _owners("hdp", axes["hdp"], layout.division, maker)
    expert_owners = Owners()
    if experts:
        expert_owners = _owners("edp", axes["edp"], layout.expert_division, maker)
    return Groups(
        owners=owners,
        expert_owners=expert_owners,
        world=world,
        control=control,
        host=host,
        readers=_readers(maker, control.moment),
        place=mesh.coordinates(world.rank),
        links=_links(maker, layout.pipeline, world.moment),
        tied=_tied(maker, layout.pipeline, world.moment) if tied else None,
        **axes,
        **alone,
    )


def _of_all(maker: Maker) -> tuple[Communicator, Communicator, Communicator]:
    """World, control and host: they are the same in all layouts."""
    moment, control_moment = Moment(), Moment()
    if maker.mesh.size == 1:  # one rank has nobody to talk to
        return (
            Communicator(name="world", moment=moment),
            Communicator(name="control", moment=control_moment),
            Communicator(name="host", moment=moment),
        )
    world = Communicator(dist.group.WORLD, name="world", nodes=maker.nodes, moment=moment)
    return (
        world if dist.get_backend() != "nccl" else maker.of_all("world", moment),
        maker.of_all("control", control_moment, backend="gloo"),
        maker.of_all("host", moment, backend="gloo"),
    )


def _readers(maker: Maker, moment: Moment) -> Communicator:
    """The ranks of one node with one HDP coordinate."""
    sharing: dict[tuple[int, int], list[int]] = defaultdict(list)
    for rank, node in enumerate(maker.nodes):
        sharing[maker.mesh.coordinates(rank).hdp, node].append(rank)
    found = Communicator(name="readers", moment=moment)
    for (hdp, node), ranks in sorted(sharing.items()):
        if len(ranks) > 1:
            name = f"readers {hdp} {node}"
            found = maker.group(ranks, name=name, axis="readers", moment=moment, backend="gloo") or found
    return found


def _links(maker: Maker, schedule: PipelineSchedule, moment: Moment) -> dict[tuple[int, int], Communicator]:
    """The links of this rank: one group of two for each way."""
    links: dict[tuple[int, int], Communicator] = {}
    for ranks in maker.mesh.groups("pp") if maker.mesh.pp > 1 else ():
        for link in schedule.links():
            pair = sorted(ranks[end] for end in link)
            name = f"pipeline {pair[0]} {'to' if link[0] < link[1] else 'from'} {pair[1]}"
            if made := maker.group(pair, name=name, axis="pp", moment=moment):
                links[link] = made
    return links


def _tied(maker: Maker, schedule: PipelineSchedule, moment: Moment) -> Communicator | None:
    """Embedding and head, where they are on different ranks."""
    found = None
    ends = schedule.rank_of(0), schedule.rank_of(schedule.num_stages - 1)
    for ranks in maker.mesh.groups("pp") if ends[0] != ends[1] else ():
        pair = sorted(ranks[end] for end in ends)
        found = maker.group(pair, name=f"tied {ranks[ends[0]]}", axis="pp", moment=moment) or found
    return found


_DENSE: tuple[Axis, ...] = ("hdp", "tp")
_EXPERTS: tuple[Axis, ...] = ("edp", "ep", "etp")


def _along(axis: Axis, maker: Maker, world: Communicator) -> Communicator:
    """The communicator of this rank along an axis."""
    groups = maker.mesh.groups(axis)
    if len(groups[0]) == 1:
        return Communicator(name=axis, moment=world.moment)
    if len(groups) == 1:
        return Communicator(world.group, name=axis, nodes=maker.nodes, moment=world.moment)
    made = [
        maker.group(ranks, name=f"{axis} {own}", axis=axis, moment=world.moment) for own, ranks in enumerate(groups)
    ]
    return next(communicator for communicator in made if communicator is not None)


def _owners(axis: Axis, along: Communicator, division: Division, maker: Maker) -> Owners:
    """The groups of every level, and those of all owners once."""
    levels: dict[str, Communicator] = {}
    for level in LEVELS:
        size = division.size(level)
        if size in (1, division.ranks):
            levels[level] = along if size > 1 else Communicator(moment=along.moment)
            continue
        for owners in maker.mesh.groups(axis):
            for number, places in enumerate(division.groups(level)):
                ranks, name = [owners[place] for place in places], f"{along.name} {level} {number}"
                if made := maker.group(ranks, name=name, axis=axis, moment=along.moment):
                    levels[level] = made
    return Owners(along, division, **levels)


def nodes_of_ranks() -> tuple[int, ...]:
    """Index of the node of every rank: ``LOCAL_WORLD_SIZE`` consecutive ranks on each, as torchrun sets it; else one node."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    return tuple(rank // ranks_per_node for rank in range(ranks))
