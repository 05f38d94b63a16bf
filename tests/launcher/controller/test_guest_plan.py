"""Who hosts a guest for whom, when nodes are lost and nobody takes their places: against counting by hand."""

import itertools

import pytest

from evermesh.fault.snapshot.choosing import Version
from evermesh.launcher.controller.guest_plan import GuestPlan, plan_guests
from evermesh.launcher.controller.nodes import KeeperName
from evermesh.launcher.controller.recovery import complete_version, groups_of
from evermesh.launcher.messages import InMemory, ProtectedPart, SnapshotPart

MAP = "a" * 32
NODES, PER_NODE = 6, 2
WORLD = NODES * PER_NODE


def _ranks(place: int) -> tuple[int, ...]:
    return tuple(range(place * PER_NODE, (place + 1) * PER_NODE))


def _memory(place: int, code: str, held: list[int], protected: list[int]) -> InMemory:
    """Of the node in a place of an attempt on six: steps that it holds, and of which it has parity."""
    (group,) = (one for one in groups_of(NODES, code) if place in one.places)
    portions = tuple(tuple((rank, 8, 8, 8) for rank in _ranks(one)) for one in group.places)
    parts = tuple(
        SnapshotPart(rank=rank, generation=1, step=step, shard_map=MAP, world_size=WORLD)
        for step in held
        for rank in _ranks(place)
    )
    known = tuple(
        ProtectedPart(
            version=(1, step, MAP),
            stripe=group.name,
            member=group.places.index(place),
            code=str(group.code),
            portions=portions,
            coded_bytes=(),
        )
        for step in protected
    )
    return InMemory(launch="now", parts=parts, protected=known)


def _memories(code: str, held: list[int], protected: list[int]) -> dict[KeeperName, InMemory]:
    return {KeeperName(f"node-{place}"): _memory(place, code, held, protected) for place in range(NODES)}


def _plan(memories: dict[KeeperName, InMemory], *unwanted: Version) -> GuestPlan | None:
    hosts = [name.node for name in memories if name.guest is None]
    return plan_guests(memories, hosts, "guest-2-0", 4, unwanted)


@pytest.mark.parametrize(("code", "tolerated"), [("2+1", 1), ("1+2", 2)])
def test_every_loss_that_the_code_makes_up_for_gets_as_many_guests_and_no_other_does(code: str, tolerated: int) -> None:
    groups = groups_of(NODES, code)
    for number in range(NODES):
        for lost in itertools.combinations(range(NODES), number):
            memories = _memories(code, [8, 9], [8, 9])
            for place in lost:
                del memories[KeeperName(f"node-{place}")]
            plan = _plan(memories)
            can = all(len(set(group.places) & set(lost)) <= tolerated for group in groups)
            if not lost or not can:
                assert plan is None, lost
                continue
            assert plan is not None, lost
            assert plan.version == Version(1, 9, MAP)
            assert sorted(plan.guests.values()) == [_ranks(place) for place in lost]
            of_host = [sum(name.node == host.node for name in plan.guests) for host in memories]
            assert max(of_host) - min(of_host) <= 1, "memory is asked of all alike"
            assert len(plan.stripes) == sum(bool(set(group.places) & set(lost)) for group in groups)
            for stripe in plan.stripes:
                for member, name in enumerate(stripe.members):
                    place = stripe.ranks(member)[0] // PER_NODE
                    assert name == KeeperName(f"node-{place}") or plan.guests[name] == _ranks(place)


def test_what_is_whole_needs_no_guest_and_what_is_newer_and_can_be_rebuilt_comes_first() -> None:
    memories = _memories("2+1", [8, 9], [8, 9])
    assert complete_version(memories.values(), 4) == Version(1, 9, MAP)
    assert _plan(memories) is None
    memories[KeeperName("node-1")] = _memory(1, "2+1", [8], [8])  # its keeper lost one slot
    found = _plan(memories)
    assert found is not None
    assert found.version.step == 9
    assert list(found.guests.values()) == [_ranks(1)]
    assert complete_version(memories.values(), 4) == Version(1, 8, MAP)
    assert _plan(memories, Version(1, 9, MAP)) is None, "step 8 is there without guests"


def test_a_snapshot_that_was_tried_in_vain_or_is_not_protected_gives_way_to_the_one_before() -> None:
    memories = _memories("2+1", [8, 9], [8])
    del memories[KeeperName("node-4")]
    found = _plan(memories)
    assert found is not None
    assert found.version.step == 8
    assert _plan(memories, found.version) is None


def test_a_node_that_kept_its_part_but_no_parity_takes_part_itself() -> None:
    memories = _memories("1+2", [9], [9])
    del memories[KeeperName("node-0")]
    memories[KeeperName("node-2")] = _memory(2, "1+2", [9], [])
    found = _plan(memories)
    assert found is not None
    assert list(found.guests.values()) == [_ranks(0)]
    assert set(found.stripes[0].members) == {KeeperName("node-2"), KeeperName("node-4"), *found.guests}


def test_a_guest_helps_to_rebuild_who_is_lost_after_it() -> None:
    memories = _memories("2+1", [9], [9])
    lost = memories.pop(KeeperName("node-0"))
    guest = KeeperName("node-2", "guest-2-0")
    memories[guest] = lost
    assert _plan(memories) is None
    del memories[KeeperName("node-4")]  # of the same stripe
    found = _plan(memories)
    assert found is not None
    assert list(found.guests.values()) == [_ranks(4)]
    assert guest in found.stripes[0].members


def test_nobody_without_a_part_of_the_snapshot_is_a_host() -> None:
    memories = _memories("2+1", [9], [9])
    del memories[KeeperName("node-0")]
    memories[KeeperName("node-7")] = InMemory(launch="now")
    plan = plan_guests(memories, ["node-7"], "guest-2-0", 4)
    assert plan is None, "it could not say what ranks of another layout must know"
    plan = plan_guests(memories, ["node-7", "node-3"], "guest-2-0", 4)
    assert plan is not None
    assert list(plan.guests) == [KeeperName("node-3", "guest-2-0-0")]
