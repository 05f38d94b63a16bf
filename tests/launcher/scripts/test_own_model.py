"""The example of a model of one's own, as its readers run it."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.launcher.scripts.conftest import Launcher

EXAMPLE = Path(__file__).resolve().parents[3] / "docs" / "examples" / "own_model.py"
SMALL = ("--model", "qwen3", "--capacity", "256", "--batch-tokens", "1500", "--checkpoints", "saved")


def _losses(output: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"step +(\d+) loss ([\d.]+)", output)}


def test_the_example_trains_under_our_launcher_and_goes_on_in_one_process(launcher: Launcher) -> None:
    launcher.variables["HF_HUB_OFFLINE"] = "1"
    done = launcher.run("--workers", "2", str(EXAMPLE), *SMALL, "--steps", "3", timeout_s=150)
    assert done.returncode == 0, done.stderr
    trained = _losses(done.stdout)
    assert list(trained) == [1, 2, 3]
    assert trained[3] < trained[1], done.stdout
    assert " on 2;" in done.stdout, "no document was shared by both ranks"
    alone = subprocess.run(
        [sys.executable, str(EXAMPLE), *SMALL, "--steps", "4"],
        cwd=launcher.folder,
        env=os.environ | launcher.variables,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    assert list(_losses(alone.stdout)) == [4]
