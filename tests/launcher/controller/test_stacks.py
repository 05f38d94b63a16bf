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
    assert [frame.split()[-1] for frame in found[1]] == ["waits_for_nobody", "trains", "<module>"]
    assert stacks_of(run, 5, 3) == {}
    assert told_stacks(found).splitlines()[1].startswith("  rank 1: <string>:9 waits_for_nobody < <string>:")
