"""Collectives among processes of this node, with sums that are known: ``python -m ... RANK WORLD FILE`` is one of them."""

import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from evermesh.fault.health.verdicts import Verdict

_ELEMENTS = 1 << 18
_CHECK = "collectives"


def probe_collectives(ranks: int = 2, budget_s: float = 20.0, module: str = __name__) -> Verdict:
    """Sum and gather between ``ranks`` fresh processes, over gloo and the loopback; all are gone when this returns."""
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        started = [
            subprocess.Popen(
                [sys.executable, "-m", module, str(rank), str(ranks), meeting, str(budget_s)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            answers = [_answer(process, began_s + budget_s) for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
    return judge(answers, budget_s)


def judge(answers: list[dict[str, Any]], budget_s: float) -> Verdict:
    """Pure. An answer has ``sum_s`` and ``bytes``, or ``failed``, or, from a rank that gave none in time, nothing."""
    for rank, answer in enumerate(answers):
        if "failed" in answer:
            reason = f"rank {rank} of {len(answers)}: {answer['failed']}"
            return Verdict(_CHECK, "bad", reason, {"ranks": float(len(answers))}, "see what else fails here; check torch")
    silent = [str(rank) for rank, answer in enumerate(answers) if not answer]
    if silent:
        reason = f"no answer from rank {', '.join(silent)} of {len(answers)} in {budget_s:g} s"
        return Verdict(_CHECK, "bad", reason, {"ranks": float(len(answers))}, "see what else runs here (top)")
    slowest_s = max(float(answer["sum_s"]) for answer in answers)
    numbers = {"ranks": float(len(answers)), "sum_s": slowest_s, "bytes": float(answers[0]["bytes"])}
    fact = f"exact between {len(answers)} ranks; {numbers['bytes'] / (1 << 20):g} MiB were summed in {1e3 * slowest_s:.1f} ms"
    return Verdict(_CHECK, "ok", fact, numbers)


def _answer(process: "subprocess.Popen[str]", until_s: float) -> dict[str, Any]:
    try:
        output, error = process.communicate(timeout=max(0.1, until_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        return {}
    with suppress(ValueError, IndexError):
        found: dict[str, Any] = json.loads(output.splitlines()[-1])
        return found
    lines = error.strip().splitlines()
    return {"failed": f"ended with {process.returncode}: {lines[-1] if lines else 'without a word'}"}


def main() -> None:
    """Be one rank: all of them sum, and gather, what tells who sent it; print what came of it."""
    rank, world_size, meeting, budget_s = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = timedelta(seconds=budget_s)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size, timeout=timeout
    )
    own = torch.arange(_ELEMENTS, dtype=torch.float32).remainder(251) + rank  # whole numbers: sums are exact
    dist.barrier()
    began_s = time.perf_counter()
    total = own.clone()
    dist.all_reduce(total)
    sum_s = time.perf_counter() - began_s
    gathered = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(gathered, own)
    failed = _compare(own - rank, world_size, total, gathered)
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps({"failed": failed} if failed else {"sum_s": sum_s, "bytes": own.nbytes}))


def _compare(base: Any, world_size: int, total: Any, gathered: list[Any]) -> str:
    """What is wrong, in words; empty if nothing is."""
    expected = world_size * base + world_size * (world_size - 1) // 2
    if not total.equal(expected):
        return f"all-reduce: {int((total != expected).sum())} of {total.numel()} sums are wrong"
    for sender, received in enumerate(gathered):
        if not received.equal(base + sender):
            return f"all-gather: what came from rank {sender} is wrong"
    return ""


if __name__ == "__main__":
    main()
