"""Sequences that lost their place find another, and only shorter ones move for them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from evermesh.parallelism.planner.filling import Filling, Slots, members, put, slot_ticks
from evermesh.parallelism.planner.making_room import make_room

PACK, FIXED = 50, 7
SEQUENCE = st.tuples(st.integers(1, 60), st.integers(-1, 6))
"""Its length, and the slot it is in; -1: it lost its place."""


@settings(max_examples=150, deadline=None)
@given(
    sequences=st.lists(SEQUENCE, min_size=1, max_size=40),
    rooms=st.lists(st.integers(0, 800), min_size=7, max_size=7),
    slow=st.lists(st.sampled_from([1.0, 1.0, 1.25]), min_size=4, max_size=4),
)
def test_all_find_a_place_gaps_are_kept_and_nothing_longer_moves_for_them(
    sequences: list[tuple[int, int]], rooms: list[int], slow: list[float]
) -> None:
    """Four ranks, three gaps before rings of the first two of them."""
    lengths, slowness = np.array([length for length, _ in sequences]), np.array(slow)
    alone = 10 * lengths + lengths**2 // 20
    slots = Slots(np.array([0, 1, 2, 3, 0, 0, 1]), np.array([9, 9, 9, 9, 2, 5, 5]), np.array(rooms))
    filling = Filling(np.full(7, -1), np.full(len(lengths), -1))
    held_by = {slot: [s for s, (_, held) in enumerate(sequences) if held == slot] for slot in range(7)}
    loose = np.array([held < 0 for _, held in sequences])
    for slot, held in held_by.items():
        put(filling, slot, np.array(sorted(held, key=lambda s: (-lengths[s], s)), np.int64))
        if slot >= 4 and _used(filling, lengths, slot, alone, slots, slowness) > slots.room[slot]:
            loose[held] = True
            put(filling, slot, np.empty(0, np.int64))
    before = {s: slot for slot in range(7) for s in members(filling, lengths, slot).tolist()}
    room = np.array([slots.room[s] - _used(filling, lengths, s, alone, slots, slowness) for s in range(7)])
    placed = [int(length) for length in lengths[loose]]

    make_room(filling, slots, room, lengths, loose, alone, slowness, PACK, FIXED)

    after = [(s, slot) for slot in range(7) for s in members(filling, lengths, slot).tolist()]
    assert sorted(s for s, _ in after) == list(range(len(lengths)))
    assert not loose.any()
    for slot in range(7):
        used = _used(filling, lengths, slot, alone, slots, slowness)
        assert room[slot] == slots.room[slot] - used
        assert slot < 4 or used <= slots.room[slot]
    moved = [s for s, slot in after if s in before and before[s] != slot]
    assert all(lengths[s] <= max(placed, default=0) for s in moved)


def _used(filling: Filling, lengths: np.ndarray, slot: int, alone: np.ndarray, slots: Slots, slow: np.ndarray) -> int:
    return slot_ticks(lengths, members(filling, lengths, slot), alone, float(slow[slots.rank[slot]]), PACK, FIXED)


def test_a_long_sequence_takes_the_place_of_short_ones_that_others_have_time_for() -> None:
    """Rank 0 holds ten short sequences; ranks 1 to 9 have time for one short one each, and nobody for the long one."""
    lengths = np.array([30] + [10] * 10)
    alone = lengths * 10
    ranks = 10
    slots = Slots(np.arange(ranks), np.full(ranks, 1), np.array([1100 + 70, *[120] * 9]))
    filling = Filling(np.full(ranks, -1), np.full(11, -1))
    put(filling, 0, np.arange(1, 11))
    room = slots.room.copy()
    room[0] -= slot_ticks(lengths, members(filling, lengths, 0), alone, 1.0, 10, FIXED)
    loose = np.array([True] + [False] * 10)
    make_room(filling, slots, room, lengths, loose, alone, np.ones(ranks), 10, FIXED)
    assert [len(members(filling, lengths, rank)) for rank in range(ranks)] == [9, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert (room >= 0).all()
