"""Blocks compiled for buckets of tokens against the same blocks as they are written.

One process, the corpus, the plans and the micro-batches of real steps; in every round both ways run one whole forward and
backward pass of the same batch, one on its true tokens, one padded to buckets, so that the load of the machine hits both
alike. Losses must agree. Compiling itself is told apart: it happens once.
"""

import time
from pathlib import Path

import torch

from evermesh.launcher.job_file import load_job
from evermesh.parallelism import Communicator, Layout
from evermesh.parallelism.collectives import Moment
from evermesh.parallelism.planner import plan_batch
from evermesh.runtime.compiling import Compiled, padding_of
from evermesh.runtime.config import CompileConfig
from evermesh.runtime.cost import nominal_cost
from evermesh.runtime.data import Sampler, open_sources
from evermesh.runtime.feed import load_micro_batch
from evermesh.runtime.micro_batch import LocalBatch, MicroBatchRunner
from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.model.decoder import Decoder
from tests.benchmarks.harness import Row, exact_row, paired_row

ROUNDS = 5
CAPACITY = 2048
BUCKETS = CompileConfig().of_capacity(CAPACITY)[2::2]
"""Every other one of the default: few enough to compile in a minute or two."""
MODELS = {
    "96 wide": ModelConfig(hidden=96, layers=4, heads=3, kv_heads=1, ffn=256),
    "384 wide": ModelConfig(hidden=384, layers=2, heads=6, kv_heads=2, ffn=1024),
}
CONFIG = load_job(Path("deploy/jobs/quickstart.yaml")).train


def run() -> list[Row]:
    """Tokens per second of both ways on one core, what was compiled for it, and what padding adds."""
    torch.set_num_threads(1)
    return [row for name, model in MODELS.items() for row in _compare(name, model)]


def _compare(name: str, model: ModelConfig) -> list[Row]:
    corpora = open_sources(CONFIG.data)
    data = CONFIG.data.model_copy(update={"context": CAPACITY, "batch_tokens": 2 * CAPACITY})
    sampler = Sampler(corpora, data, seed=1)
    layout, buckets = Layout(capacity=CAPACITY), BUCKETS
    cost = nominal_cost(CONFIG, model.shape(corpora[0].vocabulary))
    plain, padded = (_runner(model, corpora[0].vocabulary, of) for of in ((), buckets))
    compiled = Compiled()
    compiled.apply(padded.model, buckets, Moment())
    speeds: tuple[list[float], list[float]] = ([], [])
    tokens = padding = 0
    for _ in range(ROUNDS):
        batch = sampler.next_batch()
        plan = plan_batch(batch.lengths, layout, cost)
        micro_batches = tuple(load_micro_batch(micro_batch, batch, corpora) for micro_batch in plan.ranks[0])
        local = LocalBatch(micro_batches, plan.lengths, plan.num_tokens)
        padded.accumulate(local)  # what it has to compile
        losses = []
        for runner, of_way in zip((padded, plain), speeds, strict=True):
            began_s = time.perf_counter()
            loss, _ = runner.accumulate(local)
            of_way.append(plan.num_tokens / (time.perf_counter() - began_s))
            losses.append(loss.item())
        assert abs(losses[0] - losses[1]) <= 1e-5 * losses[1], losses
        tokens, padding = tokens + plan.num_tokens, padding + padding_of(plan, 1, buckets)
    return [
        paired_row(f"tokens per second, {name}", speeds[0], "tokens/s", peer="as written", peer_values=speeds[1]),
        exact_row(f"graphs compiled, {name}", compiled.graphs, "graphs", goal=3 * len(buckets)),
        exact_row(f"time of compiling forward passes, {name}", compiled.seconds, "s"),
        exact_row(f"padding, {name}", 100 * padding / tokens, "% of tokens"),
    ]


def _runner(model: ModelConfig, vocabulary: int, buckets: tuple[int, ...]) -> MicroBatchRunner:
    decoder = Decoder(model, vocabulary)
    decoder.initialize(0)
    return MicroBatchRunner(decoder, Communicator(), buckets=buckets)
