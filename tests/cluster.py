"""Real ranks for tests: forked from a server that has torch and the trainer loaded, rendezvous through a file, gloo."""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = ["torch", "torch.distributed", "numpy", "pytest", "evermesh.launcher.agent.training"]
"""The last one brings the trainer and the compiled loops of the planner, as the warm process of a node does."""
_CONTEXT.set_forkserver_preload(_PRELOADED)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the fork server, which starts later


def preload(*modules: str) -> None:
    """Have ranks start with these modules loaded too; called where tests are collected, before the first rank starts."""
    _PRELOADED.extend(module for module in modules if module not in _PRELOADED)
    _CONTEXT.set_forkserver_preload(_PRELOADED)


class RankFailed(AssertionError):
    """A rank raised; the message holds its traceback."""


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 90.0) -> list[Any]:
    """Run ``function(rank, world_size, *arguments)`` on real processes in one gloo group; return results by rank.

    ``function`` is importable (module level). Every process has ended when this returns.

    Raises:
        RankFailed: the first rank that failed, with its traceback, or the ranks without an answer in ``timeout_s``.
    """
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = Path(folder) / "rendezvous"
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            _CONTEXT.Process(
                target=_main, args=(rank, world_size, str(rendezvous), sender, function, arguments), daemon=True
            )
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()
        try:
            results = _collect([receiver for receiver, _ in pipes], timeout_s)
            for process in processes:
                process.join(timeout=10)
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(receivers: list[Any], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = dict(enumerate(receivers))
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting.values()), timeout=timeout_s)
        if not ready:
            raise RankFailed(f"ranks {sorted(waiting)} gave no answer in {timeout_s:.0f} s")
        for rank in [rank for rank, receiver in waiting.items() if receiver in ready]:
            try:
                failed, value = pickle.loads(waiting.pop(rank).recv_bytes())  # noqa: S301
            except EOFError:
                raise RankFailed(f"rank {rank} ended without an answer") from None
            if failed:
                raise RankFailed(f"rank {rank}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(receivers))]


def _main(
    rank: int, world_size: int, rendezvous: str, sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        # plain pickle sends tensors by value; the pipe's own would pass file descriptors of a process that may be gone
        sender.send_bytes(pickle.dumps((False, function(rank, world_size, *arguments))))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        sender.send_bytes(pickle.dumps((True, traceback.format_exc())))
        raise


@dataclass
class PeakMemory:
    """Bytes of resident memory at the peak, over those at the start."""

    num_bytes: int = 0


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measure the peak of this process's resident memory inside the block (Linux resets it through /proc)."""
    peak = PeakMemory()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    yield peak
    peak.num_bytes = _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
