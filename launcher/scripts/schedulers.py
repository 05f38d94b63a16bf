"""What the variables of schedulers say of the machines of a job; pure. Each of them is to start one launcher per machine."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from evermesh.launcher.scripts.errors import ScriptRefused


@dataclass(frozen=True, slots=True)
class Told:
    """Machines, as far as somebody tells of them."""

    nodes: int | None = None
    node_rank: int | None = None
    rank_from: str = ""
    """Who tells ``node_rank``."""
    master_addr: str | None = None
    master_port: int | None = None
    workers: int | None = None
    """Ranks of this machine, where no flag says how many."""
    slots: tuple[int, ...] | None = None
    """GPUs of this machine that the job may use; None: all."""


def told_by_scheduler(environ: Mapping[str, str]) -> Told:
    """What the first of SkyPilot, Slurm, Kubeflow and MPI says that started this launcher; nothing if none did.

    Raises:
        ScriptRefused: mpirun has started several launchers on this machine.
    """
    for ask in (_skypilot, _slurm, _kubeflow, _mpi):
        told = ask(environ)
        if told is not None:
            return told
    index = _number(environ, "JOB_COMPLETION_INDEX")
    return Told() if index is None else Told(node_rank=index, rank_from="JOB_COMPLETION_INDEX")


def _skypilot(environ: Mapping[str, str]) -> Told | None:
    rank, addresses = _number(environ, "SKYPILOT_NODE_RANK"), environ.get("SKYPILOT_NODE_IPS", "").split()
    if rank is None or not addresses:
        return None
    gpus = _number(environ, "SKYPILOT_NUM_GPUS_PER_NODE") or None
    return Told(len(addresses), rank, "SKYPILOT_NODE_RANK", addresses[0], workers=gpus)


def _slurm(environ: Mapping[str, str]) -> Told | None:
    """Of a job of several nodes. A step with one task on each of them also tells how many there are."""
    rank = _number(environ, "SLURM_NODEID")
    if rank is None or environ.get("SLURM_NNODES", "1") == "1":
        return None
    nodes, tasks = (_number(environ, f"SLURM_STEP_NUM_{what}") for what in ("NODES", "TASKS"))
    return Told(nodes if nodes == tasks else None, rank, "SLURM_NODEID", _first_host(environ))


def _kubeflow(environ: Mapping[str, str]) -> Told | None:
    """PyTorchJob and Volcano set these in every pod; so does a launcher in its ranks, but with LOCAL_RANK."""
    rank, nodes = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    if rank is None or nodes is None or "MASTER_ADDR" not in environ or "LOCAL_RANK" in environ:
        return None
    return Told(nodes, rank, "RANK", environ["MASTER_ADDR"], _number(environ, "MASTER_PORT"))


def _mpi(environ: Mapping[str, str]) -> Told | None:
    """Open MPI, and the hydra of MPICH and Intel MPI; they tell nobody where rank 0 is."""
    for rank_name, size_name, local_name in (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),
    ):
        rank, nodes, here = (_number(environ, name) for name in (rank_name, size_name, local_name))
        if rank is None or nodes is None:
            continue
        if (here or 1) > 1:
            raise ScriptRefused(
                f"mpirun has started {here} launchers on this machine ({local_name}), each of which would start all ranks "
                "of it. Start one per machine: mpirun --map-by ppr:1:node, or -ppn 1, and give --workers."
            )
        return Told(nodes, rank, rank_name, environ.get("MASTER_ADDR"), _number(environ, "MASTER_PORT"))
    return None


def _first_host(environ: Mapping[str, str]) -> str | None:
    """The first node of a Slurm job, which is its node 0: ``gpu003`` of ``gpu[003-006,9],login1``."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", nodes)
    return "".join(part or "" for part in found.groups()) if found else None


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else None
