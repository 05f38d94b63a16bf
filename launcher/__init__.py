"""The command line, the supervision of a job's workers, and what a user sees of a run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evermesh.launcher.client import Client
    from evermesh.launcher.config import JobConfig
    from evermesh.launcher.following import JobResult
    from evermesh.launcher.job_file import load_job, write_job
    from evermesh.launcher.operations import launch_job, resume_job
    from evermesh.launcher.run_directory import Run, RunState

__all__ = ["Client", "JobConfig", "JobResult", "Run", "RunState", "launch_job", "load_job", "resume_job", "write_job"]

_HOMES = {
    "Client": "client",
    "JobConfig": "config",
    "JobResult": "following",
    "Run": "run_directory",
    "RunState": "run_directory",
    "launch_job": "operations",
    "load_job": "job_file",
    "resume_job": "operations",
    "write_job": "job_file",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for: a script is launched without most of this room."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
