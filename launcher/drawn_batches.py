"""Batches of a job whose data is not here, drawn from a sample of the lengths of its documents."""

import random
from collections.abc import Sequence

_SEED = 0


def drawn_batches(
    lengths: Sequence[int], context: int | None, batch_tokens: int, batches: int = 1
) -> list[tuple[int, ...]]:
    """So many batches, the same every time; sequences are added until the next one would be too many.

    Documents longer than ``context`` tokens are split; None: none are.
    """
    draw, drawn, parts = random.Random(_SEED), list[tuple[int, ...]](), _split(lengths, context)
    while len(drawn) < batches:
        batch, tokens = list[int](), 0
        while not batch or tokens + (following := draw.choice(parts)) <= batch_tokens:
            following = draw.choice(parts) if not batch else following
            batch.append(following)
            tokens += following
        drawn.append(tuple(batch))
    return drawn


def _split(lengths: Sequence[int], context: int | None) -> list[int]:
    if context is None:
        return list(lengths)
    parts = [[context] * (length // context) + [length % context] for length in lengths]
    return [part for of_one in parts for part in of_one if part]
