"""Records of ranks that cannot answer: killed, stopped, or in a C call that holds the interpreter's lock."""

import ctypes
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from evermesh.fault.process_state import ProcessState
from evermesh.fault.recorder.reader import read_ring
from evermesh.fault.recorder.record import OPERATIONS
from tests.fault.recorder.recording import recording, rings, spec_in

_CONTEXT = multiprocessing.get_context("forkserver")
_SUMS = 30
_WAIT_S = 60.0


def _stuck(rank: int, folder: str, wanted: str, fate: str) -> None:
    """Some sums, after which rank 1 does not come to the next one."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    with recording(Path(folder), rank, 2, wanted):  # type: ignore[arg-type]
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
        for _ in range(_SUMS):
            dist.all_reduce(torch.ones(4))
        if rank == 1:
            (Path(folder) / "here").touch()
            if fate == "lock":
                ctypes.PyDLL(None).sleep(600)  # a call through PyDLL keeps the lock
            if fate == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.ones(4))


@pytest.mark.parametrize("wanted", ["python", "native"])
@pytest.mark.parametrize("fate", ["killed", "stopped", "lock"])
def test_all_records_of_a_rank_that_cannot_answer_are_read(
    fate: str, wanted: str, request: pytest.FixtureRequest
) -> None:
    if wanted == "native":
        request.getfixturevalue("native_tap")
    with rings() as folder:
        ranks = [_CONTEXT.Process(target=_stuck, args=(rank, str(folder), wanted, fate)) for rank in range(2)]
        for process in ranks:
            process.start()
        try:
            _wait_until(lambda: (folder / "here").exists() and _is_stuck(ranks[1], fate))
            if fate != "killed":  # the other one hears of a death
                _wait_until(lambda: len(_records(folder, 0)) == _SUMS + 1)
                last = _records(folder, 0)[-1]
                assert (OPERATIONS[last["operation"]], last["number"], last["ended_ns"]) == ("all_reduce", _SUMS, 0)
            records = _records(folder, 1)
            assert list(records["number"]) == list(range(_SUMS)), "all, up to the last one"
            assert (records["ended_ns"] > 0).all()
            if fate == "lock":
                beats = [read_ring(spec_in(folder, rank).path)[1].beat_ns for rank in range(2)]
                _wait_until(lambda: read_ring(spec_in(folder, 0).path)[1].beat_ns - beats[0] > 0.5e9)
                assert read_ring(spec_in(folder, 1).path)[1].beat_ns == beats[1], "no heartbeat without the lock"
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _is_stuck(process: Any, fate: str) -> bool:
    if fate == "killed":
        return process.exitcode is not None
    state = ProcessState.of(process.pid)
    return state is not None and state.letter == ("T" if fate == "stopped" else "S")


def _records(folder: Path, rank: int) -> Any:
    return read_ring(spec_in(folder, rank).path)[0].records


def _wait_until(holds: Any) -> None:
    until = time.monotonic() + _WAIT_S
    while not holds():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.05)
