"""``evermesh checkpoint repair``: lost files of a checkpoint with parity are there again, and the exit code tells."""

import json
from pathlib import Path

from tests.checkpoint.states import load_and_compare, save_step
from tests.launcher.test_cli import evermesh


def test_a_lost_file_is_told_repaired_and_there_again(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1, parity=1)
    content = (path / "rank-00000.safetensors").read_bytes()
    (path / "rank-00000.safetensors").unlink()
    told = evermesh("checkpoint", "verify", path)
    assert told.returncode == 1
    assert "missing file: rank-00000.safetensors: the file is missing; repairable" in told.stdout
    repaired = evermesh("checkpoint", "repair", path)
    assert repaired.returncode == 0
    assert "1 file written again; whole" in repaired.stdout
    assert (path / "rank-00000.safetensors").read_bytes() == content
    load_and_compare(path, 1, 2)


def test_what_cannot_be_repaired_is_told_as_json_with_exit_code_1(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    (path / "rank-00000.safetensors").unlink()
    told = evermesh("checkpoint", "repair", path, "--json")
    assert told.returncode == 1
    found = json.loads(told.stdout)
    assert found["repaired"] == []
    assert [(problem["kind"], problem["file"]) for problem in found["left"]] == [
        ("missing file", "rank-00000.safetensors")
    ]
