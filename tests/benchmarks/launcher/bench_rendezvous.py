"""How ranks meet: what each asks of the rendezvous store, and how long 2,048 of them take.

- Real ranks over gloo make all groups of a layout and use each once; their store counts. The peer does the same as torch does
  it by default, in the same run: all pairs of every group connect at once.
- One process makes the groups of one rank of 512 and of 2,048, with the real gloo: it waits for nobody.
- 2,048 clients with a connection each ask the real store process for what was counted, from another process.
- Agents of 256 nodes with 8 ranks each join a real controller and are told to start.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist

from evermesh.launcher.agent import warm
from evermesh.launcher.agent.store import StoreProcess
from evermesh.parallelism import Layout
from evermesh.runtime import process_group
from evermesh.runtime.config import CpuDevice
from tests.benchmarks.harness import Row, exact_row
from tests.benchmarks.launcher.bench_controller import play
from tests.cluster import run_ranks
from tests.counting_store import CountingStore

LAZY = "TORCH_GLOO_LAZY_INIT"
RANKS, NODES, RANKS_PER_NODE = 2048, 256, 8
CURVE = (8, 16)
"""Real ranks. Of 32 on two cores some connections break when all pairs connect at once."""
PEER = "all pairs at once, as torch does by default"
PEER_RANKS = 256
"""That ask for as much as they would by default; of 2,048 it is 64 times as much."""


class Met(NamedTuple):
    """What one rank asked for."""

    made: int
    """Operations until it had all groups."""
    used: int
    """Operations of the first use of each."""
    num_bytes: int
    groups: int
    seconds: float


def run() -> list[Row]:
    """Count, then time."""
    rows = [row for ranks in CURVE for row in _curve(ranks)]
    rows += [_simulated(ranks) for ranks in (512, RANKS)]
    rows += _clients()
    rows += _agents()
    return rows


def _curve(ranks: int) -> list[Row]:
    ours, theirs = _meet(ranks, lazy=True), _meet(ranks, lazy=False)
    return [
        exact_row(
            f"{ranks} gloo ranks: operations per rank, groups made and used once",
            statistics.mean(one.made + one.used for one in ours),
            "operations",
            peer=PEER,
            peer_value=statistics.mean(one.made + one.used for one in theirs),
        ),
        exact_row(
            f"{ranks} gloo ranks: bytes of the store, all ranks",
            sum(one.num_bytes for one in ours),
            "bytes",
            peer=PEER,
            peer_value=sum(one.num_bytes for one in theirs),
        ),
        exact_row(
            f"{ranks} gloo ranks: until the slowest has used all groups",
            max(one.seconds for one in ours),
            "s",
            peer=PEER,
            peer_value=max(one.seconds for one in theirs),
        ),
    ]


def layout_of(ranks: int) -> Layout:
    """Every axis: tp x pp x hdp."""
    return Layout(tp=2, pp=2, hdp=ranks // 4) if ranks < 512 else Layout(tp=8, pp=8, hdp=ranks // 64)


def _meet(ranks: int, *, lazy: bool) -> list[Met]:
    with tempfile.TemporaryDirectory() as folder:
        found: list[Met] = run_ranks(ranks, meet, folder, lazy, timeout_s=300.0)
        return found


def meet(rank: int, ranks: int, folder: str, lazy: bool) -> Met:
    """What a real rank does: all groups of a layout, and one collective in each."""
    dist.destroy_process_group()
    os.environ[LAZY], os.environ["LOCAL_WORLD_SIZE"] = str(int(lazy)), "4"
    store = CountingStore(dist.FileStore(str(Path(folder) / "met"), ranks))
    began_s = time.monotonic()
    process_group.start(CpuDevice(), rank, ranks, store, 120.0)
    groups = process_group.communicators(120.0, layout_of(ranks), tied=True)
    made = len(store.asked)
    for communicator in groups._all:
        if communicator.group is not None:
            dist.all_reduce(torch.ones(1), group=communicator.group)
            dist.barrier(group=communicator.group)
    seconds, used = time.monotonic() - began_s, len(store.asked) - made
    num_bytes = sum(size for _, _, size in store.asked)
    dist.barrier()
    return Met(made, used, num_bytes, len(dist.distributed_c10d._world.pg_names), seconds)


def _simulated(ranks: int) -> Row:
    """The groups of one rank in the middle, with nobody else there."""
    began_s = time.monotonic()
    asked = simulate(layout_of(ranks), ranks // 2 + 5)
    seconds = time.monotonic() - began_s
    return exact_row(
        f"one rank of {ranks:,}: operations to make all its groups ({seconds:.2f} s)", len(asked), "operations"
    )


def simulate(layout: Layout, rank: int, *, tied: bool = True, experts: bool = False) -> list[tuple[str, str, int]]:
    """What ``rank`` asks of the store to have all groups of ``layout``."""
    os.environ["LOCAL_WORLD_SIZE"] = str(RANKS_PER_NODE)
    store = CountingStore(dist.HashStore())
    process_group.start(CpuDevice(), rank, layout.world_size, store, 60.0)
    try:
        process_group.communicators(60.0, layout, tied=tied, experts=experts)
    finally:
        process_group.stop()
        del os.environ["LOCAL_WORLD_SIZE"]
    return store.asked


def _clients() -> list[Row]:
    sizes = [size for _, _, size in simulate(layout_of(RANKS), RANKS // 2 + 5)]
    makes: list[list[object]] = [["set", f"{group}/{{rank}}", size] for group, size in enumerate(sizes)]
    # a barrier of all ranks in one group, neighbours in the others
    far = [step for power in range(_log2(RANKS)) for step in (1 << power, -(1 << power))]
    peers = [far if group == 0 else far[:3] for group in range(len(sizes))]
    uses: list[list[object]] = [
        [what, f"{group}/{{{step:+}}}", 0] for group, of in enumerate(peers) for step in of for what in ("wait", "get")
    ]
    (connects_s, makes_s, uses_s), store_s = _play(RANKS, [makes, uses])
    # what each rank writes by default holds a number for every other
    theirs: list[list[object]] = [["set", "{rank}", sizes[0] + 8 * PEER_RANKS]]
    reads: list[list[object]] = [[what, f"{{{step:+}}}", 0] for step in range(PEER_RANKS) for what in ("wait", "get")]
    peer_s, peer_store_s = _play(PEER_RANKS, [theirs, reads])
    what = f"{RANKS:,} clients of the store"
    return [
        exact_row(f"{what} connect (each looks up a name)", connects_s, "s"),
        exact_row(f"{what} make all their groups", makes_s, "s", goal=10.0),
        exact_row(f"{what}: first use of all groups, {len(uses)} operations each", uses_s, "s"),
        exact_row(f"{what}: processor of the store, in all", store_s, "s"),
        exact_row(f"{PEER_RANKS} clients make one group, {PEER}", sum(peer_s), "s"),
        exact_row(f"{PEER_RANKS} clients: processor of the store", peer_store_s, "s"),
    ]


def _log2(ranks: int) -> int:
    return math.ceil(math.log2(ranks))


def _play(ranks: int, phases: list[list[list[object]]]) -> tuple[list[float], float]:
    """Seconds of every phase, from another process, and processor seconds of the real store process."""
    warm.warm_up("evermesh.launcher.agent.training", threads=1)
    store = StoreProcess("127.0.0.1")
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as told:
            json.dump(phases, told)
            told.flush()
            module = "tests.benchmarks.launcher.rendezvous_clients"
            arguments = [store.address.host, str(store.address.port), str(ranks), told.name]
            before_s = _used_s(store)
            done = subprocess.run(
                [sys.executable, "-m", module, *arguments], check=True, stdout=subprocess.PIPE, text=True
            )
            return json.loads(done.stdout), _used_s(store) - before_s
    finally:
        store.close()


def _used_s(store: StoreProcess) -> float:
    found = next(
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == store.address.port
    )
    used = psutil.Process(found).cpu_times()
    return used.user + used.system


def _agents() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        job = play(Path(folder), NODES, 1.0, ranks_per_node=RANKS_PER_NODE)
    what = f"{NODES} agents with {RANKS_PER_NODE} ranks each"
    return [
        exact_row(f"{what}: from the first hello until all are told to start", job["told_s"], "s", goal=10.0),
        exact_row(f"{what}: from the launch until all ranks beat", job["started_s"], "s"),
    ]
