"""What workers run in the tests of the launcher; imports no torch."""

import ctypes
import os
import signal
import time
from typing import Any

from evermesh.launcher.agent.worker import Worker
from evermesh.parallelism.errors import EvermeshError


def succeed(worker: Worker, *, steps: int = 3) -> dict[str, Any]:
    """Report some steps from rank 0 and return."""
    for step in range(steps if worker.rank == 0 else 0):
        worker.report({"step": step})
    print(f"rank {worker.rank} was here")
    return {"rank": worker.rank, "threads": os.environ.get("OMP_NUM_THREADS")}


def wait_for_stop(worker: Worker, *, look: bool = False) -> dict[str, Any]:
    """Run until asked to stop; with ``look``, write first what this process is doing."""
    if look:
        os.kill(os.getpid(), signal.SIGUSR1)
    worker.report({"pid": os.getpid()})
    while worker.asked() != "stop":
        time.sleep(0.02)
    return {"reason": "asked"}


def first_error_wins(worker: Worker) -> None:
    """Rank 2 fails; every other rank notices it earlier than rank 2 says so."""
    if worker.rank == 2:
        time.sleep(0.6)
        raise EvermeshError("the disk of rank 2 is full: 0 bytes left. Free some.")
    raise RuntimeError("[pair.cc:534] Connection reset by peer")


def programming_error(worker: Worker) -> None:
    """Rank 1 has a bug; rank 0 waits for it forever."""
    if worker.rank == 1:
        time.sleep(0.5)
        raise KeyError("no such thing")
    time.sleep(3600)


def killed(worker: Worker) -> None:
    """Rank 1 dies of a signal, rank 0 only sees the connection."""
    if worker.rank == 1:
        print("last words of rank 1", flush=True)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:1234")


def stopped(worker: Worker) -> None:
    """Rank 1 is stopped, rank 0 waits for it in vain."""
    if worker.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)  # when it is woken to be ended
    raise RuntimeError("[unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete")


def hold_the_interpreter_lock(worker: Worker) -> None:
    """Wait in native code as the rendezvous of torch does: no other thread of the process can run."""
    worker.report({})
    ctypes.PyDLL(None).sleep(600)


def meet(worker: Worker) -> dict[str, Any]:
    """Say in the store that this rank is there."""
    return {"arrived": worker.store(30.0).add("arrived", 1)}


def stop_after_7(worker: Worker) -> None:
    """Finish seven steps, then stop as if wedged."""
    worker.beat(7, 0.5, 0.25)
    worker.reach("sum")
    worker.report({})
    os.kill(os.getpid(), signal.SIGSTOP)
