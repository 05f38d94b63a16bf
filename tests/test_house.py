"""The rules of the house that no linter knows."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("parallelism", "checkpoint", "fault", "runtime", "deploy", "launcher")


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


_WITHOUT_TORCH = (
    *(f"evermesh.{room}" for room in ROOMS),
    "evermesh",
    "evermesh.fault.recorder.area",
    "evermesh.fault.recorder.in_scripts",
    "evermesh.fault.recorder.native.building",
    "evermesh.fault.recorder.reader",
    "evermesh.fault.cluster.store",
    "evermesh.fault.detectors",
    "evermesh.fault.health",
    "evermesh.fault.health.looking",
    "evermesh.fault.isolation.deciding",
    "evermesh.fault.recorder.files",
    "evermesh.fault.snapshot.coding",
    "evermesh.fault.snapshot.stripes",
    "evermesh.launcher.agent.agent",
    "evermesh.launcher.agent.worker",
    "evermesh.launcher.cli",
    "evermesh.launcher.config",
    "evermesh.launcher.layouts",
    "evermesh.launcher.controller.api",
    "evermesh.launcher.doctor.recorder",
    "evermesh.launcher.doctor.sections",
    "evermesh.launcher.operations",
    "evermesh.launcher.snapshot_plan",
    "evermesh.launcher.traffic_report",
    "evermesh.launcher.placement.ray",
    "evermesh.parallelism.calibration",
    "evermesh.parallelism.fabric.settings",
    "evermesh.parallelism.layout.switching",
    "evermesh.runtime.advice",
    "evermesh.runtime.config",
    "evermesh.runtime.memory",
    "evermesh.runtime.model.config",
    "evermesh.runtime.data",
    "evermesh.runtime.model.families",
    "evermesh.runtime.own_model",
)


def test_packages_and_configuration_never_import_torch() -> None:
    program = f"""
import importlib, sys
for module in {_WITHOUT_TORCH!r}:
    importlib.import_module(module)
    if "torch" in sys.modules:
        print(module)
        break
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not done.stdout, f"{done.stdout.strip()} imports torch"


_COMMUNICATES = re.compile(
    r"torch\.distributed\.(nn|_functional_collectives|_symmetric_memory)\b"
    r"|torch\.distributed\.(\w+\.)*_?(all_|reduce|broadcast|scatter|gather|i?send|i?recv|batch_isend|barrier|monitored|P2POp)"
)


def _names_used(file: Path) -> set[str]:
    """Full names of all imports, and of all attributes of imported modules."""
    tree = ast.parse(file.read_text())
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    heads = {name: name.split(".")[0] for name in used}
    return _imported(file) | {bound.get(heads[name], heads[name]) + name[len(heads[name]) :] for name in used}


@pytest.mark.parametrize("room", ROOMS)
def test_only_the_tap_communicates(room: str) -> None:
    found = {
        str(file.relative_to(ROOT))
        for file in (ROOT / room).rglob("*.py")
        if any(_COMMUNICATES.match(name) for name in _names_used(file))
    }
    assert found == ({"parallelism/collectives.py"} if room == "parallelism" else set())


@pytest.mark.parametrize(
    "line",
    [
        "import torch.distributed as d\nd.all_reduce(x)",
        "from torch import distributed\ndistributed.isend(x, 1)",
        "import torch\ntorch.distributed.broadcast_object_list(x)",
        "from torch.distributed import all_gather_into_tensor as gather",
        "from torch.distributed.distributed_c10d import barrier",
        "import torch.distributed.nn.functional",
        "from torch.distributed import _functional_collectives as f",
    ],
)
def test_a_way_around_the_tap_is_found(line: str, tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(line)
    assert any(_COMMUNICATES.match(name) for name in _names_used(tmp_path / "file.py"))


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
