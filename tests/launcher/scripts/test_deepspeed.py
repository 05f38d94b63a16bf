"""A DeepSpeed script as its users write them: with its flags, its configuration file and its own checkpoints."""

import json
import os
import subprocess
from pathlib import Path

from tests.launcher.scripts.conftest import Launcher
from tests.launcher.scripts.test_scripts import TORCHRUN

TRAIN = """
    import argparse, os, signal
    from pathlib import Path
    import deepspeed.ops
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a C++ compiler, and a minute to build
    import deepspeed
    import torch

    parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--die", action="store_true")
    arguments = parser.parse_args()
    deepspeed.init_distributed("gloo")
    rank, restart = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    engine, *_ = deepspeed.initialize(args=arguments, model=model, model_parameters=model.parameters())
    _, found = engine.load_checkpoint("saved")
    for step in range((found or {}).get("step", 0), 5):
        torch.manual_seed(1000 * step + rank)
        x = torch.randn(4, 16)
        loss = (engine(x) - x.sum(1, keepdim=True)).square().mean()
        engine.backward(loss)
        engine.step()
        with Path(f"losses-{rank}").open("a") as file:
            file.write(f"{restart} {step} {loss.item()!r}\\n")
        engine.save_checkpoint("saved", client_state={"step": step + 1})
        torch.distributed.barrier()  # every rank has its part of the checkpoint
        if arguments.die and restart == "0" and step == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    assert arguments.local_rank == int(os.environ["LOCAL_RANK"])  # DeepSpeed sets it
    torch.distributed.barrier()
    os._exit(0)  # see the script of test_scripts.py
"""
CONFIG = {
    "train_batch_size": 8,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
}
FLAGS = ("--deepspeed", "--deepspeed_config", "ds.json")


def losses(folder: Path, rank: int) -> list[tuple[int, int, float]]:
    """Restart, step and loss, in the order in which they were written."""
    lines = [line.split() for line in (folder / f"losses-{rank}").read_text().splitlines()]
    return [(int(restart), int(step), float(loss)) for restart, step, loss in lines]


def test_a_deepspeed_script_goes_on_from_its_checkpoint_after_kill_9_with_the_losses_of_torchrun(
    launcher: Launcher,
) -> None:
    launcher.variables |= {"TORCH_EXTENSIONS_DIR": str(launcher.folder / "extensions"), "DS_ACCELERATOR": "cpu"}
    script, other = launcher.script(TRAIN), launcher.folder / "torchrun"
    other.mkdir()
    for folder in (launcher.folder, other):
        (folder / "ds.json").write_text(json.dumps(CONFIG))
    theirs = subprocess.Popen(
        [*TORCHRUN, "--standalone", "--nproc-per-node", "2", str(launcher.folder / script), *FLAGS],
        cwd=other,
        env=os.environ | launcher.variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    launcher.started.append(theirs)
    done = launcher.run("--workers", "2", "--max-restarts", "1", script, *FLAGS, "--die")
    assert done.returncode == 0, done.stderr
    assert "rank 1 was killed by SIGKILL; restart 1 of 1" in done.stderr
    _, errors = theirs.communicate(timeout=60)
    assert theirs.returncode == 0, errors
    for rank in range(2):
        found, expected = losses(launcher.folder, rank), losses(other, rank)
        assert [(restart, step) for restart, step, _ in found] == [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4)]
        assert [loss for *_, loss in found] == [loss for *_, loss in expected]
