"""Memory that the ranks of a node share for a while. It has no name, so nothing is left behind when they are killed."""

import mmap
import os
import secrets
from dataclasses import dataclass

import numpy as np
import torch

from evermesh.checkpoint.agreement import together
from evermesh.checkpoint.files import ByteArray
from evermesh.parallelism.collectives import Communicator

_CALL_SITE = "checkpoint"
_NAME, _KEY_BYTES = "evermesh-load", 8


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """What the ranks of one node see alike, of as many bytes as was asked for; all of it is zeros at first."""

    content: ByteArray
    place: int
    """Of this rank among those of its node, from 0."""
    size: int
    """Ranks of the node."""


def shared_memory(communicator: Communicator, bytes_per_rank: int) -> NodeMemory:
    """Memory of ``bytes_per_rank`` for every rank of the node, one after the other. Collective over all nodes.

    The first rank of a node makes a file without a name, and tells its process and descriptor; the others open it through
    ``/proc``. All pages are allocated, so no access fails later.

    Raises:
        RankFailure: on every rank, if some rank cannot share memory: there is none left, or the ranks of a node do not see
            each other's processes.
    """
    rank, nodes = communicator.rank, communicator.nodes
    members = [other for other in range(communicator.size) if nodes[other] == nodes[rank]]
    num_bytes = max(bytes_per_rank * len(members), mmap.PAGESIZE)
    made: list[int] = []
    key = secrets.randbits(62)
    try:
        together(communicator, lambda: made.append(_made(num_bytes, key)) if rank == members[0] else None)
        told = torch.zeros(communicator.size, 3, dtype=torch.int64)
        own = torch.tensor([[os.getpid(), *made, key] if made else [0, 0, 0]], dtype=torch.int64)
        communicator.all_gather(told, own, _CALL_SITE)
        process, number, token = told[members[0]].tolist()
        memory = together(communicator, lambda: _mapped(process, number, token, num_bytes))
    finally:
        for descriptor in made:
            os.close(descriptor)
    content = np.frombuffer(memory, np.uint8)
    content[: _KEY_BYTES * (rank == members[0])] = 0  # all have seen it
    communicator.barrier(_CALL_SITE)
    return NodeMemory(content, members.index(rank), len(members))


def _made(num_bytes: int, key: int) -> int:
    descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
        os.pwrite(descriptor, key.to_bytes(_KEY_BYTES, "little"), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _mapped(process: int, number: int, key: int, num_bytes: int) -> mmap.mmap:
    """The memory that the first rank of the node has made. Raises ``OSError`` if it is not to be seen from here."""
    path = f"/proc/{process}/fd/{number}"
    if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
        raise OSError(f"{path} is not the memory of the node")
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.pread(descriptor, _KEY_BYTES, 0) != key.to_bytes(_KEY_BYTES, "little"):
            raise OSError(f"{path} is the memory of another node")
        return mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    finally:
        os.close(descriptor)
