"""Each axis of our runtime against plain torch: FSDP2, DTensor's tensor parallelism, and torch's pipeline schedules.

Both train the same decoder, from the same weights, on the same documents of one length, so that there is nothing to plan,
and both must report the same loss. A step is everything: forward, backward, sums of gradients, AdamW. The peers are
written as torchtitan writes them, with torch alone (``peers.py``). Bytes are what ranks send, counted alike. The state of a
rank is what it holds of parameters, gradients and optimizer states between steps, and at most, against the formula.
"""

import gc
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from evermesh.parallelism import ByteLedger, CostModel, Layout, plan_batch
from evermesh.parallelism.layout.states import state_memory
from evermesh.runtime import process_group
from evermesh.runtime.config import TrainConfig
from evermesh.runtime.micro_batch import LocalBatch, LocalMicroBatch
from evermesh.runtime.model.building import build_model, build_runner
from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.optimizer import ShardedAdamW
from evermesh.runtime.optimizer_config import AdamWConfig
from evermesh.runtime.traffic import trained_model
from tests.benchmarks.harness import Row, exact_row, paired_row
from tests.benchmarks.runtime.peers import Peer, SentBytes, build_peer
from tests.cluster import run_ranks
from tests.runtime.watched import WatchedSets, state_bytes

ROUNDS, RANKS = 6, (4, 8)
TOKENS, VOCABULARY = 256, 512
MODEL = ModelConfig(hidden=128, layers=8, heads=8, kv_heads=8, ffn=352)
OPTIMIZER = AdamWConfig(lr=1e-3, clip_norm=None)
Axis = tuple[str, dict[str, Any], Peer]
ZERO_3 = {"parameters": "all", "gradients": "all"}
AXES: tuple[Axis, ...] = (
    ("states divided (ZeRO-1)", {"hdp": "all"}, "DDP"),
    ("all divided, for a step", {"hdp": "all", "sharding": ZERO_3}, "FSDP2, resharded per step"),
    ("all divided, for a micro-batch", {"hdp": "all", "sharding": ZERO_3 | {"keep_for": "micro_batch"}}, "FSDP2"),
    ("tensor parallel", {"tp": "all"}, "DTensor"),
    ("pipeline", {"pp": "all"}, "Schedule1F1B"),
)


class Measured(NamedTuple):
    """One way on one rank."""

    seconds: list[float]
    sent_bytes: int
    """In a step."""
    state_bytes: int
    """Between steps."""
    peak_bytes: int
    """With what a step adds; of peers it is not measured."""
    loss: float


def run() -> list[Row]:
    """Seconds of a step, bytes sent and bytes held, at 4 and 8 ranks."""
    return [row for ranks in RANKS for axis in AXES for row in _compare(axis, ranks)]


def _compare(axis: Axis, ranks: int) -> list[Row]:
    name, degrees, peer = axis
    layout = Layout.model_validate({key: ranks if value == "all" else value for key, value in degrees.items()})
    layout = layout.model_copy(update={"capacity": TOKENS})
    results = run_ranks(ranks, _measure, layout, peer, timeout_s=400)
    ours, theirs = ([of_rank[way] for of_rank in results] for way in (0, 1))
    formula = [of_rank[2] for of_rank in results]
    our_s, their_s = ([max(way.seconds[i] for way in ways) for i in range(ROUNDS)] for ways in (ours, theirs))
    losses = sum(way.loss for way in ours), sum(way.loss for way in theirs)
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[0], losses
    name = f"{name}, {ranks} ranks"
    sent, their_sent = (sum(way.sent_bytes for way in ways) for ways in (ours, theirs))
    held, their_held = (max(way.state_bytes for way in ways) for ways in (ours, theirs))
    peak = max(way.peak_bytes for way in ours)
    return [
        paired_row(f"seconds of a step: {name}", our_s, "s", peer=peer, peer_values=their_s),
        exact_row(f"bytes of a step: {name}", sent, "bytes", peer=peer, peer_value=their_sent),
        exact_row(f"state of a rank: {name}", held, "bytes", peer=peer, peer_value=their_held),
        exact_row(f"most of it in a step: {name}", peak, "bytes", peer="formula", peer_value=max(formula)),
    ]


def _documents(layout: Layout) -> torch.Tensor:
    """[documents, tokens + 1]: two micro-batches for every data-parallel rank, or twice as many as a pipeline has stages."""
    number = max(2 * layout.hdp, 2 * layout.pp)
    return torch.randint(VOCABULARY, (number, TOKENS + 1), generator=torch.Generator().manual_seed(1))


def _measure(rank: int, ranks: int, layout: Layout, peer: Peer) -> tuple[Measured, Measured, int]:
    torch.set_num_threads(1)
    our_step, held, formula, ledger = _ours(layout)
    their_step, their_held = build_peer(peer, MODEL, VOCABULARY, OPTIMIZER, _documents(layout))
    ways: dict[str, Callable[[], float]] = {"ours": our_step, "theirs": their_step}
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    sent, losses = SentBytes(), dict[str, float]()
    for number in range(ROUNDS + 1):
        for way in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
            gc.collect()
            torch.distributed.barrier()
            started = time.monotonic()
            if number == ROUNDS and way == "theirs":  # counting would cost time
                with sent:
                    their_step()
            else:
                losses.setdefault(way, ways[way]())
            torch.distributed.barrier()
            seconds[way].append(time.monotonic() - started)
            if way == "ours":
                our_bytes = sum(part.wire_bytes for part in ledger.take_step(1))
    return (
        Measured([*seconds["ours"][1:-1], seconds["ours"][-1]], our_bytes, *held(), losses["ours"]),
        Measured([*seconds["theirs"][1:-1], seconds["theirs"][-2]], sent.wire_bytes, their_held(), 0, losses["theirs"]),
        formula,
    )


def _ours(layout: Layout) -> tuple[Callable[[], float], Callable[[], tuple[int, int]], int, ByteLedger]:
    """A step that returns this rank's part of the loss, what this rank holds, the formula for that, and the ledger."""
    data = {"sources": [{"kind": "corpus", "path": "nowhere"}]}
    config = TrainConfig.model_validate({"model": MODEL, "layout": layout, "data": data, "optimizer": OPTIMIZER})
    groups = process_group.communicators(300.0, layout)
    built = build_model(config, VOCABULARY, groups, torch.device("cpu"))
    optimizer = ShardedAdamW(built.sets, OPTIMIZER)
    runner, ledger = build_runner(built, layout, groups), ByteLedger()
    documents = _documents(layout)
    plan = plan_batch([TOKENS] * len(documents), layout, CostModel(token_s=1e-5, pair_s=1e-8, micro_batch_s=1e-4))
    positions, counts = torch.arange(TOKENS), torch.ones(TOKENS)
    own = plan.ranks[groups.place.hdp]
    own_documents = [documents[micro_batch.pieces[0].sequence] for micro_batch in own]
    micro_batches = tuple(
        LocalMicroBatch(micro_batch, document[:-1], document[1:], positions, counts)
        for micro_batch, document in zip(own, own_documents, strict=True)
    )
    local = LocalBatch(micro_batches, plan.lengths, num_counted=documents.shape[0] * TOKENS)
    watched = WatchedSets(built.sets)

    def step() -> float:
        groups.moment.begin_step(1)
        with groups.listen(ledger):
            built.begin_step()
            loss, _ = runner.accumulate(local)
            built.sum_gradients()
            optimizer.step(OPTIMIZER.lr, 1.0)
            built.end_step()
        return loss.item()

    def held() -> tuple[int, int]:
        of_states = state_bytes(optimizer)
        return watched.held() + of_states, watched.most_together + of_states

    sizes = trained_model(config, VOCABULARY, built.stages, built.held).stages[groups.place.pp].sets
    return step, held, state_memory(sizes, layout, 4).peak, ledger
