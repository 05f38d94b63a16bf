"""The command line, the supervision of a job's workers, and what a user sees of a run."""

from evermesh.launcher.attempt import AttemptResult, run_attempt
from evermesh.launcher.config import JobConfig
from evermesh.launcher.job_file import load_job, write_job
from evermesh.launcher.run_directory import Run, RunState

__all__ = ["AttemptResult", "JobConfig", "Run", "RunState", "load_job", "run_attempt", "write_job"]
