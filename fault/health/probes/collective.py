"""Collectives among processes of this node, with sums that are known."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from evermesh.fault.health.verdicts import Verdict

_ELEMENTS = 1 << 18
_CHECK = "collectives"
Rank = Callable[[int, int, str, float], dict[str, Any]]
"""(rank, ranks, file to meet in, seconds) -> its answer."""


def probe_collectives(ranks: int = 2, budget_s: float = 20.0, rank_main: Rank | None = None) -> Verdict:
    """Sum and gather between ``ranks`` processes, over gloo and the loopback; all are gone when this returns.

    Call it in a process that has torch loaded and has used it for nothing: they are forked from it. From one that has
    threads they cannot be, and are fresh interpreters, which load torch for seconds.
    """
    context: Any = get_context("fork" if len(os.listdir("/proc/self/task")) == 1 else "spawn")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, str(Path(folder) / "meeting"), budget_s)
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        started = [
            context.Process(target=_answer, args=(rank_main or _sum_and_gather, rank, *arguments, sender), daemon=True)
            for rank, (_, sender) in enumerate(pipes)
        ]
        try:
            for process, (_, sender) in zip(started, pipes, strict=True):
                process.start()
                sender.close()
            answers = _collect([receiver for receiver, _ in pipes], time.monotonic() + budget_s)
        finally:
            for process in started:
                if process.pid is not None:
                    process.kill()
                    process.join()
    return judge(answers, budget_s)


def judge(answers: list[dict[str, Any]], budget_s: float) -> Verdict:
    """Pure. An answer has ``sum_s`` and ``bytes``, or ``failed``, or, from a rank that gave none in time, nothing."""
    for rank, answer in enumerate(answers):
        if "failed" in answer:
            reason = f"rank {rank} of {len(answers)}: {answer['failed']}"
            return Verdict(
                _CHECK, "bad", reason, {"ranks": float(len(answers))}, "see what else fails here; check torch"
            )
    silent = [str(rank) for rank, answer in enumerate(answers) if not answer]
    if silent:
        reason = f"no answer from rank {', '.join(silent)} of {len(answers)} in {budget_s:g} s"
        return Verdict(_CHECK, "bad", reason, {"ranks": float(len(answers))}, "see what else runs here (top)")
    slowest_s = max(float(answer["sum_s"]) for answer in answers)
    numbers = {"ranks": float(len(answers)), "sum_s": slowest_s, "bytes": float(answers[0]["bytes"])}
    fact = f"exact between {len(answers)} ranks; {numbers['bytes'] / (1 << 20):g} MiB were summed in {1e3 * slowest_s:.1f} ms"
    return Verdict(_CHECK, "ok", fact, numbers)


def _collect(receivers: list[Connection], until_s: float) -> list[dict[str, Any]]:
    """What every rank says until then; nothing of one that says nothing."""
    answers: list[dict[str, Any]] = [{} for _ in receivers]
    waiting: list[Any] = list(receivers)
    while waiting and (ready := wait(waiting, max(0.0, until_s - time.monotonic()))):
        for receiver in ready:
            waiting.remove(receiver)
            assert isinstance(receiver, Connection)
            try:
                answers[receivers.index(receiver)] = json.loads(receiver.recv_bytes())
            except EOFError:
                answers[receivers.index(receiver)] = {"failed": "ended without a word"}
    return answers


def _answer(main: Rank, rank: int, ranks: int, meeting: str, budget_s: float, sender: Connection) -> None:
    try:
        answer = main(rank, ranks, meeting, budget_s)
    except (RuntimeError, OSError, ImportError) as error:  # whatever it is, it is this rank's answer
        answer = {"failed": f"{type(error).__name__}: {error}"}
    sender.send_bytes(json.dumps(answer).encode())


def _sum_and_gather(rank: int, ranks: int, meeting: str, budget_s: float) -> dict[str, Any]:
    """Be one rank: all of them sum, and gather, what tells who sent it."""
    import torch
    import torch.distributed as dist

    from evermesh.parallelism.collectives import Communicator

    torch.set_num_threads(1)
    timeout = timedelta(seconds=budget_s)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=timeout)
    world = Communicator(dist.group.WORLD)
    own = torch.arange(_ELEMENTS, dtype=torch.float32).remainder(251) + rank  # whole numbers: sums are exact
    total, gathered = own.clone(), torch.empty(ranks, _ELEMENTS)
    world.barrier("health")
    began_s = time.perf_counter()
    world.all_reduce(total, "health")
    sum_s = time.perf_counter() - began_s
    world.all_gather(gathered.view(-1), own, "health")
    failed = _compare(own - rank, ranks, total, list(gathered))
    world.barrier("health")
    dist.destroy_process_group()
    return {"failed": failed} if failed else {"sum_s": sum_s, "bytes": own.nbytes}


def _compare(base: Any, world_size: int, total: Any, gathered: list[Any]) -> str:
    """What is wrong, in words; empty if nothing is."""
    expected = world_size * base + world_size * (world_size - 1) // 2
    if not total.equal(expected):
        return f"all-reduce: {int((total != expected).sum())} of {total.numel()} sums are wrong"
    for sender, received in enumerate(gathered):
        if not received.equal(base + sender):
            return f"all-gather: what came from rank {sender} is wrong"
    return ""
