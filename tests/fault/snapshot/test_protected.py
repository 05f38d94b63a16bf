"""Keepers of several nodes protect what their ranks have sealed, and rebuild it in empty memory; real processes, whose
memory is compared byte for byte."""

import itertools
import os
import signal
from hashlib import sha256
from pathlib import Path

import pytest

from evermesh.fault.snapshot.keeper.area import identity_in
from evermesh.fault.snapshot.keeper.parity import free_buffer, protected_in
from evermesh.fault.snapshot.keeper.slots import SlotFiles, held_by
from evermesh.fault.snapshot.keeper.standing import standing_in
from tests.fault.snapshot.keepers import WAIT_S
from tests.fault.snapshot.stripe_keepers import HOST, Stripe, answer_of, flip, stripe_of, wait

MIB = 1 << 20
SIZES = ((2 * MIB + 5, 4097), (MIB, 0), (3 * MIB - 7, 1))
"""Of two ranks on each of three nodes; one has no data."""


@pytest.mark.parametrize("code", ["2+1", "1+2"])
def test_f8_f12_every_loss_that_the_code_covers_is_rebuilt_byte_for_byte(tmp_path: Path, code: str) -> None:
    most = int(code[-1])
    with stripe_of(tmp_path, code, SIZES) as stripe:
        version = stripe.protect(4)
        whole = stripe.digests(version)
        assert len(whole) == 6 * 4 + 3
        for number in range(1, most + 1):
            for lost in itertools.combinations(range(3), number):
                for node in lost:
                    stripe.lose(node)
                assert stripe.digests(version) != whole
                stripe.join()
                answers = stripe.rebuild(version)
                assert [answer.get("lost") for answer in answers] == [list(lost)] * 3, answers
                assert stripe.digests(version) == whole
                assert all(standing_in(stripe.area(node)).is_protected for node in range(3))  # type: ignore[union-attr]
        assert stripe.protect(5) != version  # and goes on
        assert {held.state for held in held_by(stripe.area(lost[0]), stripe.ranks[lost[0]][0])} == {"protected"}


def test_what_is_only_rebuilt_needs_one_slot(tmp_path: Path) -> None:
    with stripe_of(tmp_path, "2+1", SIZES) as stripe:
        stripe.protect(4)
        version = stripe.protect(5)
        before = _data_of(stripe, 1)
        assert len(list(stripe.area(1).glob("rank-*/slot-*"))) == 4
        stripe.keepers[1].end()
        stripe.start(1, slots=1)
        stripe.join()
        assert [answer.get("lost") for answer in stripe.rebuild(version)] == [[1]] * 3
        assert len(list(stripe.area(1).glob("rank-*/slot-*"))) == 2, "of two ranks"
        after = _data_of(stripe, 1)
        assert len(after) == 1, "one of them has no data"
        assert after < before
        assert stripe.states(version) == {"protected"}


def _data_of(stripe: Stripe, node: int) -> set[bytes]:
    return {sha256(path.read_bytes()).digest() for path in stripe.area(node).glob("rank-*/slot-*/*.safetensors")}


def test_f11_more_losses_than_the_code_covers_are_refused_by_all_and_change_nothing(tmp_path: Path) -> None:
    with stripe_of(tmp_path, "2+1", SIZES) as stripe:
        version = stripe.protect(4)
        for node in (0, 2):
            stripe.lose(node)
        stripe.join()
        survivor = stripe.digests(version)
        facts = [answer["fact"] for answer in stripe.rebuild(version)]
        assert all("2 parts are lost or corrupt, but 1 parity parts make up for 1" in fact for fact in facts)
        assert stripe.digests(version) == survivor
        assert not any(held_by(stripe.area(0), rank) for rank in stripe.ranks[0])
        stripe.protect(5)


def test_the_snapshot_before_can_be_rebuilt_while_the_next_is_written(tmp_path: Path) -> None:
    with stripe_of(tmp_path, "2+1", SIZES) as stripe:
        stripe.protect(4)
        version = stripe.protect(5)
        whole = stripe.digests(version)
        stripe.take(6, nodes=(0, 1))  # the ranks of node 2 died before they had theirs
        stripe.lose(2)
        stripe.join()
        assert stripe.digests(version) != whole
        assert [answer.get("lost") for answer in stripe.rebuild(version)] == [[2]] * 3
        assert stripe.digests(version) == whole


def test_f19_f20_flipped_bytes_of_data_and_of_parity_are_repaired(tmp_path: Path) -> None:
    with stripe_of(tmp_path, "2+1", SIZES) as stripe:
        version = stripe.protect(4)
        whole = stripe.digests(version)
        (held,) = held_by(stripe.area(0), 0)
        files = SlotFiles.of(stripe.area(0), 0, held.number)
        parity = next(stripe.area(1).glob("parity-*/parity"))
        before = parity.read_bytes()
        for file, at in ((files.data, 0), (files.data, MIB + 1), (parity, 77)):
            flip(file, at)
            stripe.join()
            (answer, *others) = stripe.rebuild(version)
            assert answer["lost"] == []
            assert answer["repaired"] == {"1" if file == parity else "0": 1}
            assert [one["repaired"] for one in others] == [answer["repaired"]] * 2
            assert stripe.digests(version) == whole
            assert parity.read_bytes() == before
        for file in (files.index, files.objects):
            flip(file, 3)
            stripe.join()
            assert stripe.rebuild(version)[0]["repaired"] == {"0": 1}
            assert stripe.digests(version) == whole


def test_a_damaged_record_of_parity_counts_as_a_lost_member(tmp_path: Path) -> None:
    with stripe_of(tmp_path, "2+1", SIZES) as stripe:
        version = stripe.protect(4)
        whole = stripe.digests(version)
        for name, at in (("record", 100), ("protected", 40)):
            flip(next(stripe.area(2).glob(f"parity-*/{name}")), at)
            stripe.join()
            assert [answer["lost"] for answer in stripe.rebuild(version)] == [[2]] * 3
            assert stripe.digests(version) == whole


def test_f6_a_keeper_that_dies_while_it_protects_leaves_snapshots_sealed_and_the_next_is_protected(
    tmp_path: Path,
) -> None:
    with stripe_of(tmp_path, "2+1", ((24 * MIB,),) * 3) as stripe:
        assert all(answer["ok"] for answer in stripe.join(bytes_per_s=4e6))  # slow enough to be met inside
        version = stripe.take(4)
        wait(lambda: all(list(stripe.area(node).glob("parity-*/parity")) for node in range(3)))
        assert stripe.states(version) == {"protecting"}
        stripe.lose(1, memory=False)
        wait(lambda: {held.state for node in (0, 2) for held in held_by(stripe.area(node), node)} == {"sealed"})
        assert "member" in _fact(stripe, 0)
        assert not any(protected_in(stripe.area(node)) for node in range(3))
        stripe.join()
        assert stripe.states(version) == {"sealed"}  # also that of the keeper that found it
        stripe.protect(5)
        assert standing_in(stripe.area(0)).is_protected  # type: ignore[union-attr]


@pytest.mark.parametrize("memory", [False, True], ids=["a keeper", "a second node"])
def test_f30_a_second_loss_during_a_rebuild_is_survived_by_rebuilding_once_more(tmp_path: Path, memory: bool) -> None:
    with stripe_of(tmp_path, "1+2", ((6 * MIB,),) * 3) as stripe:
        version = stripe.protect(4)
        whole = stripe.digests(version)
        stripe.lose(0)
        stripe.join(bytes_per_s=1e6)
        told = protected_in(stripe.area(1))[0].values()
        clients = [stripe.client(node) for node in range(3)]
        for client in clients:
            client.tell("rebuild", epoch=stripe.epoch, version=version, protected=told)
        wait(lambda: _is_written(stripe, 0))
        stripe.lose(1, memory=memory)
        assert not held_by(stripe.area(0), 0)  # a part of it is none
        stripe.join()
        assert not answer_of(clients[0])["ok"]
        assert [answer["lost"] for answer in stripe.rebuild(version)] == [[0, 1] if memory else [0]] * 3
        assert stripe.digests(version) == whole


def test_a_keeper_without_the_sealed_snapshot_of_others_is_not_waited_for_after_a_new_place(tmp_path: Path) -> None:
    with stripe_of(tmp_path, "2+1", SIZES) as stripe:
        version = stripe.take(4, nodes=(0, 1))
        assert stripe.states(version) == {"protecting"}
        assert all(answer["ok"] for answer in stripe.join())
        assert stripe.states(version) == {"sealed"}
        stripe.protect(5)


def test_a_keeper_that_has_left_waits_for_nobody_and_keeps_what_it_can_help_with(tmp_path: Path) -> None:
    with stripe_of(tmp_path, "2+1", SIZES) as stripe:
        version = stripe.protect(3)
        one = stripe.take(4, nodes=(0,))
        assert stripe.states(one) == {"protecting"}
        assert stripe.client(0).ask("leave", WAIT_S)["ok"]
        assert stripe.states(one) == {"sealed"}
        assert version in [found.version for found in protected_in(stripe.area(0))]
        assert "epoch 1 has begun, 0 is over" in stripe.join(epoch=0)[0]["fact"]
        alone = stripe.take(5, nodes=(0,))
        assert stripe.states(alone) == {"sealed"}
        assert stripe.client(1).ask("leave", WAIT_S)["ok"]
        assert all(answer["ok"] for answer in stripe.join())
        stripe.protect(6)


def test_what_belongs_to_an_older_epoch_is_refused(tmp_path: Path) -> None:
    with stripe_of(tmp_path, "2+1", SIZES) as stripe:
        version = stripe.protect(4)
        assert "epoch 1 has begun, 0 is over" in stripe.join(epoch=0)[0]["fact"]
        client = stripe.client(0)
        told = protected_in(stripe.area(0))[0].values()
        client.tell("rebuild", epoch=0, version=version, protected=told)
        assert "is not that of this place" in answer_of(client)["fact"]
        stripe.epoch = 4
        stripe.join(nodes=(0,))  # the others are still in an older one: it is refused by them, and they go on alone
        stripe.take(5)
        wait(lambda: standing_in(stripe.area(0)) is not None and "generation" in _fact(stripe, 0))


def test_who_does_not_know_the_secret_gets_nothing(tmp_path: Path) -> None:
    with stripe_of(tmp_path, "1+1", SIZES[:2]) as stripe:
        assert "can be guessed" in stripe.join(secret="00")[0]["fact"]
        addresses = [(HOST, stripe.client(node).ask("listen", WAIT_S, host=HOST)["port"]) for node in range(2)]
        told = {"epoch": 9, "stripe": "stripe-0", "code": "1+1", "addresses": addresses, "bytes_per_s": None}
        for node, secret in enumerate(("5a" * 32, "5b" * 32)):
            answer = stripe.client(node).ask("join", WAIT_S, **told, member=node, ranks=[], secret=secret)
            assert answer["ok"]
            assert secret not in str(answer)


def test_f18_parity_without_room_is_refused_with_the_numbers_and_ranks_go_on(tmp_path: Path) -> None:
    with stripe_of(tmp_path, "1+1", SIZES[:2]) as stripe:
        for number in range(2):  # where the parity is to go nobody may write
            (stripe.area(1) / f"parity-{number}").write_text("in the way")
        version = stripe.take(4)
        wait(lambda: stripe.states(version) == {"sealed"})
        wait(lambda: standing_in(stripe.area(1)) is not None)
        assert "parity-" in _fact(stripe, 1)
        for number in range(2):
            (stripe.area(1) / f"parity-{number}").unlink()
        stripe.protect(5)


def test_a_stopped_keeper_is_given_up_when_the_others_take_a_new_place(tmp_path: Path) -> None:
    with stripe_of(tmp_path, "2+1", SIZES) as stripe:
        version = stripe.take(4, nodes=(0, 1))
        found = identity_in(stripe.area(2))
        assert found is not None
        os.kill(found.pid, signal.SIGSTOP)
        try:
            stripe.epoch += 1
            for node in (0, 1):
                order = {"epoch": stripe.epoch, "stripe": "stripe-0", "code": "1+1", "secret": "5a" * 32}
                ports = [stripe.client(one).ask("listen", WAIT_S, host=HOST)["port"] for one in (0, 1)]
                addresses = [(HOST, port) for port in ports]
                told = order | {"addresses": addresses, "member": node, "ranks": list(stripe.ranks[node])}
                assert stripe.client(node).ask("join", WAIT_S, **told, bytes_per_s=None)["ok"]
            assert stripe.states(version) == {"sealed"}
            stripe.take(5, nodes=(0, 1))
            wait(lambda: all(protected_in(stripe.area(node)) for node in (0, 1)))
        finally:
            os.kill(found.pid, signal.SIGCONT)


def test_parity_goes_into_the_buffer_that_protects_nothing_any_more(tmp_path: Path) -> None:
    with stripe_of(tmp_path, "1+1", SIZES[:2]) as stripe:
        for step in (4, 5, 6):
            stripe.protect(step)
            kept = sorted(one.version.step for one in protected_in(stripe.area(0)))
            assert kept == [step] if step == 4 else kept == [step - 1, step]
        found = free_buffer(stripe.area(0)).protected()
        assert found is not None
        assert found.version.step == 5


def _is_written(stripe: Stripe, node: int) -> bool:
    """Whether something has been rebuilt in the first slot of the only rank of a node."""
    files = SlotFiles.of(stripe.area(node), node, 0)
    return files.data.is_file() and any(files.data.read_bytes()[:4096])


def _fact(stripe: Stripe, node: int) -> str:
    found = standing_in(stripe.area(node))
    assert found is not None
    return found.text
