"""The order of sequences, and exchanges between ranks, against what sorting and trying everything give."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evermesh.parallelism.planner.filling import Filling, exchange, members
from evermesh.parallelism.planner.rings import scaled
from evermesh.parallelism.planner.sorting import longest_first


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.one_of(st.integers(1, 9), st.integers(1, 2**23)), max_size=60))
def test_longest_come_first_and_equals_keep_their_order(lengths: list[int]) -> None:
    array = np.array(lengths, np.int64)
    assert longest_first(array).tolist() == sorted(range(len(lengths)), key=lambda i: -lengths[i])


@pytest.mark.parametrize("inserted", [[5, 1, 4, 2, 0, 3], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])
def test_members_of_a_slot_are_in_order_however_they_were_put_in(inserted: list[int]) -> None:
    lengths = np.array([9, 9, 7, 5, 5, 1], np.int64)
    filling = Filling(np.array([-1], np.int64), np.full(6, -1, np.int64))
    for sequence in inserted:
        filling.next[sequence], filling.head[0] = filling.head[0], sequence
    assert members(filling, lengths, 0).tolist() == [0, 1, 2, 3, 4, 5]


SEQUENCES = st.lists(st.integers(1, 40), max_size=8)


@settings(max_examples=200, deadline=None)
@given(mine=SEQUENCES, theirs=SEQUENCES, gap=st.integers(1, 60), slow=st.sampled_from([1.0, 1.3]))
def test_one_pass_finds_the_best_of_all_exchanges(mine: list[int], theirs: list[int], gap: int, slow: float) -> None:
    mine, theirs = sorted(mine, reverse=True), sorted(theirs, reverse=True)
    alone, end, other = np.array(mine + theirs, np.int64), 1000, 1000 - gap
    own, others = np.arange(len(mine)), np.arange(len(mine), len(alone))
    give, take = exchange(own, others, alone, end, other, slow, 1.0)

    def later(i: int, j: int) -> int:
        taken = theirs[j] if j >= 0 else 0
        return max(end - scaled(mine[i], slow) + scaled(taken, slow), other + mine[i] - taken)

    best = min((later(i, j) for i in range(len(mine)) for j in range(-1, len(theirs))), default=end)
    assert (later(give, take) if give >= 0 else end) == min(best, end)
