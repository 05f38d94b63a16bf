"""What a rank finds in its environment: torchrun's variables, and ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evermesh.launcher.scripts.nodes import Node, Place
from evermesh.launcher.scripts.options import ScriptJob


def visible(slots: Sequence[int], environment: Mapping[str, str]) -> str:
    """``CUDA_VISIBLE_DEVICES`` for these of the GPUs that are visible already."""
    before = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return ",".join(before[slot] if before else str(slot) for slot in slots)


@dataclass(frozen=True, slots=True)
class Start:
    """One generation: one life of all ranks."""

    generation: int
    """0 for the first; counted over the whole job."""
    reason: str
    """Why there was a restart; empty for the first generation."""
    nodes: tuple[Node, ...]
    """Those of this machine."""
    master_port: int
    logs: Path
    """``attempt_GENERATION/LOCAL_RANK``, as torchrun names them, in a folder per node where there are several here."""

    @property
    def progress(self) -> Path:
        """The file in which a script may report progress; one for the whole job."""
        return self.logs / "progress"

    def folder(self, place: Place) -> Path:
        """Logs of a rank: ``stdout.log``, ``stderr.log`` and ``error.json``."""
        node = self.logs / f"node_{place.node.number}" if len(self.nodes) > 1 else self.logs
        return node / f"attempt_{self.generation}" / str(place.local_rank)

    def error_file(self, place: Place) -> Path:
        """Where ``torch.distributed.elastic``'s ``@record`` writes an exception."""
        return self.folder(place) / "error.json"


def rank_environment(job: ScriptJob, start: Start, place: Place, inherited: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of one rank.

    ``TORCHELASTIC_USE_AGENT_STORE`` is False: rank 0 hosts the store. It dies with its generation, so that no restart
    meets the keys of the one before.
    """
    rank, node = str(place.rank), place.node
    environment = dict(inherited)
    if sum(here.workers for here in start.nodes) > 1:  # as torchrun: a thread per core each would overload the machine
        environment.setdefault("OMP_NUM_THREADS", "1")
    environment.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    environment |= {
        "RANK": rank,
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(node.world_size),
        "LOCAL_WORLD_SIZE": str(node.workers),
        "GROUP_RANK": str(node.number),
        "GROUP_WORLD_SIZE": str(node.count),
        "ROLE_NAME": job.role,
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": str(node.world_size),
        "MASTER_ADDR": job.where.master_addr,
        "MASTER_PORT": str(start.master_port),
        "TORCHELASTIC_RESTART_COUNT": str(start.generation),
        "TORCHELASTIC_MAX_RESTARTS": str(job.max_restarts),
        "TORCHELASTIC_RUN_ID": job.run_id,
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCHELASTIC_ERROR_FILE": str(start.error_file(place)),
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        "EVERMESH_GENERATION": str(start.generation),
        "EVERMESH_RESTART_REASON": start.reason,
        "EVERMESH_PROGRESS_FILE": str(start.progress),
    }
    if job.slots is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible(job.slots, inherited)
    if job.virtual_local_rank:
        environment |= {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": visible([place.local_rank], environment)}
    return environment
