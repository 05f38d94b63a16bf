"""Launching a script: how long until its ranks run, and until a killed rank is replaced, next to torchrun.

Both launchers run the same programs by turns. torchrun restarts with ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``, without
which its second generation meets the store of the first and mostly hangs over gloo.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from tests.benchmarks.harness import Row, paired_row

START_ROUNDS = 7
RESTART_ROUNDS = 3
EVERMESH = [str(Path(sys.executable).with_name("evermesh")), "launch", "--workers", "2"]
TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]
PEER = "torchrun"

TRAIN = """
import os, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(16, 16))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
for step in range(10 if is_first else 1):
    optimizer.zero_grad()
    model(torch.ones(4, 16)).square().mean().backward()
    optimizer.step()
    if is_first and step == 5 and dist.get_rank() == 1:
        Path(sys.argv[1], "killed").write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
if dist.get_rank() == 0:
    Path(sys.argv[1], "stepped").write_text(str(time.monotonic()))
dist.barrier()
os._exit(0)  # under load torch 2.13 aborts now and then when gloo ends with the interpreter, whoever launched it
"""


def run() -> list[Row]:
    """Start-up of two ranks that do nothing, and recovery of two that train."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _start(EVERMESH, folder)  # fill the caches of the file system
        starts = [(_start(EVERMESH, folder), _start(TORCHRUN, folder)) for _ in range(START_ROUNDS)]
        (folder / "train.py").write_text(TRAIN)
        restarts = [(_restart(EVERMESH, folder), _restart(TORCHRUN, folder)) for _ in range(RESTART_ROUNDS)]
    rows = []
    for index, what, goal in ((0, "launch of 2 ranks of true, in all", 0.8), (1, "launch to the first exec", 0.3)):
        ours, theirs = [start[0][index] for start in starts], [start[1][index] for start in starts]
        rows.append(replace(paired_row(what, ours, "s", peer=PEER, peer_values=theirs), goal=goal))
    ours, theirs = [pair[0] for pair in restarts], [pair[1] for pair in restarts]
    rows.append(paired_row("SIGKILL of 1 of 2 gloo ranks to the next step", ours, "s", peer=PEER, peer_values=theirs))
    return rows


def _start(launcher: list[str], folder: Path) -> tuple[float, float]:
    """Seconds from the command to its end, and to the first rank's own program."""
    started_s = time.monotonic()
    subprocess.run([*launcher, "--no-python", "true"], check=True, cwd=folder, stderr=subprocess.DEVNULL)
    whole_s = time.monotonic() - started_s
    started_wall_s = time.time()
    done = subprocess.run(
        [*launcher, "--no-python", "date", "+%s.%N"],
        check=True,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return whole_s, min(map(float, done.stdout.split())) - started_wall_s


def _restart(launcher: list[str], folder: Path) -> float:
    """Seconds from the kill to the end of the next step of the next generation."""
    subprocess.run(
        [*launcher, "--max-restarts", "3", "train.py", str(folder)],
        check=True,
        cwd=folder,
        capture_output=True,
        timeout=120,
        env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"},
    )
    killed_s, stepped_s = (float((folder / name).read_text()) for name in ("killed", "stepped"))
    assert stepped_s > killed_s
    return stepped_s - killed_s
