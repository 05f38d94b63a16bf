"""The keeper as a process: what it takes, refuses, survives and leaves behind."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import xxhash

from evermesh.fault.process_state import ProcessState
from evermesh.fault.snapshot.keeper.area import AgentMark, Area, area_of, identity_in, sweep
from evermesh.fault.snapshot.keeper.client import KeeperClient, KeeperLost
from evermesh.fault.snapshot.keeper.process import KeeperProcess
from evermesh.fault.snapshot.keeper.slots import HEADER_BYTES, Header, Record, SlotFiles, held_by
from tests.fault.snapshot.keepers import WAIT_S, keeper_of, kill_keeper

BYTES = (1 << 20) + 4096


def _reserve(client: KeeperClient, generation: int = 1, rank: int = 0, data_bytes: int = BYTES) -> dict[str, Any]:
    told = {"generation": generation, "rank": rank, "shard_map": "a" * 32, "data_bytes": data_bytes}
    return client.ask("reserve", WAIT_S, **told, tensor_bytes=data_bytes, extents={})


def _fill(area: Path, number: int, step: int, rank: int = 0) -> bytes:
    """Write into a slot as a rank does."""
    files = SlotFiles.of(area, rank, number)
    header = Header(files.header)
    header.begin(step)
    header.close()
    payload = random.Random(step).randbytes(BYTES)
    with files.data.open("r+b") as data:
        data.write(payload)
    files.objects.write_text(json.dumps({"objects": {}, "description": {}}))
    return payload


def _seal(client: KeeperClient, number: int, step: int, generation: int = 1) -> dict[str, Any]:
    return client.ask("seal", WAIT_S, generation=generation, rank=0, slot=number, step=step)


def _wait(holds: Any) -> None:
    until = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_sealed_slot_has_the_digests_of_its_bytes_and_survives_its_keeper(tmp_path: Path) -> None:
    with keeper_of(tmp_path) as keeper:
        client = KeeperClient(keeper.area)
        assert _reserve(client)["ok"]
        payload = _fill(keeper.area, 0, 7)
        assert held_by(keeper.area, 0) == []  # it is being written
        assert _seal(client, 0, 7)["ok"]
        (held,) = held_by(keeper.area, 0)
        assert (held.number, held.state, held.record.step, held.record.generation) == (0, "sealed", 7, 1)
        body = json.loads(SlotFiles.of(keeper.area, 0, 0).index.read_bytes().partition(b"\n")[2])
        expected = "".join(xxhash.xxh3_64_hexdigest(payload[at : at + (1 << 20)]) for at in range(0, BYTES, 1 << 20))
        assert body["checksums"]["rank-00000.safetensors"] == expected
        first = kill_keeper(keeper.area)
        _wait(lambda: not keeper.look() or (keeper.identity is not None and keeper.identity.pid != first))
        client = KeeperClient(keeper.area, WAIT_S)
        assert client.ask("hello", WAIT_S)["pid"] != first
        assert _reserve(client)["ok"]
        assert [held.record.step for held in held_by(keeper.area, 0)] == [7]
        assert SlotFiles.of(keeper.area, 0, 0).data.read_bytes() == payload


def test_what_belongs_to_an_older_attempt_is_refused(tmp_path: Path) -> None:
    with keeper_of(tmp_path) as keeper:
        old, new = KeeperClient(keeper.area), KeeperClient(keeper.area)
        assert _reserve(old, generation=1)["ok"]
        _fill(keeper.area, 0, 3)
        assert _reserve(new, generation=2)["ok"]
        assert "generation 1 is over" in _seal(old, 0, 3)["fact"]
        assert "generation 2 has begun" in _reserve(old, generation=1)["fact"]
        assert held_by(keeper.area, 0) == []
        assert _seal(new, 0, 3, generation=2)["ok"]


def test_a_slot_that_is_written_to_again_is_not_sealed_for_the_step_before(tmp_path: Path) -> None:
    with keeper_of(tmp_path) as keeper:
        client = KeeperClient(keeper.area)
        _reserve(client)
        _fill(keeper.area, 0, 3)
        _fill(keeper.area, 0, 4)
        assert "not for step 3" in _seal(client, 0, 3)["fact"]
        assert _seal(client, 0, 4)["ok"]
        assert "not for step 4" in _seal(client, 0, 4)["fact"]  # sealed already


def test_f21_any_byte_of_a_header_that_is_flipped_or_missing_leaves_the_other_slot(tmp_path: Path) -> None:
    with keeper_of(tmp_path) as keeper:
        client = KeeperClient(keeper.area)
        _reserve(client)
        for number, step in ((0, 5), (1, 6)):
            _fill(keeper.area, number, step)
            assert _seal(client, number, step)["ok"]
        header = SlotFiles.of(keeper.area, 0, 1).header
        whole = header.read_bytes()
        (newest,) = [held.record for held in held_by(keeper.area, 0) if held.number == 1]
        places = [*range(8), *range(64, 64 + len(newest.pack()))]
        for place in places:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << place % 8
            header.write_bytes(damaged)
            assert [held.record.step for held in held_by(keeper.area, 0)] == [5], place
        header.write_bytes(whole[:-1])
        assert [held.record.step for held in held_by(keeper.area, 0)] == [5]
        header.unlink()
        assert [held.record.step for held in held_by(keeper.area, 0)] == [5]
        header.write_bytes(whole)
        assert [held.record.step for held in held_by(keeper.area, 0)] == [5, 6]


def test_a_record_that_is_torn_is_none() -> None:
    record = Record(3, 2, 40, 1 << 30, 500, "f" * 16, "e" * 32)
    packed = record.pack()
    assert Record.unpack(packed.ljust(HEADER_BYTES, b"\0")) == record
    other = Record(3, 2, 41, 1 << 30, 500, "d" * 16, "e" * 32).pack()
    torn = [packed[:at] + other[at:] for at in range(1, len(packed)) if packed[:at] + other[at:] not in (packed, other)]
    assert len(torn) > 8
    assert all(Record.unpack(mixed) is None for mixed in torn)
    assert Record.unpack(b"") is None


def test_f18_memory_that_is_not_there_is_refused_with_the_numbers_and_nothing_stays_allocated(tmp_path: Path) -> None:
    with keeper_of(tmp_path) as keeper:
        client = KeeperClient(keeper.area)
        status = os.statvfs(keeper.area)
        free = status.f_bavail * status.f_frsize
        answer = _reserve(client, data_bytes=1 << 50)
        assert not answer["ok"]
        assert answer["needed"] == 1 << 50
        assert 0 < answer["free"] <= 2 * free
        assert "must stay free" in answer["fact"] or "No space left" in answer["fact"]
        assert not (keeper.area / "rank-00000").exists()
        assert _reserve(client)["ok"]  # it goes on


def test_f19_a_byte_that_rots_in_memory_is_found_by_scrubbing(tmp_path: Path) -> None:
    with keeper_of(tmp_path) as keeper:
        client = KeeperClient(keeper.area)
        _reserve(client)
        for number, step in ((0, 5), (1, 6)):
            _fill(keeper.area, number, step)
            _seal(client, number, step)
        assert client.ask("scrub", WAIT_S)["rotten"] == []
        with SlotFiles.of(keeper.area, 0, 1).data.open("r+b") as data:
            data.seek(BYTES - 1)
            last = data.read(1)[0]
            data.seek(BYTES - 1)
            data.write(bytes([last ^ 16]))
        assert client.ask("scrub", WAIT_S)["rotten"] == ["rank 0, step 6: MiB [1]"]
        assert [held.record.step for held in held_by(keeper.area, 0)] == [5]


def test_the_next_agent_does_not_wait_for_a_keeper_that_froze_with_its_node_and_has_what_it_held(
    tmp_path: Path,
) -> None:
    with keeper_of(tmp_path) as keeper:
        first = keeper.identity
        assert first is not None
        client = KeeperClient(keeper.area)
        _reserve(client)
        _fill(keeper.area, 0, 7)
        _seal(client, 0, 7)
        client.close()
        keeper.leave()
        os.kill(first.pid, signal.SIGSTOP)
        _wait(lambda: (state := ProcessState.of(first.pid)) is not None and state.is_stopped)
        with mock.patch.object(KeeperProcess, "_await_end", side_effect=AssertionError("it waited")):
            again = KeeperProcess(keeper.area, "launch", tmp_path / "again.log")
        assert not again.is_adopted
        assert not first.is_alive
        _wait(lambda: again.identity is not None)
        assert [held.record.step for held in held_by(keeper.area, 0)] == [7]
        again.end()


def test_f5_the_next_agent_adopts_a_keeper_of_its_launch_and_ends_one_of_another(tmp_path: Path) -> None:
    with keeper_of(tmp_path) as keeper:
        first = keeper.identity
        assert first is not None
        client = KeeperClient(keeper.area)
        _reserve(client)
        _fill(keeper.area, 0, 7)
        _seal(client, 0, 7)
        client.close()
        keeper.leave()  # as the kernel does when the agent is killed
        again = KeeperProcess(keeper.area, "launch", tmp_path / "again.log")
        assert again.is_adopted
        assert again.identity == first
        assert [held.record.step for held in held_by(keeper.area, 0)] == [7]
        again.leave()
        other = KeeperProcess(keeper.area, "another launch", tmp_path / "other.log")
        assert not other.is_adopted
        _wait(lambda: other.identity is not None)
        assert other.identity is not None
        assert other.identity.pid != first.pid
        assert held_by(keeper.area, 0) == []
        other.end()
        assert not keeper.area.exists()


def test_a_keeper_that_is_told_to_end_or_forgotten_leaves_nothing(tmp_path: Path) -> None:
    with keeper_of(tmp_path) as keeper:
        _reserve(KeeperClient(keeper.area))
        keeper.end()
        assert not keeper.area.exists()
        assert keeper.identity is None
    area = area_of(tmp_path, "node-1")
    forgotten = KeeperProcess(area, "launch", tmp_path / "log", idle_s=0.2)
    client = KeeperClient(area, WAIT_S)
    _reserve(client)
    time.sleep(0.6)
    assert area.exists()  # somebody is connected
    client.close()
    _wait(lambda: not (area / "keeper.json").exists())
    forgotten.leave()
    sweep()
    assert not area.exists()


def test_what_killed_ones_left_is_swept_unless_an_agent_wants_it(tmp_path: Path) -> None:
    area = area_of(tmp_path, "node-0")
    program = f"""
import os, signal, sys
from pathlib import Path
from evermesh.fault.snapshot.keeper.area import Area
area = Area(Path({str(area)!r}), "launch", "nonce")
area.make_room(0, 1 << 20)
print("made", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("made\n", -signal.SIGKILL), done.stderr
    mark = AgentMark(area)
    sweep()
    assert (area / "rank-00000").exists()
    mark.close()
    assert area in sweep()
    assert not area.exists()


def test_an_area_can_be_taken_while_others_sweep(tmp_path: Path) -> None:
    area, is_over = area_of(tmp_path, "node-0"), threading.Event()

    def sweep_on() -> None:
        while not is_over.wait(0.002):
            sweep()

    thread = threading.Thread(target=sweep_on)
    thread.start()
    try:
        for _ in range(300):
            AgentMark(area).close()
            Area(area, "launch", "nonce").close()
    finally:
        is_over.set()
        thread.join()
    sweep()
    assert not area.exists()


def test_who_sweeps_is_waited_for(tmp_path: Path) -> None:
    area = area_of(tmp_path, "node-0")
    swept = AgentMark(area)  # the lock that a sweeper takes for a moment
    later = threading.Timer(0.1, swept.close)
    later.start()
    AgentMark(area).close()
    later.join()
    sweep()
    assert not area.exists()


def test_only_one_keeper_holds_an_area_and_only_in_a_folder_of_its_user(tmp_path: Path) -> None:
    held = Area(area_of(tmp_path, "node-0"), "launch", "nonce")
    with pytest.raises(BlockingIOError):
        Area(held.path, "launch", "nonce")
    held.path.chmod(0o755)
    os.close(held._lock)
    with pytest.raises(PermissionError, match="alone"):
        Area(held.path, "launch", "nonce")
    held.path.chmod(0o700)
    Area(held.path, "launch", "nonce").close()
    assert not held.path.exists()


def test_without_a_keeper_nobody_waits(tmp_path: Path) -> None:
    began_s = time.monotonic()
    with pytest.raises(KeeperLost, match="no keeper listens"):
        KeeperClient(area_of(tmp_path, "node-9"))
    assert time.monotonic() - began_s < 1
    assert identity_in(area_of(tmp_path, "node-9")) is None


def test_the_keeper_starts_without_torch_numpy_and_pydantic() -> None:
    program = """
import sys
import threading
import evermesh.fault.snapshot.keeper.keeper, evermesh.fault.snapshot.keeper.process
print([name for name in ("torch", "numpy", "pydantic") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_keeper_that_is_stopped_is_killed_and_another_finds_what_it_held_but_one_that_goes_on_in_time_is_kept(
    tmp_path: Path,
) -> None:
    with keeper_of(tmp_path) as keeper:
        client = KeeperClient(keeper.area)
        assert _reserve(client)["ok"]
        _fill(keeper.area, 0, 7)
        assert _seal(client, 0, 7)["ok"]
        first = keeper.identity
        assert first is not None
        _look_for(keeper, 2.0)
        assert [told["step"] for told in keeper.told["snapshots"]] == [7]
        os.kill(first.pid, signal.SIGSTOP)
        _look_for(keeper, 1.0)
        os.kill(first.pid, signal.SIGCONT)
        _look_for(keeper, 2.0)
        assert keeper.identity == first
        os.kill(first.pid, signal.SIGSTOP)
        _wait(lambda: _looks_lost(keeper))
        assert keeper.lost_because.startswith("it was stopped for 2.")
        assert not first.is_alive
        assert KeeperClient(keeper.area, WAIT_S).ask("hello", WAIT_S)["pid"] != first.pid
        assert [held.record.step for held in held_by(keeper.area, 0)] == [7]


def _look_for(keeper: KeeperProcess, seconds: float) -> None:
    """As an agent does, while it is expected to live."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert keeper.look(), keeper.lost_because
        time.sleep(0.1)


def _looks_lost(keeper: KeeperProcess) -> bool:
    time.sleep(0.1)
    return not keeper.look()
