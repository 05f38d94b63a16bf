"""Snapshots out of the memory of all nodes, over TCP: what any number of ranks gets is what was saved, or nothing."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from evermesh.checkpoint import Box, CheckpointCorrupt, Shard, ShardMap, TensorShards, load
from evermesh.fault.snapshot.choosing import Version, complete_versions
from evermesh.fault.snapshot.handshake import Address, listen
from evermesh.fault.snapshot.keeper.area import area_of
from evermesh.fault.snapshot.keeper.layouts import Group, groups_in, write_layout
from evermesh.fault.snapshot.keeper.process import KeeperProcess
from evermesh.fault.snapshot.keeper.serving import MOST_BYTES
from evermesh.fault.snapshot.keeper.slots import Held, SlotFiles, held_by
from evermesh.fault.snapshot.reachable import Memories, covers, from_json, to_json
from evermesh.fault.snapshot.remote import Keepers, KeeperUnreachable, RemoteKeeper
from tests.checkpoint import states
from tests.checkpoint.test_rules import ranks_of, tensors
from tests.cluster import run_ranks
from tests.fault.snapshot.keepers import keeper_of, kill_keeper
from tests.fault.snapshot.members import SECRET
from tests.fault.snapshot.test_snapshots import _take

NODES = (0, 0, 1, 1)
Nodes = dict[int, KeeperProcess]


@contextmanager
def _nodes(folder: Path, nodes: tuple[int, ...] = NODES) -> Iterator[Nodes]:
    with ExitStack() as stack:
        yield {
            node: stack.enter_context(keeper_of(folder, f"node-{node}", secret=SECRET)) for node in sorted(set(nodes))
        }


@contextmanager
def _taken(folder: Path) -> Iterator[tuple[Path, Nodes]]:
    """Keepers of two nodes, with the snapshots of steps 4 and 9 of four ranks, who have ended."""
    with _nodes(folder) as keepers:
        run_ranks(len(NODES), _take, str(folder), NODES, (4, 9), 1)
        yield folder, keepers


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Nodes]]:
    """For tests that leave it as it is."""
    with _taken(tmp_path_factory.mktemp("taken")) as found:
        yield found


def _keepers(nodes: Nodes, launch: str = "launch", secret: bytes = SECRET) -> Keepers:
    addresses = tuple(keeper.address for keeper in nodes.values() if keeper.address is not None)
    assert len(addresses) == len(nodes)
    return Keepers(addresses, launch, secret)


def _area(folder: Path, node: int | None) -> Path | None:
    return None if node is None else area_of(folder, f"node-{node}")


@pytest.mark.parametrize("at", [None, 0, 1, 7], ids=["outside", "node 0", "node 1", "a new node"])
def test_any_number_of_ranks_restores_from_the_memory_of_all_nodes(taken: tuple[Path, Nodes], at: int | None) -> None:
    folder, nodes = taken
    with Memories(_area(folder, at), _keepers(nodes)) as memories:
        kept, missing = memories.look()
        assert not missing
        assert len(kept) == 2
        assert from_json(to_json(kept)) == kept
        versions = memories.complete(kept)
        assert [version.step for version in versions] == [9, 4]
        for version in versions:
            for world_size in (1, 2, 3, 5):
                source = memories.source(kept, version)
                assert source.world_size == 4
                for result in states.load_and_compare(source, version.step, world_size):  # type: ignore[arg-type]
                    assert (result.objects, result.description) == ({"step": version.step}, {"model": "small"})
    data_bytes = sum(held.record.data_bytes for node in (0, 1) for held in _held(folder, node))
    of_others = sum(held.record.data_bytes for node in (0, 1) if node != at for held in _held(folder, node))
    assert 0 < of_others <= data_bytes
    assert of_others // 2 <= memories.bytes_received, "what is on no own node comes by TCP, at least once"
    if at in (0, 1):
        assert memories.bytes_received < 4 * 5 * data_bytes // 2, "and what is on the own node does not"


def _held(folder: Path, node: int) -> list[Held]:
    area = area_of(folder, f"node-{node}")
    return [held for rank in range(4) for held in held_by(area, rank)]


def test_one_byte_wrong_in_the_memory_of_another_node_is_found(taken: tuple[Path, Nodes]) -> None:
    folder, nodes = taken
    with Memories(_area(folder, 0), _keepers(nodes)) as memories:
        kept, _ = memories.look()
        newest, before = memories.complete(kept)
        area = nodes[1].area
        (held,) = (held for held in held_by(area, 3) if held.record.step == newest.step)
        files = SlotFiles.of(area, 3, held.number)
        for file, fact in ((files.data, "the checksum is wrong"), (files.index, "not what was saved")):
            content = bytearray(file.read_bytes())
            content[-50] ^= 1
            file.write_bytes(content)
            with pytest.raises(CheckpointCorrupt, match=fact):
                states.load_and_compare(memories.source(kept, newest), newest.step, 2)  # type: ignore[arg-type]
            content[-50] ^= 1
            file.write_bytes(content)
        states.load_and_compare(memories.source(kept, newest), newest.step, 2)  # type: ignore[arg-type]
        states.load_and_compare(memories.source(kept, before), before.step, 2)  # type: ignore[arg-type]


def test_what_was_written_over_meanwhile_is_refused_and_what_a_dead_keeper_had_is_gone(tmp_path: Path) -> None:
    with _taken(tmp_path) as (folder, nodes):
        _is_written_over(folder, nodes)
        _is_gone_with_its_keeper(folder, nodes)


def _is_written_over(folder: Path, nodes: Nodes) -> None:
    with Memories(None, _keepers(nodes)) as memories:
        kept, _ = memories.look()
        source = memories.source(kept, memories.complete(kept)[1])
        run_ranks(len(NODES), _take, str(folder), NODES, (12,), 2)  # a later attempt takes the older slot
        with pytest.raises(CheckpointCorrupt, match="no longer holds step 4 of attempt 1"):
            states.load_and_compare(source, 4, 2)  # type: ignore[arg-type]
        kept, _ = memories.look()
        assert memories.complete(kept)[0].generation == 2


def _is_gone_with_its_keeper(folder: Path, nodes: Nodes) -> None:
    keepers = _keepers(nodes)
    kill_keeper(nodes[1].area)
    with Memories(_area(folder, 0), keepers) as memories:
        kept, missing = memories.look()
        assert len(kept) == len(missing) == 1
        assert str(keepers.addresses[1]) in missing[0]
        assert memories.complete(kept) == []
    with Memories(_area(folder, 1), keepers) as memories:  # its files are there, for its own node
        kept, _ = memories.look()
        assert {part.record.rank for one in kept for part in one.parts} == {0, 1, 2, 3}
        assert [version.step for version in memories.complete(kept)] == [12, 9]
        states.load_and_compare(memories.source(kept, memories.complete(kept)[0]), 12, 3)  # type: ignore[arg-type]


def test_copies_on_nodes_that_are_left_make_up_for_one_that_is_gone(tmp_path: Path) -> None:
    with _nodes(tmp_path) as nodes:
        run_ranks(len(NODES), _take_replicated, str(tmp_path))
        kill_keeper(nodes[0].area)
        with Memories(None, _keepers({1: nodes[1]})) as memories:
            kept, _ = memories.look()
            (version,) = memories.complete(kept)
            got = torch.zeros(300, 1000)
            load(memories.source(kept, version), {"optimizer.moment": (Box((0, 0), (300, 1000)), got)})
            assert torch.equal(got, states.logical_state(7)["optimizer.moment"])


def _take_replicated(rank: int, world: int, folder: str) -> None:
    """Rows over the ranks of a node, copies on the other one."""
    from evermesh.fault.snapshot.snapshots import Keeping, Snapshots
    from tests.fault.snapshot.test_snapshots import _communicator, _until_over

    communicator = _communicator(NODES)
    halves = (Shard(Box((0, 0), (100, 1000)), (0, 2)), Shard(Box((100, 0), (200, 1000)), (1, 3)))
    shard_map = ShardMap({"optimizer.moment": TensorShards("float32", (300, 1000), halves)})
    whole = states.logical_state(7)["optimizer.moment"]
    own = whole[:100].clone() if rank % 2 == 0 else whole[100:].clone()
    keeping = Keeping(area_of(Path(folder), f"node-{NODES[rank]}"), 1)
    snapshots = Snapshots(keeping, shard_map, {"optimizer.moment": [own]}, communicator)
    snapshots.begin(7, {}, {})
    assert _until_over(snapshots, communicator) == "committed"
    snapshots.close()


@pytest.mark.parametrize(
    ("launch", "secret"), [("launch", b"another secret of a job"), ("another launch", SECRET)], ids=["secret", "launch"]
)
def test_nobody_reads_without_the_secret_and_of_another_launch(launch: str, secret: bytes, tmp_path: Path) -> None:
    with _nodes(tmp_path, (0,)) as nodes:
        keepers = _keepers(nodes, launch, secret)
        with Memories(None, keepers) as memories:
            kept, missing = memories.look()
        assert kept == []
        assert "cannot be read" in missing[0]
        assert secret.decode() not in f"{keepers!r}{missing[0]}"
        with Memories(None, _keepers(nodes)) as memories:
            assert len(memories.look()[0]) == 1, "others are served as before"


def test_whoever_does_not_know_the_secret_gets_no_request_from_us() -> None:
    heard = bytearray()

    def pretend(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            heard.extend(connection.recv(4096))
            connection.sendall(bytes(64))
            heard.extend(connection.recv(4096))

    with listen("127.0.0.1") as listener:
        thread = threading.Thread(target=pretend, args=(listener,))
        thread.start()
        keeper = RemoteKeeper(Address("127.0.0.1", listener.getsockname()[1]), "launch", SECRET)
        with pytest.raises(KeeperUnreachable, match="does not know the secret"):
            keeper.inventory()
        thread.join()
        keeper.close()
    assert len(heard) == 56, "the hello alone"


def test_requests_are_bounded_and_name_no_file_outside(tmp_path: Path) -> None:
    with _nodes(tmp_path, (0,)) as nodes:
        write_layout(nodes[0].area, Group(1, "ab" * 16, (0,), 1), b"x" * 10_000_000)
        assert groups_in(nodes[0].area) == [Group(1, "ab" * 16, (0,), 1)]
        (address,) = _keepers(nodes).addresses
        keeper = RemoteKeeper(address, "launch", SECRET)
        asked = {"what": "layout", "rank": 0, "version": [1, 0, "ab" * 16]}
        assert len(keeper.read_all(asked)) > 10_000_000
        assert len(keeper.read(asked, 5, 5 + MOST_BYTES)) == MOST_BYTES
        for start, stop in ((0, MOST_BYTES + 1), (7, 5), (-1, 5)):
            with pytest.raises(KeeperUnreachable, match="are not at most"):
                keeper.read(asked, start, stop)
        for version in ([1, 0, "../../../../etc/passwd"], [1, 0, "ab/../cd"], ["..", 0, "ab"], [1, 0, "a_b"]):
            with pytest.raises(KeeperUnreachable, match="ValueError"):
                keeper.read({**asked, "version": version}, 0, 10)
        for wrong in ({"what": "answer"}, {"what": "data"}, {"what": "data", "rank": 0, "slot": 0, "version": [1]}):
            with pytest.raises(KeeperUnreachable):
                keeper.read(wrong, 0, 10)
        with pytest.raises(KeeperUnreachable, match="no longer holds step 3 of attempt 1"):
            keeper.read({"what": "data", "rank": 0, "slot": 1, "version": [1, 3, "ab" * 16]}, 0, 10)
        assert len(keeper.inventory()["groups"]) == 1, "the connection goes on after a refusal"
        keeper.close()


def test_a_damaged_layout_is_no_layout(taken: tuple[Path, Nodes]) -> None:
    _, nodes = taken
    with Memories(None, _keepers(nodes)) as memories:
        kept, _ = memories.look()
        (version, _) = memories.complete(kept)
        before = {file: file.read_bytes() for keeper in nodes.values() for file in (keeper.area / "layouts").iterdir()}
        for file, content in before.items():
            file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        with pytest.raises(CheckpointCorrupt, match="its shard map cannot be read: it is not what was written"):
            memories.source(kept, version)
        assert memories.complete(memories.look()[0]) == []
        for file, content in before.items():
            file.write_bytes(content)


def _group(ranks: tuple[int, ...], generation: int = 1, world_size: int = 4) -> Group:
    return Group(generation, "a", ranks, world_size)


def test_a_snapshot_is_complete_with_all_ranks_or_with_copies_of_what_is_missing() -> None:
    groups = [_group((0, 1)), _group((2, 3))]
    one, two = Version(1, 4, "a"), Version(1, 9, "a")

    def never(version: Version, ranks: frozenset[int]) -> bool:
        return False

    assert complete_versions({one: range(4), two: range(4)}, groups, never) == [two, one]
    assert complete_versions({one: range(4), two: (0, 1, 2)}, groups, never) == [one]
    assert complete_versions({one: range(4)}, [_group((0, 1), generation=2), _group((2, 3), generation=2)], never) == []
    assert complete_versions({one: (0, 1)}, [_group((0, 1), world_size=2)], never) == [one]
    asked: list[frozenset[int]] = []

    def always(version: Version, ranks: frozenset[int]) -> bool:
        asked.append(ranks)
        return True

    assert complete_versions({two: (0, 1, 2)}, groups, always) == [two]
    assert asked == [{0, 1}], "rank 2 alone has not all that its node held"
    assert complete_versions({two: (0, 2)}, groups, always) == []


@settings(max_examples=150, deadline=None)
@given(tensors())
def test_what_ranks_cover_against_counting(tensor: TensorShards) -> None:
    shard_map = ShardMap({"x": tensor})
    ranks = [rank for rank in ranks_of(shard_map) if tensor.of_rank(rank)]
    assert covers(shard_map, list(ranks_of(shard_map)))
    listed = ShardMap({"x": replace(tensor, placement=tensor.shards)})
    for missing in ranks:
        there = [rank for rank in ranks_of(shard_map) if rank != missing]
        held = {region for rank in there for region in tensor.of_rank(rank)}
        is_all = held >= {shard.region for shard in tensor.shards}
        assert covers(listed, there) == is_all
        assert covers(shard_map, there) <= is_all, "never says that all is there when it is not"


def test_an_inventory_is_plain_json(taken: tuple[Path, Nodes]) -> None:
    _, nodes = taken
    keeper = RemoteKeeper(_keepers(nodes).addresses[0], "launch", SECRET)
    told = keeper.inventory()
    keeper.close()
    assert json.loads(json.dumps(told)) == told
    assert {record[0] for _, _, record in told["parts"]} == {0, 1}
