"""``evermesh checkpoint prune`` first tells, then removes, and never the checkpoint to resume from."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evermesh.checkpoint import checkpoints
from evermesh.launcher.commands.checkpoint import app
from tests.checkpoint.states import save_step


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for step in (5, 10, 15, 20):
        save_step(tmp_path, step, keep=None)
    return tmp_path


def _steps(directory: Path) -> list[int]:
    return [found.step for found in checkpoints(directory)]


def test_prune_removes_nothing_until_asked(directory: Path) -> None:
    command = ["prune", str(directory), "--keep-last", "1", "--keep-every", "10"]
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 0, told.output
    assert "would remove 2 checkpoints" in told.output
    assert "nothing was removed" in told.output
    assert _steps(directory) == [5, 10, 15, 20]
    done = CliRunner().invoke(app, [*command, "--yes"])
    assert "removed 2 checkpoints" in done.output
    assert _steps(directory) == [10, 20]


def test_prune_tells_programs_what_it_frees(directory: Path) -> None:
    size = sum(file.stat().st_size for step in (5, 10, 15) for file in (directory / f"step-{step:08d}").iterdir())
    told = CliRunner().invoke(app, ["prune", str(directory), "--keep-last", "1", "--json"])
    answer = json.loads(told.output)
    assert answer == {
        "path": str(directory),
        "dry_run": True,
        "kept": [20],
        "removed": [5, 10, 15],
        "bytes_freed": size,
    }


def test_the_checkpoint_that_latest_names_stays_although_newer_ones_exist(directory: Path) -> None:
    (directory / "latest").write_text("step-00000010\n")
    CliRunner().invoke(app, ["prune", str(directory), "--keep-last", "1", "--yes"])
    assert _steps(directory) == [10]
