"""``python -m evermesh.fault.detectors [--gently]`` compiles the loops over records, so that no diagnosis has to.

Gently: at low priority, and by one process of a user at a time.
"""

import fcntl
import os
import sys
import tempfile
import time

from evermesh.fault.detectors import diagnose
from evermesh.fault.detectors.streaming import JobWatch
from evermesh.fault.detectors.summaries import RankWatch
from evermesh.fault.synthetic import JobShape, generate


def _is_alone() -> bool:
    path = os.path.join(tempfile.gettempdir(), f"evermesh-{os.getuid()}-detectors.lock")
    descriptor = os.open(
        path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
    )  # closed when this process ends
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _compile() -> None:
    started = time.monotonic()
    traces = generate(JobShape(dp=2, tp=2, pp=2, ranks_per_node=2)).traces
    diagnose(traces)
    JobWatch().join([RankWatch().summarise(trace) for trace in traces])
    print(f"the detectors are compiled ({time.monotonic() - started:.0f} s)")


if "--gently" in sys.argv:
    os.nice(19)
    if _is_alone():
        _compile()
else:
    _compile()
