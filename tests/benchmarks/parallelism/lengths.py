"""Batches for planners: real lengths where they are at hand, else what is published of their distribution.

EVERMESH_LENGTHS names a folder with ``wikipedia.txt.gz``, one length per line; without it Wikipedia is a log-normal that fits
its quantiles (median 384 tokens, sigma 1.258, a little light in the tail).
"""

import functools
import gzip
import itertools
import os
from pathlib import Path

import numpy as np

_SHARES = (7.6, 7.6, 8.8, 10.2, 11.4, 10.4, 7.6, 7.6, 7.3, 9.7, 12.1)
"""Percent of tokens in sequences of up to 2 Ki tokens, 4 Ki, ... 2 Mi, as read from ByteScale's figure 4, Byted."""
_GITHUB_SHARES = (34.0, 14.2, 10.7, 9.5, 7.6, 7.6, 6.4, 4.5, 2.9, 1.6, 0.8)
"""As ``_SHARES``, for GitHub; its last three are our split of the 5.3 % that the figure does not label."""


def wikipedia(number: int, size: int, context: int) -> tuple[str, list[list[int]]]:
    """Where the lengths come from, and so many batches of ``size`` sequences of at most ``context`` tokens."""
    folder = os.environ.get("EVERMESH_LENGTHS")
    if folder:
        with gzip.open(Path(folder) / "wikipedia.txt.gz", "rt") as file:
            lengths = [length for length in map(int, file) if length <= context][: number * size]
        return "Wikipedia", [lengths[i * size : (i + 1) * size] for i in range(number)]
    random = np.random.default_rng(0)
    drawn = random.lognormal(5.95, 1.258, (number, size)).clip(1, context).astype(int)
    return "log-normal like Wikipedia", [batch.tolist() for batch in drawn]


def byted(seed: int, num_tokens: int, context: int) -> list[int]:
    """A batch of about so many tokens whose lengths follow ByteScale's table, log-uniform inside a bucket."""
    return _drawn(_SHARES, 256, seed, num_tokens, context)


def github(seed: int, num_tokens: int, context: int) -> list[int]:
    """As ``byted``, with ByteScale's shares for GitHub."""
    return _drawn(_GITHUB_SHARES, 128, seed, num_tokens, context)


def _drawn(shares: tuple[float, ...], shortest: int, seed: int, num_tokens: int, context: int) -> list[int]:
    random = np.random.default_rng(seed)
    edges = [shortest, *(2048 << i for i in range(len(shares)))]
    buckets = [(low, high) for low, high in itertools.pairwise(edges) if high <= context]
    means = np.array([(high - low) / np.log(high / low) for low, high in buckets])
    weights = np.array(shares[: len(buckets)]) / means
    lengths: list[int] = []
    total = 0
    while total < num_tokens:
        low, high = buckets[random.choice(len(buckets), p=weights / weights.sum())]
        lengths.append(int(np.exp(random.uniform(np.log(low), np.log(high)))))
        total += lengths[-1]
    return lengths


_GITHUB = (34.0, 14.2, 10.7, 9.5, 7.6, 7.6, 6.4, 4.5, 2.9, 1.6, 0.8)
"""As ``_SHARES``, GitHub; the last three divide what the figure leaves unlabelled."""
CORPORA = ("byted", "github", "wikipedia", "prolong", "wlbllm")
"""What ``large_batch`` draws from; the last three are real samples, in the folder that EVERMESH_LENGTHS names."""


def available_corpora() -> tuple[str, ...]:
    """Those of ``CORPORA`` that can be drawn from here."""
    return CORPORA if os.environ.get("EVERMESH_LENGTHS") else CORPORA[:2]


def large_batch(corpus: str, seed: int, num_tokens: int, context: int) -> list[int]:
    """At least so many tokens of sequences of at most ``context``, drawn at random."""
    random = np.random.default_rng(seed)
    if corpus in ("byted", "github"):
        lows = np.array([256 if corpus == "byted" else 128, *(2048 << i for i in range(10))], float)
        highs, shares = (
            np.array([2048 << i for i in range(11)], float),
            np.array(_SHARES if corpus == "byted" else _GITHUB),
        )
        kept = highs <= context
        lows, highs, shares = lows[kept], highs[kept], shares[kept]
        means = (highs - lows) / np.log(highs / lows)
        weights = shares / means / (shares / means).sum()
        bucket = random.choice(len(weights), 2 * int(num_tokens / (weights @ means)) + 64, p=weights)
        drawn = np.exp(np.log(lows[bucket]) + random.random(len(bucket)) * np.log(highs[bucket] / lows[bucket]))
    else:
        known = sample(corpus)
        known = known[known <= context]
        drawn = random.choice(known, 2 * int(num_tokens / known.mean()) + 64)
    lengths = drawn.astype(np.int64)
    return lengths[: int(np.searchsorted(np.cumsum(lengths), num_tokens)) + 1].tolist()


@functools.cache
def sample(corpus: str) -> np.ndarray:
    """All lengths of a real corpus."""
    with gzip.open(Path(os.environ["EVERMESH_LENGTHS"]) / f"{corpus}.txt.gz", "rt") as file:
        return np.array([int(line) for line in file])
