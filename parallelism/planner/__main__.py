"""``python -m evermesh.parallelism.planner`` compiles the planner's loops, so that no job has to."""

import time

from evermesh.parallelism.planner.loading import compile_all

started = time.monotonic()
compile_all()
print(f"the planner is compiled ({time.monotonic() - started:.0f} s)")
