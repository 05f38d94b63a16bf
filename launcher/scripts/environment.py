"""What a rank finds in its environment: torchrun's variables, and ours."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from evermesh.launcher.scripts.options import ScriptJob


@dataclass(frozen=True, slots=True)
class Start:
    """One generation: one life of all ranks."""

    generation: int
    """0 for the first; counted over the whole job."""
    reason: str
    """Why there was a restart; empty for the first generation."""
    master_port: int
    folder: Path
    """Its logs: ``RANK/stdout.log``, ``stderr.log`` and ``error.json``."""
    progress: Path
    """The file in which a script may report progress; one for the whole job."""

    def error_file(self, local_rank: int) -> Path:
        """Where ``torch.distributed.elastic``'s ``@record`` writes an exception."""
        return self.folder / str(local_rank) / "error.json"


def rank_environment(job: ScriptJob, start: Start, local_rank: int, inherited: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of one rank.

    ``TORCHELASTIC_USE_AGENT_STORE`` is False: rank 0 hosts the store. It dies with its generation, so that no restart
    meets the keys of the one before.
    """
    world = str(job.workers)
    environment = dict(inherited)
    if job.workers > 1:  # as torchrun: several ranks, each with a thread per core, would overload the machine
        environment.setdefault("OMP_NUM_THREADS", "1")
    environment.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    environment |= {
        "RANK": str(local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_NAME": job.role,
        "ROLE_RANK": str(local_rank),
        "ROLE_WORLD_SIZE": world,
        "MASTER_ADDR": job.master_addr,
        "MASTER_PORT": str(start.master_port),
        "TORCHELASTIC_RESTART_COUNT": str(start.generation),
        "TORCHELASTIC_MAX_RESTARTS": str(job.max_restarts),
        "TORCHELASTIC_RUN_ID": job.run_id,
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCHELASTIC_ERROR_FILE": str(start.error_file(local_rank)),
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        "EVERMESH_GENERATION": str(start.generation),
        "EVERMESH_RESTART_REASON": start.reason,
        "EVERMESH_PROGRESS_FILE": str(start.progress),
    }
    return environment
