"""Planned time of runs in which very long sequences wait for each other, next to the same runs in which none waits.

Both train the same sequences, drawn in the same order: the last batch of the delayed run holds all that waits, that of the
other one what is left of what the delayed run has drawn. The model and its costs are those of the benchmark of ranks that
keep step, on 64 ranks in nodes of 8, some 1M tokens a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from evermesh.parallelism import Layout, Pool, plan_batch
from evermesh.runtime.data import Batch, Corpus, CorpusSource, DataConfig, OutlierDelay, Sampler
from tests.benchmarks.harness import Row, exact_row
from tests.benchmarks.parallelism.bench_lock_step import COST
from tests.benchmarks.parallelism.lengths import available_corpora, large_batch

RANKS, BATCH_TOKENS, CONTEXT, STEPS = 64, 1 << 20, 256 * 1024, 24
LAYOUTS: dict[str, dict[str, Any]] = {
    "whole models": {"capacity": 8192},
    "pp 4": {"capacity": 8192, "pp": 4},
    "ep 8": {"capacity": 8192, "ep": 8},
}
DELAY = OutlierDelay(thresholds=(CONTEXT // 4, CONTEXT // 2), together=3, most_steps=8)


@dataclass(frozen=True)
class _OfLengths:
    """What the sampler asks of a corpus, for lengths without tokens."""

    lengths: np.ndarray
    name: str = "lengths"
    digest: str = ""

    @cached_property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.lengths)


def run() -> list[Row]:
    """For every corpus at hand: how late tokens are, and for every layout, what a million of them takes."""
    return [row for corpus in available_corpora() for row in _of_corpus(corpus)]


def _of_corpus(name: str) -> list[Row]:
    lengths = np.array(large_batch(name, 0, (STEPS + 1) * BATCH_TOKENS, CONTEXT))
    delayed = _batches(lengths, DELAY)
    at_once = _prefix(_batches(lengths, None), sum(len(batch.lengths) for batch in delayed))
    assert sorted(sum(at_once, ())) == sorted(length for batch in delayed for length in batch.lengths)
    tokens = sum(batch.num_tokens for batch in delayed)
    late = sum(batch.mean_steps_late * batch.num_tokens for batch in delayed) / tokens
    most = max(batch.most_steps_late for batch in delayed)
    rows = [
        exact_row(f"mean delay of a token, {name}", late, "steps"),
        exact_row(f"longest delay, {name}", most, "steps", goal=DELAY.most_steps),
    ]
    for layout, values in LAYOUTS.items():
        ours, bound = _seconds([batch.lengths for batch in delayed], values)
        peer, peer_bound = _seconds(at_once, values)
        what = f"{layout}, {name}"
        rows.append(exact_row(f"planned time, {what}", ours, "s", peer="nothing waits", peer_value=peer))
        rows.append(exact_row(f"bounds, {what}", bound, "s", peer="nothing waits", peer_value=peer_bound))
    return rows


def _batches(lengths: np.ndarray, delay: OutlierDelay | None) -> list[Batch]:
    data = DataConfig(
        sources=(CorpusSource(path=Path("unused")),), context=CONTEXT, batch_tokens=BATCH_TOKENS, outlier_delay=delay
    )
    sampler = Sampler([cast(Corpus, _OfLengths(lengths))], data, seed=0)
    return [sampler.next_batch(ends=step == STEPS) for step in range(1, STEPS + 2)][: STEPS + (delay is None)]


def _prefix(batches: Sequence[Batch], count: int) -> list[tuple[int, ...]]:
    """The lengths of the first ``count`` sequences, batch by batch."""
    found = list[tuple[int, ...]]()
    for batch in batches:
        found.append(batch.lengths[: count - sum(map(len, found))])
    return [lengths for lengths in found if lengths]


def _seconds(batches: Sequence[tuple[int, ...]], values: dict[str, Any]) -> tuple[float, float]:
    """Planned seconds of all steps together, and their lower bounds."""
    layout, pool = Layout(hdp=RANKS, **values), Pool.of(RANKS, 8)
    certificates = [plan_batch(lengths, layout, COST, pool=pool).certificate for lengths in batches]
    return sum(found.makespan_s for found in certificates), sum(found.lower_bound_s for found in certificates)
