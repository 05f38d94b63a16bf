"""Making the groups of a layout costs a rank what it is a member of, however many ranks there are."""

import math
import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from evermesh.parallelism import Layout
from evermesh.parallelism.mesh import Mesh
from evermesh.runtime import process_group
from evermesh.runtime.config import CpuDevice
from evermesh.runtime.group_making import alone
from tests.cluster import run_ranks
from tests.counting_store import CountingStore

PER_NODE = 8


def _asked(layout: Layout, rank: int, *, experts: bool) -> list[tuple[str, str, int]]:
    """What ``rank`` asks of the store to have all its groups, with the real gloo; nobody else is there."""
    store = CountingStore(dist.HashStore())
    process_group.start(CpuDevice(), rank, layout.world_size, store, 60.0)
    try:
        process_group.communicators(60.0, layout, tied=True, experts=experts)
    finally:
        process_group.stop()
    return store.asked


def _memberships(layout: Layout, rank: int, *, experts: bool) -> int:
    """How many groups a rank is in: all ranks thrice (world, control, host), its axes, its readers, a group for each way of
    each of its links, and its tied embeddings."""
    mesh = Mesh.of(layout)
    axes = ("hdp", "tp", *(("edp", "ep", "etp") if experts else ()))
    of_axes = sum(1 for axis in axes if 1 < len(mesh.group(axis, rank)) < mesh.size)
    place = mesh.coordinates(rank)
    node = range(rank // PER_NODE * PER_NODE, (rank // PER_NODE + 1) * PER_NODE)
    readers = sum(1 for other in node if mesh.coordinates(other).hdp == place.hdp) > 1
    links = sum(1 for link in layout.pipeline.links() if place.pp in link) if mesh.pp > 1 else 0
    ends = layout.pipeline.rank_of(0), layout.pipeline.rank_of(layout.pipeline.num_stages - 1)
    return 3 + of_axes + readers + links + (ends[0] != ends[1] and place.pp in ends)


@pytest.mark.parametrize(
    ("layout", "experts"),
    [
        (Layout(tp=8, hdp=2), False),
        (Layout(tp=8, hdp=32, pp=8), False),
        (Layout(tp=8, hdp=64, pp=4, ep=8), True),
        (Layout(tp=2, hdp=512, pp=2, virtual_stages=2, schedule="interleaved-1f1b"), False),
        (Layout(tp=8, hdp=1536), False),
    ],
    ids=lambda value: f"{value.world_size} ranks" if isinstance(value, Layout) else "",
)
def test_a_rank_writes_one_key_for_each_group_that_it_is_in_and_reads_none(
    layout: Layout, experts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(PER_NODE))
    for rank in (0, layout.world_size // 2 + 3, layout.world_size - 1):
        asked = _asked(layout, rank, experts=experts)
        assert {operation for operation, _, _ in asked} == {"set"}
        assert len({key for _, key, _ in asked}) == len(asked) == _memberships(layout, rank, experts=experts)
        assert max(size for _, _, size in asked) < 512, "it grows with the ranks"


def _use(rank: int, ranks: int, folder: str) -> tuple[int, dict[str, int], float]:
    """All groups made and used once: groups, what was asked for, and the sum of all ranks."""
    dist.destroy_process_group()
    store = CountingStore(dist.FileStore(str(Path(folder) / "met"), ranks))
    process_group.start(CpuDevice(), rank, ranks, store, 60.0)
    groups = process_group.communicators(60.0, Layout(tp=2, hdp=ranks // 2))
    found = [one for one in groups._all if one.group is not None]
    for communicator in found:
        dist.barrier(group=communicator.group)
    total = torch.tensor([float(rank)])
    dist.all_reduce(total)
    only = torch.ones(1)
    dist.all_reduce(only, group=alone())
    assert only.item() == 1
    dist.barrier()
    return len(found), store.counts, total.item()


def test_ranks_read_only_what_peers_wrote_with_whom_they_communicate() -> None:
    """A barrier takes the logarithm of the ranks as many peers, a ring two; all pairs would be ranks - 1 for each group."""
    ranks = 8
    with tempfile.TemporaryDirectory() as folder:
        found = run_ranks(ranks, _use, folder)
    for groups, counts, total in found:
        assert total == sum(range(ranks))
        assert counts["set"] == groups + 1  # and the group of the rank alone
        peers = 2 * math.ceil(math.log2(ranks)) + 2
        assert 0 < counts["get"] <= groups * peers - groups
        assert set(counts) <= {"set", "get", "wait"}


def _make_all_pairs(rank: int, ranks: int, folder: str) -> tuple[int, dict[str, int]]:
    dist.destroy_process_group()
    os.environ["TORCH_GLOO_LAZY_INIT"] = "0"
    store = CountingStore(dist.FileStore(str(Path(folder) / "met"), ranks))
    process_group.start(CpuDevice(), rank, ranks, store, 60.0)
    groups = process_group.communicators(60.0, Layout(hdp=ranks))
    return sum(one.group is not None for one in groups._all), store.counts


def test_whoever_asks_torch_for_all_pairs_gets_them() -> None:
    """What the counts above are compared with."""
    ranks = 4
    with tempfile.TemporaryDirectory() as folder:
        found = run_ranks(ranks, _make_all_pairs, folder)
    for _, counts in found:
        made = counts["set"]
        assert made >= 3
        assert counts["get"] == made * ranks
