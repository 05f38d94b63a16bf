"""Which keys a sliding window leaves to which queries, as bands around a diagonal that fused kernels take.

A token at position i attends to positions j with i - window < j <= i: the last ``window`` tokens, itself included
(Beltagy et al., Longformer, arXiv 2004.05150, section 3.1; the convention of Mistral).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

Range = tuple[int, int]
"""Positions [start, stop)."""


class Band(NamedTuple):
    """Keys that the rows of a block of scores see, counted from the diagonal that ends in its last row and last key.

    With Q queries and K keys, query r sees the keys from r + K - Q - before to r + K - Q + after. Both are at least 0.
    """

    before: int
    after: int


class BandBlock(NamedTuple):
    """A block of scores in which every query sees at least one key, and every key is seen."""

    queries: slice
    """Of the local queries."""
    keys: slice
    """Of the keys of the block that visits."""
    band: Band


def packed_band(window: int) -> Band:
    """The band of one document with itself."""
    return Band(window - 1, 0)


def band_blocks(queries: Sequence[Range], keys: Sequence[Range], window: int) -> Iterator[BandBlock]:
    """The blocks of scores that a window leaves between two lists of ranges of one document; nothing for the rest.

    Slices count tokens along the lists, as they lie in memory.
    """
    query_start = 0
    for query_range in queries:
        key_start = 0
        for key_range in keys:
            block = _block(query_range, key_range, window)
            if block is not None:
                (first_query, last_query), (first_key, last_key), band = block
                to_query, to_key = query_start - query_range[0], key_start - key_range[0]
                yield BandBlock(
                    slice(first_query + to_query, last_query + to_query),
                    slice(first_key + to_key, last_key + to_key),
                    band,
                )
            key_start += key_range[1] - key_range[0]
        query_start += query_range[1] - query_range[0]


def _block(queries: Range, keys: Range, window: int) -> tuple[Range, Range, Band] | None:
    """What remains of two ranges when those that see, or are seen by, nothing of the other are left out."""
    first_query, last_query = max(queries[0], keys[0]), min(queries[1], keys[1] + window - 1)
    if first_query >= last_query or keys[0] == keys[1]:
        return None
    first_key, last_key = max(keys[0], first_query - window + 1), min(keys[1], last_query)
    # the last query stands at last_query - 1, the last key at last_key - 1: so far is the diagonal from the band's ends
    band = Band(before=last_key - last_query + window - 1, after=last_query - last_key)
    return (first_query, last_query), (first_key, last_key), band
