"""Groups of ranks, made without anybody waiting for ranks that are not members.

Three things make the creation of all groups of a layout linear in the ranks, where torch alone is quadratic or worse:

- Gloo connects a pair of ranks when they first exchange something, not all pairs at once (``connect_on_demand``). A rank
  then writes one key per group and reads those of the few peers that it talks to; otherwise it reads all of them, and each
  says where every other rank is to connect.
- The default group is not bound to a device. Where it is, torch has all ranks of the job meet in an ``ncclCommSplit`` for
  every group that is made, members or not, gloo's included. Here only the members of an NCCL group meet, and open its
  communicator at once.
- Whoever is no member returns at once: it only counts, so that groups are called the same everywhere.

So a group costs its members alone, and groups without common members are made at the same time (MegaScale, arXiv
2402.15627, section 3.5). All ranks make groups in one order: the earliest that is not complete never waits for a later one.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from evermesh.parallelism.collectives import Communicator, Moment
from evermesh.parallelism.mesh import Mesh

_ON_DEMAND = "TORCH_GLOO_LAZY_INIT"


def connect_on_demand() -> None:
    """Have gloo open a connection when it is first used, in all groups that this process makes from now on; whoever has set
    torch's TORCH_GLOO_LAZY_INIT keeps what it says."""
    os.environ.setdefault(_ON_DEMAND, "1")


class Maker(NamedTuple):
    """Makes groups of one mesh. Every rank asks for the same ones, in one order."""

    mesh: Mesh
    nodes: tuple[int, ...]
    """Index of the node of every rank."""
    timeout: timedelta
    """After which a collective without answer fails."""

    def group(
        self,
        ranks: Sequence[int],
        *,
        name: str,
        axis: str | None = None,
        moment: Moment | None = None,
        backend: str | None = None,
    ) -> Communicator | None:
        """The group of ``ranks``; None if this rank is not one of them. Only members wait for each other.

        Args:
            ranks: ascending.
            name: of the group, the same on all its ranks.
            axis: mesh axis that it lies on; the name by default.
            moment: where the thread that uses it stands; by default one of its own.
            backend: ``gloo`` for tensors in host memory; by default that of the default group.
        """
        device = _device(backend or dist.get_backend())
        made = dist.new_group(list(ranks), timeout=self.timeout, backend=backend, device_id=device)
        if dist.get_rank() not in ranks:
            return None
        nodes = tuple(self.nodes[rank] for rank in ranks)
        return Communicator(made, name=name, axis=axis, nodes=nodes, moment=moment)

    def of_all(self, name: str, moment: Moment, backend: str | None = None) -> Communicator:
        """A group of all ranks."""
        made = self.group(range(self.mesh.size), name=name, moment=moment, backend=backend)
        assert made is not None
        return made


def alone() -> dist.ProcessGroup:
    """A group of this rank by itself. Nobody else is asked."""
    if dist.get_world_size() == 1:
        made = dist.group.WORLD
    else:
        made = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    assert made is not None
    return made


def _device(backend: str) -> torch.device | None:
    """Where a group opens its communicator at once; None: it has none."""
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else None
