"""Plans for 1,536 ranks and 64M tokens mended after losses: time, makespan over the bound of the ranks that are left, moves.

Lengths follow ByteScale's figure 4 (Byted up to 2 Mi tokens) and its shares for GitHub; costs are those of LLaMA 7B at
nominal rates. What is lost, or which rank is slow, is drawn anew for every batch. A new plan is the peer.
"""

import random
import statistics
import time

from evermesh.parallelism import CostModel, Layout, ModelShape, Pool, plan_batch
from evermesh.parallelism.planner import Replanned, replan_batch
from tests.benchmarks.harness import Row, exact_row
from tests.benchmarks.parallelism.lengths import byted, github

RANKS, TOKENS, CONTEXT, BATCHES = 1536, 64 << 20, 2 << 20, 20
SHAPE = ModelShape(hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=11_008, vocabulary=32_000)


def run() -> list[Row]:
    """For 1, 2, 4 and 8 lost ranks and one that runs at 0.7."""
    cost = CostModel.from_model(
        SHAPE, flops_per_s=150e12, attention_flops_per_s=120e12, bytes_per_s=150e9, network_bytes_per_s=25e9
    ).model_copy(update={"micro_batch_s": 0.02})
    rows = []
    _after(byted(0, TOKENS, CONTEXT), 0, cost, 1)  # compiles
    for name, draw in (("like Byted", byted), ("like GitHub", github)):
        batches = [draw(seed, TOKENS, CONTEXT) for seed in range(BATCHES)]
        for number in (1, 2, 4, 8):
            rows += _rows(
                f"{name}, {number} lost", [_after(batch, seed, cost, number) for seed, batch in enumerate(batches)]
            )
        rows += _rows(f"{name}, one at 0.7", [_after(batch, seed, cost, 0) for seed, batch in enumerate(batches)])
    return rows


def _after(lengths: list[int], seed: int, cost: CostModel, lost: int) -> tuple[Replanned, float, float]:
    """What is found when so many ranks are lost (0: one is slow), the seconds it took, and those of a new plan."""
    layout, pool = Layout(hdp=RANKS, capacity=8192), Pool.of(RANKS, 8)
    drawn = random.Random(seed).sample(range(RANKS), max(lost, 1))
    speeds = () if lost else [0.7 if rank == drawn[0] else 1.0 for rank in range(RANKS)]
    plan = plan_batch(lengths, layout, cost, pool=pool)
    started = time.thread_time()
    found = replan_batch(plan, layout, cost, pool=pool, lost=drawn if lost else (), speeds=speeds)
    mended = time.thread_time()
    plan_batch(lengths, found.layout, cost, pool=found.pool)
    return found, mended - started, time.thread_time() - mended


def _rows(name: str, found: list[tuple[Replanned, float, float]]) -> list[Row]:
    ratios = [replanned.plan.certificate.ratio for replanned, _, _ in found]
    shares = [100 * replanned.share_moved for replanned, _, _ in found]
    tokens = [100 * replanned.moved_tokens / replanned.plan.num_tokens for replanned, _, _ in found]
    seconds, anew_s = [row[1] for row in found], [row[2] for row in found]
    kept = [share for share, (replanned, _, _) in zip(tokens, found, strict=True) if replanned.anew is None]
    return [
        exact_row(f"makespan/bound, worst, {name}", max(ratios), "", goal=1.02),
        exact_row(f"sequences moved, mean, {name}", statistics.mean(shares), "%"),
        exact_row(f"sequences moved, most, {name}", max(shares), "%"),
        exact_row(f"tokens moved, mean, {name}", statistics.mean(tokens), "%"),
        exact_row(f"tokens moved where mended, mean, {name}", statistics.mean(kept), "%"),
        exact_row(f"tokens moved where mended, most, {name}", max(kept), "%", goal=5.0),
        exact_row(
            f"planning time, median, {name}",
            statistics.median(seconds),
            "s",
            goal=0.05,
            peer="new plan",
            peer_value=statistics.median(anew_s),
        ),
        exact_row(f"planning time, most, {name}", max(seconds), "s"),
        exact_row(f"planned anew, {name}", len(found) - len(kept), f"of {len(found)}"),
    ]
