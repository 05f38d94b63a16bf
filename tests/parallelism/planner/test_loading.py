"""What a process loads before workers are forked from it."""

import os
import subprocess
import sys

from evermesh.parallelism import CostModel, Layout, plan_batch
from evermesh.parallelism.planner.compiling import COMPILED, is_cached

PROGRAM = """
import os
from evermesh.parallelism.planner.loading import load_compiled
print(" ".join(sorted(load_compiled())), len(os.listdir("/proc/self/task")), sep=";")
"""


def test_loops_that_somebody_compiled_are_loaded_without_a_thread() -> None:
    """As in the warm process of a node, where numeric libraries have been told to start none."""
    plan_batch([100, 30, 20, 5], Layout(hdp=2, capacity=64), CostModel(token_s=1e-6, pair_s=1e-9))
    assert is_cached("filling") == COMPILED
    assert not is_cached("a module that has no loops")
    limits = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=os.environ | limits
    )
    found, tasks = done.stdout.strip().split(";")
    assert ("rings" in found.split()) == COMPILED
    assert tasks == "1"
