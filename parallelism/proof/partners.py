"""With how many ranks a rank passes keys and values around in a plan."""

import numpy as np

from evermesh.parallelism.proof.columns import Columns
from evermesh.parallelism.rank_work import Integers


def partners(columns: Columns) -> Integers:
    """Of every rank: distinct ranks before or after it in some ring, [R].

    Ranks that divide heads pass to those with the same heads in the next group, so the one ``heads`` places on. What they
    exchange by heads stays inside a node and does not count.
    """
    ranks = len(columns.rank_start) - 1
    size = columns.ring_size[columns.sequence_of_member]
    heads = columns.heads[columns.sequence_of_member]
    passes = size > heads
    following = columns.ring_start[columns.sequence_of_member] + (columns.place_in_ring + heads) % size
    one, other = columns.ring[passes], columns.ring[following[passes]]
    pairs = np.unique(np.concatenate([one * ranks + other, other * ranks + one]))
    return np.bincount(pairs // ranks, minlength=ranks)
