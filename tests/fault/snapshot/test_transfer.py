"""Members protect each other and rebuild what is lost, in real processes; the oracle is what they held, and the code
alone."""

import itertools
import os
import random
import signal
import socket
import time
from contextlib import closing

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from evermesh.fault.snapshot.coding import Code, Coder, TooManyErasures
from evermesh.fault.snapshot.coding.engine import NumpyEngine
from evermesh.fault.snapshot.stripes import (
    CHUNK_BYTES,
    PIECE,
    Address,
    ChunkCorrupt,
    MemberLost,
    Membership,
    Payload,
    RecordUnreadable,
    SnapshotsDiffer,
    StripeRecord,
    StripesImpossible,
    StripeTransfer,
    TransferFailed,
    digests_of,
    listen,
)
from evermesh.fault.snapshot.stripes.bandwidth import TokenBucket
from evermesh.fault.snapshot.stripes.rotation import Rows
from tests.cluster import run_ranks
from tests.fault.snapshot.members import Node, membership, open_transfer, protect, random_node


def _lengths(code: Code, seed: int, chunks: int) -> list[int]:
    """One member with whole chunks, one with a part of one, one with nothing, and some between."""
    drawn = random.Random(seed)
    lengths = [chunks * CHUNK_BYTES, 4097, 0, *(drawn.randrange(chunks * CHUNK_BYTES) for _ in range(code.parts))]
    return lengths[: code.parts]


def _protected(rank: int, code: Code, lengths: list[int], step: int = 3) -> Node:
    node = random_node(step, rank, lengths[rank], code, max(lengths))
    protect(rank, code, node, step).close()
    return node


def _parity_of_all(rank: int, size: int, code: Code, lengths: list[int]) -> tuple[bytes, bytes, bytes]:
    return _protected(rank, code, lengths).state()


@pytest.mark.parametrize("code", [Code(3, 1), Code(2, 3)], ids=str)
def test_parity_that_members_hold_is_that_of_the_code(code: Code) -> None:
    lengths = _lengths(code, 0, 5)
    states = run_ranks(code.parts, _parity_of_all, code, lengths)
    records = {state[2] for state in states}
    assert len(records) == 1
    record = StripeRecord.from_bytes(records.pop())
    rows = Rows(code, lengths)
    coder = Coder(code, NumpyEngine())
    for row in range(rows.number):
        data: list[bytes] = [b""] * code.data
        for member in range(code.parts):
            if not rows.keeps_parity[row, member]:
                begin = int(rows.slot[row, member]) * CHUNK_BYTES
                data[rows.part[row, member]] = states[member][0][begin : begin + CHUNK_BYTES]
        parity = [bytearray(max(map(len, data))) for _ in range(code.parity)]
        coder.encode(data, parity)
        for member in np.flatnonzero(rows.keeps_parity[row]).tolist():
            begin = int(rows.slot[row, member]) * CHUNK_BYTES
            expected = parity[rows.part[row, member] - code.data]
            assert states[member][1][begin : begin + len(expected)] == expected
    assert record.lengths == tuple(lengths)


def _rebuild_every_pattern(rank: int, size: int, code: Code, lengths: list[int], most: int) -> list[str]:
    node = _protected(rank, code, lengths)
    before, wrong = node.state(), []
    transfer = open_transfer(rank, code)
    assert transfer is not None
    with transfer:
        for number in range(1, most + 1):
            for lost in itertools.combinations(range(size), number):
                if rank in lost:
                    node.lose()
                done = transfer.rebuild(3, node.record, [memoryview(node.data)], memoryview(node.parity))
                node.record = done.record
                if done.lost != set(lost) or not _same(node, before):
                    wrong.append(f"{lost}: {done.lost}")
    return wrong


def _same(node: Node, before: tuple[bytes, bytes, bytes]) -> bool:
    """Whether data, record, and all of the parity that its rows reach to are what they were."""
    data, parity, record = node.state()
    if (data, record) != (before[0], before[2]):
        return False
    assert node.record is not None
    rows = node.record.rows
    rank = next(at for at, length in enumerate(node.record.lengths) if length == len(data))
    kept = rows.keeps_parity[:, rank]
    for slot, length in zip(rows.slot[kept, rank].tolist(), rows.size[kept, rank].tolist(), strict=True):
        begin = slot * CHUNK_BYTES
        if parity[begin : begin + length] != before[1][begin : begin + length]:
            return False
    return True


@pytest.mark.parametrize("code", [Code(3, 2), Code(1, 2)], ids=str)
def test_every_loss_within_the_code_is_rebuilt_to_the_same_bytes(code: Code) -> None:
    assert run_ranks(code.parts, _rebuild_every_pattern, code, _lengths(code, 1, 4), code.parity) == [[]] * code.parts


@pytest.mark.parity
@pytest.mark.parametrize("code", [Code(3, 1), Code(6, 2), Code(4, 3)], ids=str)
def test_every_loss_within_a_wide_code_is_rebuilt_to_the_same_bytes(code: Code) -> None:
    found = run_ranks(code.parts, _rebuild_every_pattern, code, _lengths(code, 2, 7), code.parity, timeout_s=170)
    assert found == [[]] * code.parts


def _repair_in_place(rank: int, size: int, code: Code, lengths: list[int], flips: list[tuple[int, bool, int]]) -> str:
    """Flip bytes (member, in parity, position); on member 1 lose everything as well, if the code makes up for both."""
    node = _protected(rank, code, lengths)
    before = node.state()
    for member, in_parity, position in flips:
        if member == rank:
            (node.parity if in_parity else node.data)[position] ^= 1
    if rank == 1 and code.parity > 1:
        node.lose()
    transfer = open_transfer(rank, code)
    assert transfer is not None
    try:
        with transfer:
            done = transfer.rebuild(3, node.record, [memoryview(node.data)], memoryview(node.parity))
    except TooManyErasures as error:
        return str(error)
    node.record = done.record
    return f"{sorted(done.lost)} {dict(sorted(done.repaired.items()))} {_same(node, before)}"


def test_a_corrupt_chunk_counts_as_lost_and_is_repaired_in_place() -> None:
    code, lengths = Code(3, 2), [6 * CHUNK_BYTES] * 5
    rows, flips = Rows(code, lengths), []
    for row, member in ((0, 0), (2, 0), (3, 2), (9, 4)):  # with member 1, two of every row
        begin = int(rows.slot[row, member]) * CHUNK_BYTES
        flips.append((member, bool(rows.keeps_parity[row, member]), begin + 1000 * row))
    assert {in_parity for _, in_parity, _ in flips} == {True, False}
    found = run_ranks(5, _repair_in_place, code, lengths, flips)
    assert found == ["[1] {0: 2, 2: 1, 4: 1} True"] * 5


def test_more_corrupt_chunks_of_a_row_than_parity_are_refused_by_all_with_the_row() -> None:
    found = run_ranks(4, _repair_in_place, Code(3, 1), [CHUNK_BYTES] * 4, [(0, True, 5), (2, False, 9)])
    assert len(set(found)) == 1
    assert found[0].startswith("row 0 of step 3, members 0, 2: 2 parts are lost or corrupt, but 1 parity parts")


def _lose_more_than_the_code_has(rank: int, size: int, code: Code) -> bool:
    node = _protected(rank, code, [CHUNK_BYTES] * size)
    if rank < 2:
        node.lose()
    transfer = open_transfer(rank, code)
    assert transfer is not None
    with pytest.raises(TooManyErasures, match="members 0, 1: 2 parts are lost"):
        transfer.rebuild(3, node.record, [memoryview(node.data)], memoryview(node.parity))
    return True


def test_two_lost_members_are_refused_where_one_is_tolerated() -> None:
    assert all(run_ranks(3, _lose_more_than_the_code_has, Code(2, 1)))


def _rebuild_without(rank: int, size: int, code: Code, lengths: list[int]) -> bool:
    """Members 0 and 3 are lost, and only 3 has somebody in its place."""
    node = _protected(rank, code, lengths)
    before = node.state()
    if rank in (0, 3):
        node.lose()
    transfer = open_transfer(rank, code, absent=[0])
    if transfer is None:
        return True
    with transfer:
        node.record = transfer.rebuild(3, node.record, [memoryview(node.data)], memoryview(node.parity)).record
        assert _same(node, before)
        with pytest.raises(TransferFailed, match="members 0 are absent"):
            transfer.protect(4, [memoryview(node.data)], memoryview(node.parity))
    return True


def test_a_member_is_rebuilt_while_another_is_absent() -> None:
    assert all(run_ranks(5, _rebuild_without, Code(3, 2), _lengths(Code(3, 2), 3, 4)))


def _protect_again_and_again(rank: int, size: int, code: Code) -> bool:
    node = random_node(0, rank, 3 * CHUNK_BYTES - rank, code, 3 * CHUNK_BYTES)
    with protect(rank, code, node, 1) as transfer:
        for step in (2, 3):
            node.data[:100] = bytes([step]) * 100
            views = [
                memoryview(node.data)[:77],
                memoryview(node.data)[77:CHUNK_BYTES],
                memoryview(node.data)[CHUNK_BYTES:],
            ]
            node.record = transfer.protect(step, views, memoryview(node.parity), digests_of(Payload(views)))
        before = node.state()
        if rank == 2:
            node.lose()
        views = [memoryview(node.data)[:1000], memoryview(node.data)[1000:]]
        node.record = transfer.rebuild(3, node.record, views, memoryview(node.parity)).record
        return _same(node, before)


def test_one_transfer_serves_many_steps_and_data_in_several_buffers() -> None:
    assert all(run_ranks(3, _protect_again_and_again, Code(2, 1)))


def _member_of_another_generation(rank: int, size: int, code: Code) -> str:
    with closing(listen("127.0.0.1")) as listener:
        mine = membership(rank, code, listener.getsockname()[1], generation=8 if rank == 1 else 7)
        try:
            StripeTransfer(mine, listener, timeout_s=1.5).close()
        except TransferFailed as error:
            return f"{type(error).__name__} {error.members}: {error}"
    return ""


def test_a_member_of_another_generation_is_refused_and_both_are_named() -> None:
    found = run_ranks(2, _member_of_another_generation, Code(1, 1))
    assert found == [
        "WrongGeneration (1,): member 1 is of generation 8; this is 7.",
        "WrongGeneration (0,): member 0 is of generation 7; this is 8.",
    ]


def _member_with_another_secret(rank: int, size: int, code: Code) -> str:
    with closing(listen("127.0.0.1")) as listener:
        changes = {"secret": b"guessed" * 3} if rank == 1 else {}
        mine = membership(rank, code, listener.getsockname()[1], **changes)
        try:
            StripeTransfer(mine, listener, timeout_s=1.0).close()
        except TransferFailed as error:
            return f"{type(error).__name__} {error.members}"
    return ""


def test_a_member_with_another_secret_gets_no_connection() -> None:
    assert run_ranks(2, _member_with_another_secret, Code(1, 1)) == ["MemberLost (1,)", "MemberLost (0,)"]


def _among_strangers(rank: int, size: int, code: Code) -> bool:
    """Before members meet, member 1 is dialled by some that say nothing, and some that talk nonsense."""
    node = random_node(0, rank, CHUNK_BYTES, code, CHUNK_BYTES)
    with closing(listen("127.0.0.1")) as listener:
        mine = membership(rank, code, listener.getsockname()[1])
        strangers = [socket.create_connection(mine.addresses[1]) for _ in range(8)] if rank == 0 else []
        for stranger in strangers[::2]:
            stranger.sendall(os.urandom(200))
        dist.barrier()
        started_s = time.monotonic()
        with StripeTransfer(mine, listener) as transfer:
            assert time.monotonic() - started_s < 4  # not held up until a stranger's time is over
            transfer.protect(1, [memoryview(node.data)], memoryview(node.parity))
        for stranger in strangers:
            stranger.close()
    return True


def test_strangers_neither_get_in_nor_hold_members_up() -> None:
    assert all(run_ranks(2, _among_strangers, Code(1, 1)))


def _killed_while_protecting(rank: int, size: int, code: Code, signal_number: int) -> str:
    """Member 2 is killed, or stopped, in the middle of the second step; the first stays as it was."""
    length = 24 * CHUNK_BYTES
    node = random_node(0, rank, length, code, length)
    other = bytearray(len(node.parity))
    transfer = protect(rank, code, node, 1, timeout_s=2.0, bytes_per_s=60e6)  # 0.4 s for a step
    before = node.state()
    child = os.fork() if rank == 2 else 0
    if child:
        transfer.close()
        dist.barrier()
        time.sleep(0.1)
        os.kill(child, signal_number)
        dist.barrier()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "killed"
    if rank == 2:
        transfer.protect(2, [memoryview(node.data)], memoryview(other))
        os._exit(0)
    dist.barrier()
    try:
        transfer.protect(2, [memoryview(node.data)], memoryview(other))
        return "protected"
    except MemberLost:
        with pytest.raises(TransferFailed, match="Open another one"):
            transfer.protect(3, [memoryview(node.data)], memoryview(other))
        return f"lost {_same(node, before)}"
    finally:
        dist.barrier()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_a_member_killed_or_stopped_while_protecting_fails_all_and_spoils_nothing(number: signal.Signals) -> None:
    assert run_ranks(4, _killed_while_protecting, Code(3, 1), int(number)) == [
        "lost True",
        "lost True",
        "killed",
        "lost True",
    ]


def _disagree(rank: int, size: int, code: Code, what: str) -> str:
    node = random_node(0, rank, CHUNK_BYTES, code, CHUNK_BYTES)
    with protect(rank, code, node, 1) as transfer:
        try:
            if what == "steps":
                transfer.protect(2 + rank, [memoryview(node.data)], memoryview(node.parity))
            elif what == "operations" and rank == 0:
                transfer.protect(1, [memoryview(node.data)], memoryview(node.parity))
            elif what == "snapshots":
                first, data = node.record, bytearray(node.data)
                data[0] ^= 1
                second = transfer.protect(1, [memoryview(data)], memoryview(node.parity))
                transfer.rebuild(1, first if rank else second, [memoryview(data)], memoryview(node.parity))
            elif what == "sealed":
                digests = digests_of(Payload([memoryview(node.data)]))
                node.data[9] ^= rank == 1  # after it was sealed
                transfer.protect(2, [memoryview(node.data)], memoryview(node.parity), digests)
            elif what == "room":
                longer = memoryview(bytearray((1 + rank) * CHUNK_BYTES))
                transfer.protect(2, [longer], memoryview(node.parity))
            elif what == "nobody":
                transfer.rebuild(1, None, [memoryview(node.data)], memoryview(node.parity))
            else:
                transfer.rebuild(1, node.record, [memoryview(node.data)], memoryview(node.parity))
        except TransferFailed as error:
            return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("what", "kind", "says"),
    [
        ("steps", SnapshotsDiffer, "sent a frame of kind 1 of step"),
        ("operations", SnapshotsDiffer, "of step 1 (generation 7); expected was"),
        ("snapshots", SnapshotsDiffer, "step 1 was protected more than once"),
        ("sealed", ChunkCorrupt, "chunk 0 of member 1 has another digest"),
        ("room", TransferFailed, "there is room for 1,048,576"),
        ("nobody", TransferFailed, "no member of stripe '0' holds step 1"),
    ],
)
def test_members_that_disagree_fail_with_the_reason(what: str, kind: type[TransferFailed], says: str) -> None:
    found = run_ranks(2, _disagree, Code(1, 1), what)
    assert all(found)
    assert any(text.startswith(f"{kind.__name__}: ") and says in text for text in found), found


def _bounded(rank: int, size: int, code: Code) -> float:
    node = random_node(0, rank, 4 * CHUNK_BYTES, code, 4 * CHUNK_BYTES)
    with protect(rank, code, node, 1, bytes_per_s=8e6) as transfer:
        dist.barrier()
        started_s = time.monotonic()
        transfer.protect(2, [memoryview(node.data)], memoryview(node.parity))
        return time.monotonic() - started_s


def test_no_more_is_sent_per_second_than_allowed() -> None:
    seconds = run_ranks(2, _bounded, Code(1, 1))  # 4 MiB each, of which 0.8 MB and a piece at once
    assert min(seconds) > (4 * CHUNK_BYTES - 0.8e6 - 2**18) / 8e6 * 0.98


def test_a_bucket_passes_its_rate_on_average() -> None:
    now_s = 0.0
    bucket = TokenBucket(1000.0, clock=lambda: now_s)
    sent = 0
    while now_s < 10:
        if wait_s := bucket.wait_s():
            now_s += wait_s
        else:
            bucket.take(70)
            sent += 70
    assert sent == pytest.approx(10_000, abs=100 + 2 * 70)
    assert TokenBucket(None).wait_s() == 0


def _record(seed: int = 0) -> StripeRecord:
    code, lengths = Code(2, 1), (3 * CHUNK_BYTES, 5, 0)
    drawn = np.random.default_rng(seed)
    kept = Rows(code, lengths).number // 3
    data = [drawn.integers(0, 2**63, -(-length // CHUNK_BYTES)).astype(np.uint64) for length in lengths]
    parity = [drawn.integers(0, 2**63, kept).astype(np.uint64) for _ in lengths]
    pieces = tuple(np.zeros(number, PIECE) for number in (2, 0, 1))
    for of_member in pieces:
        for field in ("start", "key", "digest"):
            of_member[field] = drawn.integers(0, 2**63, of_member.size)
    return StripeRecord(code, 11, 7, lengths, tuple(data), tuple(parity), pieces)


def test_a_record_is_read_back_as_it_was() -> None:
    text = _record().to_bytes()
    assert StripeRecord.from_bytes(text).to_bytes() == text
    assert StripeRecord.from_bytes(text).root == _record().root != _record(1).root


@given(st.data())
def test_a_damaged_record_is_refused(drawn: st.DataObject) -> None:
    text = bytearray(_record().to_bytes())
    if drawn.draw(st.booleans()):
        text = text[: drawn.draw(st.integers(0, len(text) - 1))]
    else:
        text[drawn.draw(st.integers(0, len(text) - 1))] ^= 1 << drawn.draw(st.integers(0, 7))
    with pytest.raises(RecordUnreadable):
        StripeRecord.from_bytes(text)


def test_a_place_in_a_stripe_needs_every_address_and_a_secret_that_cannot_be_guessed() -> None:
    addresses = (Address("127.0.0.1", 1), Address("127.0.0.1", 2))
    with pytest.raises(StripesImpossible, match=r"code 2\+1 has 3 parts"):
        Membership(0, addresses, Code(2, 1), "0", 1, b"x" * 32)
    with pytest.raises(StripesImpossible, match="can be guessed"):
        Membership(0, addresses, Code(1, 1), "0", 1, b"short")
    assert "xxxx" not in repr(Membership(0, addresses, Code(1, 1), "0", 1, b"x" * 32))
