"""Which snapshot can be had again after losses: against what the nodes that are left hold, counted by hand."""

import itertools

import pytest

from evermesh.fault.snapshot.choosing import Version
from evermesh.launcher.controller.recovery import Group, find_recovery, groups_of, lacking, newest_known
from evermesh.launcher.messages import InMemory, ProtectedPart, SnapshotPart

MAP = "a" * 32


def _memory(
    groups: tuple[Group, ...], place: int, held: list[tuple[int, int]], protected: list[tuple[int, int]]
) -> InMemory:
    """Of a node with two ranks."""
    group = next(one for one in groups if place in one.places)
    parts = [
        SnapshotPart(rank=2 * place + local, generation=generation, step=step, shard_map=MAP)
        for generation, step in held
        for local in range(2)
    ]
    known = [
        ProtectedPart(
            version=(*version, MAP),
            stripe=group.name,
            member=group.places.index(place),
            code=str(group.code),
            portions=(),
            coded_bytes=(),
        )
        for version in protected
    ]
    return InMemory(launch="now", parts=tuple(parts), protected=tuple(known))


def _all(
    groups: tuple[Group, ...], held: list[tuple[int, int]], protected: list[tuple[int, int]]
) -> list[InMemory | None]:
    return [_memory(groups, place, held, protected) for place in range(sum(len(one.places) for one in groups))]


def test_places_keep_their_stripes_and_every_node_is_in_one() -> None:
    assert groups_of(1, "auto") == (Group(0, (0,), None),)
    assert groups_of(2, "1+2") == (Group(0, (0, 1), None),)  # what is left of three
    assert groups_of(3, "none") == (Group(0, (0, 1, 2), None),)
    assert groups_of(2, "auto") == (Group(0, (0, 1), "1+1"),)
    assert groups_of(3, "auto") == (Group(0, (0, 1, 2), "2+1"),)
    for nodes, code in itertools.product((4, 6, 13, 128), ("auto", "2+1", "4+2")):
        groups = groups_of(nodes, code)
        assert sorted(place for group in groups for place in group.places) == list(range(nodes))
        assert all(group.code is not None for group in groups)


@pytest.mark.parametrize(("code", "lost", "rebuilt"), [
    ("2+1", (1,), {0}),
    ("2+1", (1, 3), None),
    ("2+1", (1, 4), {0, 1}),
    ("1+2", (1, 3), {0}),
    ("1+2", (0, 1, 2), {0, 1}),
    ("1+2", (1, 3, 5), None),
    ("2+1", (), set()),
])  # fmt: skip
def test_f8_f11_f12_f13_f14_what_the_code_makes_up_for(
    code: str, lost: tuple[int, ...], rebuilt: set[int] | None
) -> None:
    groups = groups_of(6, code)
    assert [group.places for group in groups] == [(0, 2, 4), (1, 3, 5)]
    numbers = {place: group.number for group in groups for place in group.places}
    memories = _all(groups, [(1, 8), (1, 9)], [(1, 8), (1, 9)])
    for place in lost:
        memories[place] = None
    found = find_recovery(groups, memories, 2)
    if rebuilt is None:
        assert found is None
        assert newest_known(memories, 2) == Version(1, 9, MAP)
        assert any(lacking(group, memories, 2, Version(1, 9, MAP)) for group in groups)
    else:
        assert found is not None
        assert found.version == Version(1, 9, MAP)
        assert set(found.rebuild) == {numbers[place] for place in lost}


def test_a_snapshot_that_is_not_protected_everywhere_gives_way_to_the_one_before() -> None:
    groups = groups_of(3, "2+1")
    memories = _all(groups, [(1, 8), (1, 9)], [(1, 8)])
    assert find_recovery(groups, memories, 2) is not None
    memories[1] = None
    found = find_recovery(groups, memories, 2)
    assert found is not None
    assert found.version.step == 8
    assert find_recovery(groups, memories, 2, [found.version]) is None


def test_a_node_that_was_elsewhere_before_helps_nobody_with_what_it_had_there() -> None:
    groups = groups_of(3, "2+1")
    memories = _all(groups, [(1, 9)], [(1, 9)])
    memories[1] = memories[2]  # of the ranks of another place
    found = find_recovery(groups, memories, 2)
    assert found is not None
    assert set(found.rebuild) == {0}
    memories[0] = None
    assert find_recovery(groups, memories, 2) is None


def test_a_later_attempt_is_newer_and_steps_of_two_attempts_are_never_mixed() -> None:
    groups = groups_of(3, "2+1")
    memories = _all(groups, [(1, 9)], [(1, 9)])
    memories[0] = _memory(groups, 0, [(1, 9), (2, 9)], [(1, 9), (2, 9)])
    memories[1] = None
    found = find_recovery(groups, memories, 2)
    assert found is not None
    assert found.version == Version(1, 9, MAP)
