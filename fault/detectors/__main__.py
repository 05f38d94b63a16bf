"""``python -m evermesh.fault.detectors`` compiles the loops over records, so that no diagnosis has to."""

import time

from evermesh.fault.detectors import diagnose
from evermesh.fault.detectors.streaming import JobWatch
from evermesh.fault.detectors.summaries import RankWatch
from evermesh.fault.synthetic import JobShape, generate

started = time.monotonic()
traces = generate(JobShape(dp=2, tp=2, pp=2, ranks_per_node=2)).traces
diagnose(traces)
JobWatch().join([RankWatch().summarise(trace) for trace in traces])
print(f"the detectors are compiled ({time.monotonic() - started:.0f} s)")
