"""Cutting sequences over rings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evermesh.parallelism.pieces import share_of


@given(length=st.integers(0, 100_000), ring_size=st.integers(1, 64))
def test_shares_cover_every_token_once_and_balance_tokens_and_pairs(length: int, ring_size: int) -> None:
    shares = [share_of(length, ring_size, index) for index in range(ring_size)]
    ranges = sorted(part for share in shares for part in share.ranges())
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])][: len(ranges)]
    assert sum(stop - start for start, stop in ranges) == length
    tokens = [share.num_tokens for share in shares]
    pairs = [share.num_pairs() for share in shares]
    assert max(tokens) - min(tokens) <= 1
    assert max(pairs) - min(pairs) <= length
    assert sum(pairs) == length * (length + 1) // 2


@pytest.mark.parametrize("ring_size", range(1, 13))
def test_pairs_agree_with_counting_them_one_by_one(ring_size: int) -> None:
    for length in range(120):
        for index in range(ring_size):
            share = share_of(length, ring_size, index)
            counted = sum(position + 1 for start, stop in share.ranges() for position in range(start, stop))
            assert share.num_pairs() == counted
            assert all(start < stop for start, stop in share.ranges())
