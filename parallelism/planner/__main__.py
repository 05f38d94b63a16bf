"""``python -m evermesh.parallelism.planner`` compiles the planner's loops, so that no job has to."""

import time

from evermesh.parallelism.planner.warm import warm_up

started = time.monotonic()
warm_up()
print(f"the planner is compiled ({time.monotonic() - started:.0f} s)")
