"""`evermesh records`: the collectives of ranks that cannot answer, of living and dead attempts, of ours and of any script."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from evermesh.checkpoint.background.memory import FOLDER
from evermesh.fault.recorder.area import rings_of
from tests.launcher.jobs import launched
from tests.launcher.scripts.conftest import Launcher
from tests.launcher.test_cli import evermesh

_ENDLESS = ("train.steps=100000", "train.checkpoint.every=null", "hang=off", "restarts=0", "workers=2")


@pytest.fixture(scope="module", autouse=True)
def _own_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


def _records(*arguments: str | Path) -> list[dict[str, Any]]:
    done = evermesh("records", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_ranks_of_a_job_show_what_they_do_while_one_is_stopped_and_after_all_were_killed(job_file: Path) -> None:
    with launched(job_file, *_ENDLESS, name="recorded") as job:
        stopped = psutil.Process(job.wait_training().ranks[1].pid)
        rings = [ring.path for ring in rings_of(job.run.directory)]
        assert len(rings) == 2
        assert all(ring.is_relative_to(FOLDER) for ring in rings)
        stopped.suspend()
        job.wait(
            lambda: any(
                one["is_open"] and one["began_s_ago"] > 0.5 for one in _records(job.run.directory)[0]["records"]
            )
        )
        first, second = _records(job.run.directory)
        assert (first["rank"], first["process"], second["process"]) == (0, "runs", "is stopped")
        assert first["tap"] in ("native", "python")
        assert first["phase"] == second["phase"] == "train"
        assert first["step"] >= 1
        waiting = [one for one in first["records"] if one["is_open"]]
        assert waiting
        assert all(one["group"]["ranks"] == [0, 1] for one in waiting)
        assert all(one["site"] for one in waiting), "the project's own communication says what it does"
        told = evermesh("records", job.run.directory, "--rank", "1").stdout
        assert f"rank 1 of 2 on node-0, process {stopped.pid} is stopped: step {second['step']}, train" in told
        assert "rank 0" not in told
        job.wait(lambda: evermesh("diagnose", job.run.directory).returncode == 1)  # it has lasted longer than steps do
        (finding,) = json.loads(evermesh("diagnose", job.run.directory, "--json").stdout)["findings"]
        assert finding["rank"] == 1
        assert "stopped" in finding["text"]
        for pid in job.pids.values():
            os.kill(pid, signal.SIGKILL)
        assert job.end()[0] == 1
        assert not any(ring.parent.exists() for ring in rings), "shared memory is given back"
        after = _records(job.run.directory)
        assert [one["process"] for one in after] == ["is gone", "is gone"]
        assert [one["num_records"] for one in after] == [first["num_records"], second["num_records"]]
        assert {one["sequence"] for one in after[0]["records"]} >= {one["sequence"] for one in waiting}


_SCRIPT = """
    import os, signal, sys, time
    import torch, torch.distributed as dist
    from torch import nn
    import sitecustomize
    open(f"{os.environ['RANK']}.site", "w").write(getattr(sitecustomize, "WHOSE", "nobody"))
    dist.init_process_group("gloo")
    model = nn.parallel.DistributedDataParallel(nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(1, 5):
        if (dist.get_rank(), step) == (1, 4):
            os.kill(os.getpid(), signal.SIGKILL)
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        dist.all_reduce(torch.ones(3))
"""


def test_a_script_that_knows_nothing_of_us_is_recorded_until_it_is_killed(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    (tmp_path / "sitecustomize.py").write_text("WHOSE = 'the user'\n")
    script = launcher.script(_SCRIPT)
    path = os.pathsep.join(filter(None, (str(tmp_path), *sys.path[:0], os.environ.get("PYTHONPATH", ""))))
    done = launcher.run("--workers", "2", script, timeout_s=120, PYTHONPATH=path)
    assert done.returncode == 1, done.stderr
    (logs,) = (tmp_path / "logs").iterdir()
    first, second = _records(logs, "--last", "100")
    assert [one["process"] for one in (first, second)] == ["is gone", "is gone"]
    assert second["step"] == 4, "the one under way"
    sums = [one for one in second["records"] if one["operation"] == "all_reduce" and one["num_bytes"] == 12]
    assert [one["step"] for one in sums] == [2, 3, 4], "the optimizer has stepped before"
    assert second["num_records"] == second["records"][-1]["sequence"]
    if second["tap"] == "python":
        assert sums[0]["site"].endswith("script.py:16")
    assert {(tmp_path / f"{rank}.site").read_text() for rank in range(2)} == {"the user"}, "the hidden module is there"
    assert not [ring for ring in rings_of(logs) if ring.path.is_relative_to(FOLDER)]


def test_without_recording_there_is_nothing_and_it_says_why(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    script = launcher.script("import os; assert 'EVERMESH_RINGS' not in os.environ")
    assert launcher.run("--no-record", script).returncode == 0
    (logs,) = (tmp_path / "logs").iterdir()
    (logs / "records").mkdir()
    done = evermesh("records", logs)
    assert done.returncode == 2
    assert "recording is off (record: off)" in done.stderr
