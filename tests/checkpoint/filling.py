"""Saves on a disk that is too small. As a program: mounts a tiny tmpfs (in a namespace of its own) and saves there.

unshare -Urm python -m tests.checkpoint.filling MOUNTPOINT
"""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from evermesh.checkpoint import CheckpointNotSaved, latest
from evermesh.parallelism.collectives import Communicator
from tests.checkpoint.states import load_and_compare, save_step
from tests.cluster import run_ranks

TMPFS_BYTES = 2 << 20


def save_on_rank(rank: int, world_size: int, directory: str, limited: int | None) -> dict[str, Any]:
    """Save step 2 and return the numbers of the error; rank ``limited`` cannot write files above 100,000 bytes."""
    if rank == limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        save_step(Path(directory), 2, Communicator(dist.group.WORLD))
    except CheckpointNotSaved as error:
        names = sorted(path.name for path in Path(directory).iterdir())
        numbers = {"needed": error.bytes_needed, "free": error.bytes_free, "rank": error.rank, "errno": error.errno}
        return {"text": str(error), "names": names, **numbers}
    return {}


def main(mountpoint: str) -> None:
    """Fill a tmpfs of 2 MiB with two steps of 1.3 MB and print what every rank was told."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "none", mountpoint], check=True)
    save_step(Path(mountpoint), 1)
    answers = run_ranks(3, save_on_rank, mountpoint, None)
    path = latest(mountpoint)
    assert path is not None
    load_and_compare(path, 1, 2)
    print(json.dumps({"answers": answers, "latest": path.name}))


if __name__ == "__main__":
    main(sys.argv[1])
