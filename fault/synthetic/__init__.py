"""Records of jobs that never ran, with faults of every kind and what only looks like one."""

from evermesh.fault.synthetic.generating import SyntheticJob, generate
from evermesh.fault.synthetic.shape import Clock, JobShape

__all__ = ["Clock", "JobShape", "SyntheticJob", "generate"]
