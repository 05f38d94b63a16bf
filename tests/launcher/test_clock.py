"""F28: a wall clock that jumps while a job trains has no effect.

Time namespaces move only monotonic clocks, so every process of the job is lied to: a library that the dynamic loader
puts before libc adds an offset, which this test sets, to whatever tells the wall clock.
"""

import ast
import subprocess
from pathlib import Path

import pytest

from evermesh.runtime.telemetry import read_telemetry
from tests.launcher.jobs import clean_losses, launched

STEPS = 80
HOUR_S = 3600
SHIM = Path(__file__).with_name("clock_shim.c")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("shim") / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, SHIM, "-ldl"], check=True)
    return library


def set_clock(path: Path, offset_s: int) -> None:
    with path.open("r+b") as file:
        file.write(offset_s.to_bytes(8, "little", signed=True))


@pytest.mark.soak
def test_f28_a_clock_that_jumps_an_hour_forth_and_back_changes_nothing(
    job_file: Path, tmp_path: Path, shim: Path
) -> None:
    expected = clean_losses(job_file, STEPS, "nodes=2")
    clock = tmp_path / "clock"
    clock.write_bytes(bytes(8))
    with launched(
        job_file,
        f"train.steps={STEPS}",
        "nodes=2",
        "train.checkpoint.every=10",
        LD_PRELOAD=str(shim),
        EVERMESH_TEST_CLOCK=str(clock),
    ) as job:
        job.wait_training()
        for offset_s in (HOUR_S, -HOUR_S):
            set_clock(clock, offset_s)
            steps = len(job.losses)
            job.wait(lambda steps=steps: len(job.losses) > steps + 15)  # type: ignore[misc]
            status = job.client.status()
            assert [node.state for node in status.nodes] == ["ready", "ready"]
            assert status.generation == 1
        code, _, stderr = job.end()
        assert code == 0, stderr
        assert job.losses == expected
        assert job.run.state().attempt == 1
        assert not {"node cut off", "node lost", "failed"} & set(job.events)
        assert min(report.step_s for report in read_telemetry(job.run.telemetry)) > 0
        times = [entry.time_s for entry in job.journal]
        assert max(times) - min(times) > HOUR_S / 2  # the lie was believed


STAMPS = {
    ("launcher/controller/journal.py", "append"),
    ("launcher/controller/record.py", "Record"),
    ("launcher/controller/scribe.py", "begin"),
    ("launcher/controller/scribe.py", "end"),
    ("launcher/controller/__main__.py", "_refuse"),
    ("launcher/agent/worker.py", "log"),
    ("launcher/agent/worker_group.py", "write_stacks"),
}
"""Where the wall clock is read only to stamp what people read."""
ACROSS_JOBS = {
    ("launcher/controller/cluster_desk.py", "_exchange"),
    ("launcher/controller/degraded.py", "degrade"),
    ("launcher/controller/degraded.py", "degraded_for_s"),
    ("launcher/controller/isolation.py", "_add"),
    ("launcher/controller/isolation.py", "_decide"),
    ("launcher/controller/setting_aside.py", "leave"),
    ("launcher/controller/setting_aside.py", "look"),
}
"""Evidence and cordons are compared with those of other jobs and machines, over hours and days; shares that were degraded
with what an earlier controller wrote down, on another machine perhaps."""
TOGETHER = {("launcher/agent/watching.py", "_pause_s")}
"""All agents look at about the same moment; whatever the clock says, none waits for longer than a window."""
_WALL_CLOCKS = ("time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "now", "time.localtime", "time.gmtime")


def _readings(tree: ast.AST, place: str = "") -> set[str]:
    """Names of the functions or classes that read the wall clock."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        name = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) else place
        is_reference = isinstance(node, ast.Attribute) and ast.unparse(node) in _WALL_CLOCKS
        is_call = isinstance(node, ast.Call) and ast.unparse(node.func) in _WALL_CLOCKS
        found |= {name} if is_reference or is_call else set()
        found |= _readings(node, name)
    return found


def test_the_controller_and_agents_read_the_wall_clock_only_to_stamp_what_people_read() -> None:
    files = [file for room in ("controller", "agent") for file in (ROOT / "launcher" / room).rglob("*.py")]
    assert len(files) > 20
    found = {(str(file.relative_to(ROOT)), place) for file in files for place in _readings(ast.parse(file.read_text()))}
    assert found == STAMPS | ACROSS_JOBS | TOGETHER


@pytest.mark.parametrize(
    "text",
    ["def f():\n    t = time.time()", "class F:\n    t = field(default_factory=time.time)", "def f():\n    now()"],
)
def test_a_reading_of_the_wall_clock_is_found(text: str) -> None:
    assert _readings(ast.parse(text)) in ({"f"}, {"F"})
