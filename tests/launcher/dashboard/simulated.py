"""A job of any size in the middle of its training, as its controller would tell of it: no rank of it runs."""

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evermesh.fault.events import Finding
from evermesh.launcher.controller.journal import Entry
from evermesh.launcher.controller.status import DelayStatus, JobStatus, NodeStatus, RankStatus, SnapshotStatus
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.planner import plan_batch
from evermesh.parallelism.simulator import simulate
from tests.launcher.dashboard.recording import Recorded

STEPS, STEP_S = 2000, 1.2
FAILED_AT = 1200
SLOW_RANK, SLOW_RATIO = 5, 1.7
_COST = CostModel(token_s=1e-5, pair_s=1e-8, micro_batch_s=1e-3)


def simulated(folder: Path, *, nodes: int, per_node: int, tp: int) -> Recorded:
    """One rank is slow, one link is, a rank has died once; with more than 64 ranks one node is cut off and one is aside."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, world = random.Random(7), nodes * per_node
    began_s = time.time() - STEPS * STEP_S - 40
    (folder / "journal.jsonl").write_text("".join(f"{entry.model_dump_json()}\n" for entry in _journal(began_s)))
    (folder / "logs").mkdir(exist_ok=True)
    for rank in (0, SLOW_RANK):
        lines = (f"[rank {rank}] step {step:,}: loader waited {draw.uniform(0, 3):.2f} ms" for step in range(STEPS))
        (folder / "logs" / f"rank-{rank}.log").write_text("\n".join(lines) + "\n")
    hdp = world // tp
    lengths = [int(min(8 * 4096, 64 + draw.expovariate(1 / 900))) for _ in range(6 * hdp)]
    plan = plan_batch(lengths, Layout(hdp=hdp, capacity=4096), _COST)
    return Recorded(
        status(folder, nodes, per_node, draw, began_s),
        list(_steps(world, draw)),
        list(_events(began_s)),
        plan,
        simulate(plan, _COST) if world <= 64 else None,
        plan_step=STEPS,
    )


def moved(told: Recorded, draw: random.Random) -> None:
    """One more step has been trained: all numbers of ranks change."""
    step = (told.status.step or 0) + 1
    ranks = tuple(
        rank.model_copy(update={"step": step, "step_s": STEP_S, "compute_s": _compute_s(rank.rank, draw)})
        if rank.state == "training"
        else rank
        for rank in told.status.ranks
    )
    told.status = told.status.model_copy(update={"step": step, "ranks": ranks})
    told.steps.append({**told.steps[-1], "step": step})


def status(folder: Path, nodes: int, per_node: int, draw: random.Random, began_s: float) -> JobStatus:
    """What the controller would tell."""
    world = nodes * per_node
    is_large = world > 64
    ranks = tuple(_rank(rank, per_node, draw, has_failed=is_large and rank // per_node == 3) for rank in range(world))
    link = (0, per_node)
    findings = (
        Finding(
            kind="slow rank", rank=SLOW_RANK, node=f"node-{SLOW_RANK // per_node}", step=STEPS - 30, confidence=0.97,
            text=f"rank {SLOW_RANK} computes {SLOW_RATIO} times as long as others that do the same",
        ),
        Finding(
            kind="slow link", link=link, confidence=0.85, evidence={"ratio": 2.31, "from": link[0], "to": link[1]},
            text=f"messages from rank {link[0]} to rank {link[1]} take 2.31 times as long as others of their size",
        ),
    )  # fmt: skip
    return JobStatus(
        name="pretrain", directory=str(folder), state="training", reason="all ranks train", generation=2, restarts=1,
        max_restarts=10, workers=world, nodes=_nodes(nodes, per_node, is_large=is_large), ranks=ranks, step=STEPS,
        steps=10 * STEPS, loss=2.4371, tokens_per_s=world * 3400.0, time_left_s=9 * STEPS * STEP_S, findings=findings,
        snapshot=SnapshotStatus(
            is_on=True, step=STEPS - 2, age_steps=2, age_s=2.4, every=4, committed=199, skipped=1, source="memory",
            lost_steps=2, lost_s=2.4, lost_steps_of_node=2, protection="protected",
        ),
        delays=_delays(nodes, draw), started_s=began_s, pid=2999,
    )  # fmt: skip


def _delays(nodes: int, draw: random.Random) -> tuple[DelayStatus, ...]:
    """Of messages to the next node and to the one before, the longest first."""
    ways = [(number, (number + step) % nodes) for number in range(nodes) for step in (1, -1)]
    found = [
        DelayStatus(source=f"node-{a}", target=f"node-{b}", ratio=round(draw.gauss(1, 0.05), 2), messages=64)
        for a, b in dict.fromkeys(ways)
    ]
    return tuple(sorted(found, key=lambda of: -of.ratio)[:1024])


def _nodes(count: int, per_node: int, *, is_large: bool) -> tuple[NodeStatus, ...]:
    return tuple(
        NodeStatus(
            node=f"node-{number}", host=f"trainer-{number:04}", address="127.0.0.1", pid=3000 + number,
            state="cut off" if is_large and number == 3 else "ready", known_as=f"trainer-{number:04}/node-{number}",
            aside=f"node-{number} (trainer-{number:04}) is drained by ops: fan" if is_large and number == 9 else None,
            lease_left_s=4.2, ranks=tuple(range(per_node * number, per_node * (number + 1))),
            memory_free_bytes=900 << 30, shared_memory_bytes=512 << 30, snapshot_bytes=37 << 30,
        )
        for number in range(count)
    )  # fmt: skip


def _rank(rank: int, per_node: int, draw: random.Random, *, has_failed: bool) -> RankStatus:
    return RankStatus(
        rank=rank, node=f"node-{rank // per_node}", pid=4000 + rank, state="failed" if has_failed else "training",
        step=STEPS, step_s=STEP_S, compute_s=_compute_s(rank, draw),
    )  # fmt: skip


def _compute_s(rank: int, draw: random.Random) -> float:
    return min(STEP_S, 0.6 * STEP_S * draw.gauss(1, 0.06) * (SLOW_RATIO if rank == SLOW_RANK else 1))


def _steps(world: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    for step in [*range(1, FAILED_AT + 1), *range(FAILED_AT - 3, STEPS + 1)]:
        loss = 2.2 + 8.5 / (1 + step / 60) + draw.gauss(0, 0.02)
        seconds = STEP_S * abs(draw.gauss(1, 0.04))
        yield {"step": step, "loss": loss, "num_tokens": world * 4096, "step_s": seconds, "workers": world}


def _events(began_s: float) -> Sequence[dict[str, Any]]:
    saved = [
        {
            "kind": "checkpoint", "step": step, "time_s": began_s + 20 + step * STEP_S,
            "text": f"step-{step:08} in 11.20 s, for 0.040 s of which training stood still",
            "fields": {"stop_s": 0.04, "write_s": 11.2, "bytes_written": 1_400_000_000_000},
        }
        for step in range(200, STEPS + 1, 200)
    ]  # fmt: skip
    failed_s = began_s + 20 + FAILED_AT * STEP_S
    told = [
        (failed_s, "failed", FAILED_AT, "rank 3 was killed by SIGKILL"),
        (failed_s + 4, "restarted", FAILED_AT - 4, "from memory, 4 steps lost"),
        (began_s + 20 + (STEPS - 30) * STEP_S, "finding", STEPS - 30, f"rank {SLOW_RANK} computes longer"),
    ]  # fmt: skip
    said = [{"time_s": at, "kind": kind, "step": step, "text": text, "fields": {}} for at, kind, step, text in told]
    found = sorted([*saved, *said], key=lambda event: float(str(event["time_s"])))
    return [event | {"seq": seq} for seq, event in enumerate(found, 1)]


def _journal(began_s: float) -> Iterator[Entry]:
    first = Entry(seq=1, time_s=began_s, generation=0, kind="launch", reason="")
    yield first
    failed_s = began_s + 20 + FAILED_AT * STEP_S
    moves = [
        (began_s + 5, 0, "placing", "starting", "all nodes are there"),
        (began_s + 20, 1, "starting", "training", "all ranks train"),
        (failed_s, 1, "training", "recovering", "rank 3 was killed by SIGKILL"),
        (failed_s + 0.4, 1, "recovering", "starting", "attempt 2 on the same nodes"),
        (failed_s + 4.3, 2, "starting", "training", "all ranks train"),
    ]
    for seq, (time_s, generation, before, after, reason) in enumerate(moves, 2):
        yield first.model_copy(
            update={
                "seq": seq, "time_s": time_s, "generation": generation, "kind": "transition", "reason": reason,
                "fields": {"from": before, "to": after},
            }
        )  # fmt: skip
