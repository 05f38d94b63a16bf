"""What ranks were doing, read from what they wrote down: real stacks of a real process."""

import subprocess
import sys
from pathlib import Path

from evermesh.launcher import Run
from evermesh.launcher.controller.stacks import stacks_of, told_stacks

PROGRAM = """
import faulthandler, os, signal, sys, threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
stacks = open(sys.argv[1], "a")
faulthandler.register(signal.SIGUSR1, stacks)
def waits_for_nobody():
    for generation in (3, 4):
        print(f"\\n2026-01-01 10:00:00 generation {generation}, rank 1: no step", file=stacks, flush=True)
        os.kill(os.getpid(), signal.SIGUSR1)
def trains():
    waits_for_nobody()
trains()
"""


def test_the_innermost_frames_of_the_thread_that_trains_are_told_for_the_attempt_that_was_ended(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.logs.mkdir()
    subprocess.run([sys.executable, "-c", PROGRAM, str(run.logs / "rank-1.stacks")], check=True)
    found = stacks_of(run, 4, 3)
    assert list(found) == [1]
    assert not found[1].waits
    assert [frame.split()[-1] for frame in found[1].frames] == ["waits_for_nobody", "trains", "<module>"]
    assert stacks_of(run, 5, 3) == {}
    assert told_stacks(found).splitlines()[1].startswith("  rank 1 was in <string>:9 waits_for_nobody < <string>:")


WAITS = """
2026-01-01 10:00:00 generation 1, rank 0: no step
Thread 0x0000000000000002 (most recent call first):
  File "/x/threading.py", line 1 in run

Thread 0x0000000000000001 (most recent call first):
  File "/x/lib/torch/distributed/distributed_c10d.py", line 3245 in all_reduce
  File "/x/trainer.py", line 10 in fit
"""
RING = """
2026-01-01 10:00:00 generation 1, rank 1: no step
Current thread 0x0000000000000001 (most recent call first):
  File "/x/evermesh/fault/recorder/native/tap.py", line 130 in wait
  File "{file}", line 2 in passed_on
"""


def test_ranks_that_waited_for_others_are_told_last(tmp_path: Path) -> None:
    run, source = Run(tmp_path), tmp_path / "ring.py"
    run.logs.mkdir()
    source.write_text("for work in works:\n    work.wait()\n")
    (run.logs / "rank-0.stacks").write_text(WAITS)
    (run.logs / "rank-1.stacks").write_text(RING.format(file=source))
    (run.logs / "rank-2.stacks").write_text(WAITS.replace("/x/lib/torch/distributed", "/x").replace("rank 0", "rank 2"))
    found = stacks_of(run, 1, 3)
    assert [found[rank].waits for rank in range(3)] == [True, True, False]
    assert [line.split()[1] for line in told_stacks(found).splitlines()[1:]] == ["2", "0", "1"]
