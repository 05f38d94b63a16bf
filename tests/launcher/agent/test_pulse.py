"""What an agent sees of a worker from outside: real processes that compute, wait, are stopped, or are held by a debugger."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from evermesh.fault.process_state import ProcessState
from evermesh.launcher.agent.pulse import Pulse
from evermesh.launcher.agent.shared_memory import Slot

LOOK_S = 0.25
PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_DETACH = 0x4206, 0x4207, 17


@contextmanager
def process(code: str) -> Iterator[int]:
    """A process that has begun to run ``code``."""
    with subprocess.Popen(
        [sys.executable, "-c", f"import time\nprint(flush=True)\n{code}"], stdout=subprocess.PIPE
    ) as found:
        assert found.stdout
        found.stdout.readline()
        try:
            yield found.pid
        finally:
            found.kill()


def looked_at(pid: int, looks: int, pulse: Pulse | None = None) -> Pulse:
    """What so many looks at a rank show that writes nothing down."""
    pulse = pulse or Pulse()
    for _ in range(looks):
        pulse.look(Slot(1, pid, 7, 0.01, 0.01), time.monotonic())
        time.sleep(LOOK_S)
    return pulse


def test_a_rank_that_waits_is_idle_and_one_that_computes_is_not() -> None:
    with process("time.sleep(60)") as waits, process("while True: pass") as computes:
        assert looked_at(waits, 4).idle_s > 0.7
        assert looked_at(computes, 4).idle_s == 0.0


def test_of_a_stopped_rank_the_time_counts_until_it_goes_on() -> None:
    with process("while True: pass") as pid:
        os.kill(pid, signal.SIGSTOP)
        pulse = looked_at(pid, 4)
        assert 0.7 < pulse.stopped_s < 2.0
        os.kill(pid, signal.SIGCONT)
        assert looked_at(pid, 2, pulse).stopped_s == 0.0


def test_what_is_written_down_ends_the_silence() -> None:
    with process("time.sleep(60)") as pid:
        pulse = looked_at(pid, 3)
        assert pulse.idle_s > 0.4
        pulse.look(Slot(1, pid, 8, 0.01, 0.01), time.monotonic())
        assert pulse.idle_s == 0.0


def test_time_in_which_nobody_looked_counts_little() -> None:
    with process("time.sleep(60)") as pid:
        pulse = looked_at(pid, 1)
        pulse.look(Slot(1, pid, 7, 0.01, 0.01), time.monotonic() + 3600.0)
        assert pulse.idle_s == 0.5


def test_a_rank_that_a_debugger_holds_is_neither_stopped_nor_idle() -> None:
    seen: list[tuple[str, float, float]] = []

    def debug(pid: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.ptrace(PTRACE_SEIZE, pid, None, None):
            return
        libc.ptrace(PTRACE_INTERRUPT, pid, None, None)
        pulse = looked_at(pid, 4)
        state = ProcessState.of(pid)
        assert state is not None
        assert state.is_held
        assert not state.is_stopped
        seen.append((state.letter, pulse.stopped_s, pulse.idle_s))
        os.waitpid(pid, 0)
        libc.ptrace(PTRACE_DETACH, pid, None, None)

    with process("time.sleep(60)") as pid:
        thread = threading.Thread(target=debug, args=(pid,))  # whoever traces is a thread
        thread.start()
        thread.join()
    if not seen:
        pytest.skip("no process may be traced here")
    assert seen == [("t", 0.0, 0.0)]


def test_a_process_that_is_gone_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    with process("time.sleep(60)") as pid:
        pulse = looked_at(pid, 3)
    monkeypatch.setattr(ProcessState, "of", lambda _: None)
    pulse.look(Slot(1, pid, 7, 0.01, 0.01), time.monotonic())
    assert (pulse.idle_s, pulse.stopped_s) == (0.0, 0.0)
