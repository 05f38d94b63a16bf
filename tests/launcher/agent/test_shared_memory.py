"""The shared-memory area: reads are never torn, a full one is told with numbers, and killed agents leave nothing."""

import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from evermesh.launcher.agent.shared_memory import Board, SharedArea, Slot
from tests.launcher.test_full_disk import can_mount


@pytest.fixture
def area() -> Iterator[SharedArea]:
    with SharedArea(f"test-{uuid.uuid4().hex}", slots=3) as area:
        yield area


def test_what_is_left_is_that_of_the_file_system(area: SharedArea) -> None:
    status = os.statvfs(area.board)
    assert area.free_bytes == pytest.approx(status.f_bavail * status.f_frsize, abs=1 << 30)  # others write there too


def test_a_slot_is_read_as_it_was_written_and_the_others_stay_empty(area: SharedArea) -> None:
    writer, reader = Board(area.board), Board(area.board)
    writer.write(1, Slot(3, 4711, 12, 0.5, 0.25))
    assert reader.read(1) == Slot(3, 4711, 12, 0.5, 0.25)
    assert reader.read(0) == reader.read(2) == Slot(0, 0, 0, 0.0, 0.0)
    assert area.board.stat().st_mode & 0o777 == 0o600
    assert area.directory.stat().st_mode & 0o777 == 0o700


WRITE = """
import sys
from pathlib import Path
from evermesh.launcher.agent.shared_memory import Board, Slot
board = Board(Path(sys.argv[1]))
print("ready", flush=True)
number = 0
while True:
    number += 1
    board.write(0, Slot(number, number, number, float(number), float(number), float(number), number))
"""


def test_no_read_is_torn_while_another_process_writes_all_the_time(area: SharedArea) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITE, str(area.board)], stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout
            writer.stdout.readline()
            board, seen = Board(area.board), set[int]()
            for _ in range(100_000):
                slot = board.read(0)
                if slot is not None:
                    assert set(slot) == {slot.step}
                    seen.add(slot.step)
        finally:
            writer.kill()
    assert len(seen) > 1  # how many depends on the machine


def test_a_half_written_slot_is_not_read(area: SharedArea) -> None:
    board = Board(area.board)
    board.write(0, Slot(1, 2, 3, 4.0, 5.0))
    with area.board.open("r+b") as file:
        file.write((2).to_bytes(8, "little"))  # a writer that was stopped after its first bytes
    assert board.read(0) is None


@pytest.mark.parametrize("ending", ["close", "killed"])
def test_nothing_is_left_of_an_agent_not_even_of_a_killed_one(ending: str) -> None:
    name = f"test-{uuid.uuid4().hex}"
    program = f"""
import os, signal
from evermesh.launcher.agent.shared_memory import SharedArea
area = SharedArea({name!r}, 2)
print(area.directory, flush=True)
area.close() if {ending == "close"} else os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    directory = Path(done.stdout.strip())
    assert directory.is_dir() == (ending == "killed")
    with SharedArea(f"{name}-next", 1) as area:
        assert not directory.exists()
        assert area.board.is_file()


def test_the_area_of_a_living_agent_is_left_alone_and_made_again_when_something_else_removed_it(
    area: SharedArea,
) -> None:
    with SharedArea(f"test-{uuid.uuid4().hex}", slots=1):
        assert area.board.is_file()
    area.board.unlink()
    area.make()
    Board(area.board).write(2, Slot(1, 2, 3, 4.0, 5.0))
    with SharedArea(f"test-{uuid.uuid4().hex}", slots=1):
        assert area.board.is_file()


def test_threads_may_read_while_one_writes(area: SharedArea) -> None:
    board, torn = Board(area.board), list[Slot]()
    is_over = threading.Event()

    def read() -> None:
        while not is_over.is_set():
            slot = board.read(0)
            if slot is not None and len(set(slot)) > 1:
                torn.append(slot)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(20_000):
        board.write(0, Slot(number, number, number, float(number), float(number), float(number), number))
    is_over.set()
    reader.join()
    assert torn == []


FULL = """
import json, subprocess, sys
from evermesh.launcher.agent.shared_memory import Board, SharedArea, Slot
from evermesh.launcher.errors import SharedMemoryMissing
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", "/dev/shm"], check=True)
told = {}
try:
    SharedArea("too-large", slots=4096)
except SharedMemoryMissing as error:
    told["error"] = str(error)
told["left"] = __import__("os").listdir("/dev/shm")
with SharedArea("fits", slots=256) as area:
    try:
        open("/dev/shm/ballast", "wb").write(bytes(1 << 20))
    except OSError:
        pass
    board = Board(area.board)
    for place in range(256):
        board.write(place, Slot(1, 2, place, 0.0, 0.0))
    told["read"] = board.read(255).step
print(json.dumps(told))
"""


def test_no_room_is_an_error_with_the_numbers_and_what_was_reserved_can_be_written_when_all_is_full(
    tmp_path: Path,
) -> None:
    if not can_mount(tmp_path):
        pytest.skip("mounting a tmpfs in a user namespace is not permitted here (unshare -Urm)")
    command = ["unshare", "-Urm", sys.executable, "-c", FULL]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)  # SIGBUS would show
    told = json.loads(done.stdout)
    assert told["error"] == (
        "524288 bytes of shared memory cannot be had in /dev/shm (65,536 free): No space left on device. Make it "
        "larger (docker: --shm-size)."
    )
    assert told["left"] == []
    assert told["read"] == 255
