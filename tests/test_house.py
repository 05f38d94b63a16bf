"""The rules of the house that no linter knows."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("parallelism", "checkpoint", "fault", "runtime", "launcher")


def _imported(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


@pytest.mark.parametrize("room", ROOMS)
def test_no_import_runs_upwards(room: str) -> None:
    above = ROOMS[ROOMS.index(room) + 1 :]
    for file in (ROOT / room).rglob("*.py"):
        for module in _imported(file):
            assert not module.startswith(tuple(f"evermesh.{other}" for other in above)), f"{file} imports {module}"


@pytest.mark.parametrize(
    "module",
    [
        *(f"evermesh.{room}" for room in ROOMS),
        "evermesh.launcher.cli",
        "evermesh.launcher.config",
        "evermesh.runtime.config",
        "evermesh.runtime.data",
    ],
)
def test_packages_and_configuration_never_import_torch(module: str) -> None:
    program = f"import sys, {module}; print(sorted(m for m in sys.modules if m.split('.')[0] == 'torch')[:3])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_a_readme_with_one_diagram(room: str) -> None:
    text = (ROOT / room / "README.md").read_text()
    assert "```" in text


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_are_sorted_and_exist(room: str) -> None:
    import importlib

    module = importlib.import_module(f"evermesh.{room}")
    assert sorted(module.__all__) == list(module.__all__)
    for name in module.__all__:
        getattr(module, name)
