"""What several nodes hold is coded once or not at all, and comes back from copies; real keepers, whose memory is compared
byte for byte. Which pieces are coded is compared with every loss that there is."""

import itertools
import random
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evermesh.checkpoint import Box, Interval, Shard, ShardMap, TensorShards
from evermesh.fault.snapshot.coding import Code, TooManyErasures
from evermesh.fault.snapshot.copies import CopyPlan
from evermesh.fault.snapshot.keeper.parity import Protected, protected_in
from evermesh.fault.snapshot.keeper.sharing import runs
from evermesh.fault.snapshot.keeper.slots import SlotFiles, held_by
from evermesh.fault.snapshot.keeper.standing import standing_in
from evermesh.fault.snapshot.stripes import (
    CHUNK_BYTES,
    NO_PIECES,
    PIECE,
    Pieces,
    SnapshotsDiffer,
    StripeRecord,
    StripeTransfer,
    TransferFailed,
    copied_bytes,
    listen,
    parity_bytes,
)
from evermesh.fault.snapshot.stripes.copies import divide, gaps, identities, shared_keys
from evermesh.fault.snapshot.stripes.fetching import Fetch, fetches
from evermesh.fault.snapshot.stripes.payload import Payload
from evermesh.fault.snapshot.stripes.schedule import Damage
from tests.cluster import run_ranks
from tests.fault.snapshot.keepers import WAIT_S
from tests.fault.snapshot.members import Node, membership, open_transfer, random_node
from tests.fault.snapshot.stripe_keepers import HEAD_BYTES, Data, Part, Stripe, flip, num_bytes_of, stripe_of

MIB = 1 << 20
WEIGHTS, PAIR, OWN = 3 * MIB + 5000, MIB + 77, 2 * MIB


def _whole(name: str, num_bytes: int) -> Part:
    return Part(name, num_bytes, 0, num_bytes)


def _cut(at: int) -> tuple[Part, Part]:
    return Part("weights", WEIGHTS, 0, at), Part("weights", WEIGHTS, at, WEIGHTS)


NODES: tuple[tuple[Data, Data], ...] = (
    ((_cut(2 * MIB)[0], _whole("pair", PAIR), _whole("own 0", OWN)), (_cut(2 * MIB)[1],)),
    ((_whole("own 1", OWN), _whole("weights", WEIGHTS), _whole("pair", PAIR)), 0),
    ((_whole("small", 999), _whole("weights", WEIGHTS)), (_whole("own 2", OWN),)),
)
"""Three nodes with two ranks each, which divide what the nodes hold alike in different ways: weights on all of them, a pair
on two, and something on each alone."""


def _protected(stripe: Stripe, node: int, step: int) -> Protected:
    return next(one for one in protected_in(stripe.area(node)) if one.version.step == step)


def _parity_room(stripe: Stripe) -> set[int]:
    return {file.stat().st_size for node in range(3) for file in stripe.area(node).glob("parity-*/parity")}


@pytest.mark.parametrize(("code", "copied"), [("2+1", (5, 5, 4)), ("1+2", (5, 4, 4))])
def test_only_what_too_few_hold_is_coded_and_every_loss_is_rebuilt_byte_for_byte(
    tmp_path: Path, code: str, copied: tuple[int, ...]
) -> None:
    """``copied`` in whole MiB, rounded up: one node that has the pair codes it where two nodes may be lost."""
    most = int(code[-1])
    with stripe_of(tmp_path, code, NODES) as stripe:
        version = stripe.protect(4)
        protected = _protected(stripe, 0, 4)
        for node, ranks in enumerate(NODES):
            told = protected.portions[node]
            beside = sum(part.num_bytes - part.data_bytes for part in told)
            assert sum(part.data_bytes for part in told) == sum(map(num_bytes_of, ranks))
            coded = protected.coded_bytes[node] - beside
            assert -(-(sum(map(num_bytes_of, ranks)) - coded) // MIB) == copied[node]
            assert coded >= OWN
        assert _parity_room(stripe) == {parity_bytes(Code.parse(code), max(protected.coded_bytes))}
        found = standing_in(stripe.area(1))
        assert found is not None
        assert (found.data_bytes, found.coded_bytes) == (
            sum(part.num_bytes for part in protected.portions[1]),
            protected.coded_bytes[1],
        )
        whole = stripe.digests(version)
        for number in range(1, most + 1):
            for lost in itertools.combinations(range(3), number):
                for node in lost:
                    stripe.lose(node)
                stripe.join()
                answers = stripe.rebuild(version)
                assert [answer.get("lost") for answer in answers] == [list(lost)] * 3, answers
                assert stripe.digests(version) == whole
                assert {standing_in(stripe.area(node)).coded_bytes for node in range(3)} == set(protected.coded_bytes)  # type: ignore[union-attr]
        stripe.protect(5)
        assert _protected(stripe, 0, 5).coded_bytes == protected.coded_bytes


def _flip_weights(stripe: Stripe, node: int, at: int) -> None:
    """A byte of the weights that a node holds."""
    for rank, data in zip(stripe.ranks[node], NODES[node], strict=True):
        offset = HEAD_BYTES
        for part in data if isinstance(data, tuple) else ():
            if part.name == "weights" and part.start <= at < part.stop:
                (held,) = held_by(stripe.area(node), rank)
                flip(SlotFiles.of(stripe.area(node), rank, held.number).data, offset + at - part.start)
            offset += part.stop - part.start


def test_f19_a_flipped_byte_of_a_copy_is_repaired_from_another_copy_and_no_wrong_byte_is_taken(tmp_path: Path) -> None:
    with stripe_of(tmp_path, "2+1", NODES) as stripe:
        version = stripe.protect(4)
        whole = stripe.digests(version)
        for node in range(3):
            _flip_weights(stripe, node, MIB + 3)
            assert stripe.digests(version) != whole
            stripe.join()
            assert [answer["repaired"] for answer in stripe.rebuild(version)] == [{str(node): 1}] * 3
            assert stripe.digests(version) == whole
        _flip_weights(stripe, 1, 7)
        assert stripe.client(1).ask("scrub", WAIT_S)["rotten"]  # nobody chooses it now, also not as a copy
        stripe.join()
        assert [answer["lost"] for answer in stripe.rebuild(version)] == [[1]] * 3
        assert stripe.digests(version) == whole
        _flip_weights(stripe, 0, 5)
        _flip_weights(stripe, 1, MIB + 5)
        stripe.lose(2)  # of each piece one copy is left
        stripe.join()
        assert [answer.get("repaired") for answer in stripe.rebuild(version)] == [{"0": 1, "1": 1}] * 3
        assert stripe.digests(version) == whole


def test_f11_where_the_only_living_holders_of_a_copy_are_corrupt_all_refuse(tmp_path: Path) -> None:
    with stripe_of(tmp_path, "2+1", NODES) as stripe:
        version = stripe.protect(4)
        for node in (0, 1):
            _flip_weights(stripe, node, 5)
        stripe.lose(2)
        stripe.join()
        facts = [answer["fact"] for answer in stripe.rebuild(version)]
        assert all("which only members 0, 1, 2 have: 3 parts are lost or corrupt" in fact for fact in facts), facts
        assert not any(held_by(stripe.area(2), rank) for rank in stripe.ranks[2])
        stripe.protect(5)


def test_copies_that_differ_are_none(tmp_path: Path) -> None:
    """A bit has changed on one node before anything was sealed: what it has there is coded, as what it has alone."""
    with stripe_of(tmp_path, "2+1", NODES) as stripe:
        stripe.spoiled = (2, HEAD_BYTES + OWN + 5)  # in the first MiB of the weights
        version = stripe.protect(4)
        first = _protected(stripe, 0, 4)
        whole = stripe.digests(version)
        for lost in range(3):
            stripe.lose(lost)
            stripe.join()
            assert [answer.get("lost") for answer in stripe.rebuild(version)] == [[lost]] * 3
            assert stripe.digests(version) == whole
        stripe.spoiled = None
        stripe.protect(5)
        second = _protected(stripe, 0, 5)
        assert [a - b for a, b in zip(first.coded_bytes, second.coded_bytes, strict=True)] == [0, MIB, 0]


def _table(rows: Sequence[tuple[int, int, int, int]]) -> Pieces:
    """Of start, bytes, key, digest."""
    return np.array([(start, size, 0, key, digest) for start, size, key, digest in rows], PIECE)


@settings(deadline=None, max_examples=80)
@given(st.integers(2, 6), st.integers(1, 3), st.integers(0, 10**6))
def test_whatever_is_not_coded_by_its_holder_is_left_by_every_loss(members: int, tolerance: int, seed: int) -> None:
    drawn = random.Random(seed)
    tables, lengths = [], []
    for _ in range(members):
        keys, at, rows = [key for key in range(12) if drawn.random() < 0.6], 7, []
        for key in keys:
            rows.append((at, 10 + key, key, drawn.random() < 0.1))  # some copies differ
            at += 10 + key + drawn.randrange(3)
        tables.append(_table(rows))
        lengths.append(at + drawn.randrange(100))
    found = divide(tables, lengths, tolerance)
    for member, pieces in enumerate(found):
        assert set(identities(pieces)) <= set(identities(tables[member]))
        held = bytes(range(256)) * (lengths[member] // 256 + 1)
        coded = Payload([memoryview(held)[: lengths[member]]]).without(gaps(pieces))
        assert coded.nbytes == lengths[member] - copied_bytes(pieces)
    for lost in itertools.combinations(range(members), min(tolerance, members - 1)):
        for member in lost:
            for piece, is_coded in zip(identities(found[member]), found[member]["is_coded"].tolist(), strict=True):
                holders = [one for one in range(members) if piece in identities(tables[one])]
                coders = [one for one in holders if found[one]["is_coded"][identities(found[one]).index(piece)]]
                assert is_coded == (member in coders)
                assert coders or set(holders) - set(lost)  # who codes it is rebuilt first
                assert len(coders) == (len(holders) <= tolerance)


def test_pieces_that_a_member_cannot_have_are_refused() -> None:
    for rows in ([(0, 10, 1, 1), (5, 10, 2, 1)], [(0, 10, 1, 1), (95, 10, 2, 1)], [(2**64 - 5, 10, 1, 1)]):
        with pytest.raises(SnapshotsDiffer, match="member 1 told pieces"):
            divide([NO_PIECES, _table(rows)], [100, 100], 1)
    assert shared_keys([NO_PIECES, NO_PIECES]).size == 0


def _record(pieces: Sequence[Pieces]) -> StripeRecord:
    none = tuple(np.zeros(0, np.uint64) for _ in pieces)
    return StripeRecord(Code(len(pieces) - 2, 2), 3, 7, (0,) * len(pieces), none, none, tuple(pieces))


def test_copies_come_from_whoever_has_them_in_turns() -> None:
    of_all = _table([(at * 10, 10, at, 5) for at in range(4)])
    coded = of_all.copy()
    coded["is_coded"] = [0, 0, 0, 1]  # member 3 codes the last piece
    record = _record([of_all, of_all, of_all[:3], coded])
    assert StripeRecord.from_bytes(record.to_bytes()).to_bytes() == record.to_bytes()
    damage = Damage({0}, set(), {})
    assert [fetch.giver for fetch in fetches(record, damage, {1: {1}, 2: frozenset(), 3: frozenset()})] == [
        1,
        2,
        3,
        1,
        2,
    ]
    assert fetches(record, Damage(set(), set(), {}), {0: frozenset(), 2: {2}}) == [Fetch(2, 2, 0, 2)]
    lost = fetches(record, Damage({0, 1, 3}, set(), {}), {2: frozenset()})  # the last piece is rebuilt on 3 by then
    assert [(fetch.member, fetch.giver) for fetch in lost if fetch.piece == 3] == [(0, 3), (1, 3)]
    with pytest.raises(TransferFailed, match="member 3 is absent, and codes piece 3 of member 0 too"):
        fetches(record, Damage({0, 1}, {3}, {}), {2: frozenset()})
    with pytest.raises(TooManyErasures, match="copies of piece 1 of step 3, which only members 0, 1, 2, 3 have"):
        fetches(record, Damage({0, 3}, set(), {}), {1: {1}, 2: {1}})


def _members_with_copies(rank: int, size: int, code: Code, lost: Sequence[Sequence[int]]) -> list[str]:
    """Every member holds four shared chunks, of which it lacks its own number; members lose all in turns."""
    shared = [np.random.default_rng(at).integers(0, 256, CHUNK_BYTES - at, np.uint8).tobytes() for at in range(size)]
    alone = random_node(3, rank, 2 * CHUNK_BYTES - rank, code, 9 * CHUNK_BYTES)
    data, rows = bytearray(alone.data), []
    for key, content in enumerate(shared):
        if key != rank:
            rows.append((len(data), len(content), key, 0))
            data += content
    node = Node(data, alone.parity)
    transfer = open_transfer(rank, code)
    assert transfer is not None
    with transfer:
        told = [np.frombuffer(one, PIECE) for one in transfer.tell_all(3, _table(rows).tobytes())]
        lengths = [int.from_bytes(one) for one in transfer.tell_all(3, len(data).to_bytes(8))]
        pieces = transfer.find_copies(3, [memoryview(data)], told, lengths)
        node.record = transfer.protect(3, [memoryview(data)], memoryview(node.parity), pieces=pieces)
        assert node.record.data_bytes(rank) == len(data)
        assert node.record.lengths == tuple(2 * CHUNK_BYTES - member for member in range(size))
        whole, wrong = bytes(data), []
        for members in lost:
            if rank in members:
                node.lose()
            done = transfer.rebuild(3, node.record, [memoryview(data)], memoryview(node.parity))
            node.record = done.record
            if done.lost != set(members) or bytes(data) != whole:
                wrong.append(str(members))
    return wrong


def test_members_get_their_copies_from_each_other_after_every_loss() -> None:
    lost = [pattern for number in (1, 2) for pattern in itertools.combinations(range(4), number)]
    assert run_ranks(4, _members_with_copies, Code(2, 2), lost) == [[]] * 4


def _slow_copies(rank: int, size: int, code: Code) -> bool:
    """Only member 0 has what member 1 has lost, and sends it slowly; member 2 has nothing to do for longer than it waits."""
    content = np.random.default_rng(5).integers(0, 256, 5 * CHUNK_BYTES, np.uint8).tobytes() if rank < 2 else b""
    data = bytearray(b"alone" + content)
    pieces = _table([(5 + at * CHUNK_BYTES, CHUNK_BYTES, at, 0) for at in range(len(content) // CHUNK_BYTES)])
    node = Node(data, bytearray(parity_bytes(code, 5)))
    with closing(listen("127.0.0.1")) as listener:
        mine = membership(rank, code, listener.getsockname()[1])
        with StripeTransfer(mine, listener, timeout_s=2.0, bytes_per_s=1.5e6) as transfer:  # 3.5 s for all copies
            told = [np.frombuffer(one, PIECE) for one in transfer.tell_all(3, pieces.tobytes())]
            lengths = [5 + of_member.size * CHUNK_BYTES for of_member in told]
            found = transfer.find_copies(3, [memoryview(data)], told, lengths)
            node.record = transfer.protect(3, [memoryview(data)], memoryview(node.parity), pieces=found)
            before = bytes(data)
            if rank == 1:
                node.lose()
            transfer.rebuild(3, node.record, [memoryview(data)], memoryview(node.parity))
            return bytes(data) == before


def test_who_has_nothing_to_do_while_copies_are_sent_is_patient() -> None:
    assert all(run_ranks(3, _slow_copies, Code(2, 1)))


def _keys_of_node(shard_map: ShardMap, ranks: Sequence[int]) -> dict[int, int]:
    """What a node holds, as its ranks would divide it: bytes by key."""
    found: dict[int, int] = {}
    for rank in ranks:
        plan = CopyPlan.of(shard_map, rank, ranks)
        told = runs(plan.reservation(1)["extents"], plan.data_bytes)
        pieces = [(key, num_bytes) for _, num_bytes, key in told]
        assert sum(num_bytes for _, num_bytes in pieces) <= plan.tensor_bytes
        assert found.keys().isdisjoint(key for key, _ in pieces)
        found |= dict(pieces)
    return found


@pytest.mark.parametrize("nodes", [((0, 1, 2), (3,)), ((0,), (1, 2), (3,)), ((0, 1), (2, 3))])
def test_nodes_know_what_they_hold_alike_however_their_ranks_divide_it(nodes: tuple[tuple[int, ...], ...]) -> None:
    """Weights on all ranks, and on each a part of the moments, of which the last is shorter."""
    weights, num_bytes = Shard(Box((0, 0), (2500, 1000)), (0, 1, 2, 3)), 2 * 2500 * 1000
    edges = (0, 500_001, 1_000_002, 1_500_003, 1_900_000)
    own = tuple(Shard(Interval(edges[rank], edges[rank + 1]), (rank,)) for rank in range(4))
    tensors = {
        "weights": TensorShards("bfloat16", (2500, 1000), (weights,)),
        "moments": TensorShards("float32", (1_900_000,), own),
    }
    keys = {ranks: _keys_of_node(ShardMap(tensors), ranks) for ranks in nodes}
    for one, other in itertools.combinations(nodes, 2):
        alike = {key: keys[one][key] for key in keys[one].keys() & keys[other].keys()}
        assert alike == {key: keys[other][key] for key in alike}
        cuts = len(one) + len(other) - 2
        assert num_bytes - cuts * MIB <= sum(alike.values()) <= num_bytes
