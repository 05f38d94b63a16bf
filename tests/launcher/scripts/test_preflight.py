"""Scripts on a machine that is not fit: its InfiniBand port is down, in files that a mount namespace shows for /sys."""

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from evermesh.fault import read_events
from tests.launcher.scripts.conftest import EVERMESH, Launcher
from tests.launcher.scripts.test_scripts import WAIT
from tests.processes import still_alive

PORT = "/sys/class/infiniband/mlx5_0/ports/1"
BROKEN = (
    f"mount -t tmpfs none /sys/class && mkdir -p {PORT} && echo '1: DOWN' > {PORT}/state"
    f" && echo '5: LinkUp' > {PORT}/phys_state && exec \"$@\""
)
APART = ["unshare", "-Urm", "sh", "-c", BROKEN, "sh"]


@pytest.fixture(autouse=True)
def _may_mount() -> None:
    done = subprocess.run([*APART, "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here (unshare -Urm): {done.stderr}")


@pytest.fixture
def broken(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> Launcher:
    """A launcher on a machine whose port is down, with the look that users get."""
    monkeypatch.setattr("tests.launcher.scripts.conftest.EVERMESH", [*APART, *EVERMESH])
    del launcher.variables["PET_PREFLIGHT"]
    return launcher


def test_a_script_on_a_machine_that_is_not_fit_is_ended_with_reason_and_way_out(broken: Launcher) -> None:
    done = broken.run("--workers", "2", "--max-restarts", "5", broken.script(WAIT))
    assert done.returncode == 1
    assert "is not fit for a job. InfiniBand mlx5_0:1: the port is DOWN (LinkUp). Way out: " in done.stderr
    assert done.stderr.endswith("Use another machine; --preflight off starts here anyway.\n")
    [folder] = (broken.folder / "logs").iterdir()
    assert [path.name for path in folder.glob("attempt_*")] == ["attempt_0"]
    assert [event.kind for event in read_events(folder / "events.jsonl")] == ["started", "finished"]


def test_a_script_that_is_done_before_the_look_is_not_refused_and_one_may_ask_for_no_look(broken: Launcher) -> None:
    assert broken.run("--no-python", "true").returncode == 0
    done = broken.run("--preflight", "off", broken.script("import time; time.sleep(1); print('ran')"))
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr


def test_the_other_machines_of_a_job_are_ended_too_and_told_which_is_not_fit(broken: Launcher, port: int) -> None:
    script = broken.script(WAIT)
    flags = ("--nnodes", "2", "--master-addr", "localhost", "--master-port", str(port))
    machines = [
        broken.start(*flags, "--node-rank", str(rank), "--preflight", preflight, script)
        for rank, preflight in enumerate(("off", "quick"))
    ]
    for machine in machines:
        _, errors = machine.communicate(timeout=60)
        assert machine.returncode == 1
        assert "is not fit for a job. InfiniBand mlx5_0:1: the port is DOWN" in errors


def test_a_fit_machine_trains_and_the_look_leaves_no_process(launcher: Launcher) -> None:
    del launcher.variables["PET_PREFLIGHT"]
    process = launcher.start(launcher.script(WAIT))
    launcher.wait_for("ready-0")
    time.sleep(1.0)
    assert process.poll() is None
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    assert still_alive(family, 2) == []


def test_the_look_of_a_launcher_that_is_killed_ends(launcher: Launcher) -> None:
    del launcher.variables["PET_PREFLIGHT"]
    process = launcher.start(launcher.script(WAIT))
    launcher.wait_for("ready-0")
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    assert still_alive(family, 5) == []


def test_what_the_process_says_is_json_by_line(tmp_path: Path) -> None:
    command = [*EVERMESH[:1], "-m", "evermesh.fault.health"]
    spec = json.dumps({"places": {"the logs": str(tmp_path)}, "every_s": None, "is_full": False})
    done = subprocess.run([*command, spec], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"at", "gpus", "verdicts"} == {key for line in told for key in line}
