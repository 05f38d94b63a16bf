"""Jobs that are watched while they train: who hangs or is slow is named within a second or two, and nobody else."""

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from evermesh.fault.detectors import kernels
from evermesh.fault.detectors.joining import join, survey
from evermesh.fault.events import Event, Finding, read_events
from evermesh.fault.recorder.files import read_job
from evermesh.launcher.run_directory import Run
from tests.launcher.jobs import launched
from tests.launcher.test_cli import evermesh

_ENDLESS = ("train.steps=100000", "train.checkpoint.every=null")
_ALONE = ("hang=off", "restarts=0")


def _events(run: Run, kind: str) -> list[Event]:
    return [event for event in read_events(run.events) if event.kind == kind] if run.events.is_file() else []


def _findings(run: Run) -> list[Finding]:
    return [Finding.model_validate(event.fields["finding"]) for event in _events(run, "finding")]


def _with(job_file: Path, faults: Sequence[dict[str, Any]], *overrides: str) -> Any:
    path = job_file.with_name("faults.yaml")
    path.write_text(yaml.safe_dump({"faults": list(faults), "expect_exit": 1}))
    command = ("chaos", "--json", "--schedule", str(path))
    return launched(job_file, *_ENDLESS, *overrides, command=command)


def test_a_stopped_rank_is_found_and_told_of_once_by_each_controller_until_it_goes_on(job_file: Path) -> None:
    with launched(job_file, *_ENDLESS, *_ALONE, "nodes=2") as job:
        stopped = psutil.Process(job.wait_training().ranks[1].pid)
        time.sleep(2.0)  # healthy so far
        assert _findings(job.run) == []
        stopped.suspend()
        stopped_s = time.time()
        job.wait(lambda: bool(_findings(job.run)))
        event = _events(job.run, "finding")[0]
        assert event.time_s - stopped_s < 30, "2 on an idle machine"
        finding = _findings(job.run)[0]
        assert (finding.kind, finding.rank, finding.node) == ("hang", 1, "node-1")
        assert event.text == finding.text
        assert "its process is stopped; rank 0 waits for it since" in finding.text
        time.sleep(1.0)
        (held,) = job.client.status().findings
        assert (held.kind, held.rank) == ("hang", 1)
        assert float(str(held.evidence["waited_s"])) > float(str(finding.evidence["waited_s"]))
        told = evermesh("status", job.run.directory)
        assert f"hang  {finding.text[:40]}" in told.stdout
        assert json.loads(evermesh("status", job.run.directory, "--json").stdout)["findings"][0]["rank"] == 1
        assert "rank 1 (node node-1)" in evermesh("top", job.run.directory, "--once").stdout
        os.kill(job.run.state().pid or 0, signal.SIGKILL)
        job.wait(lambda: len(_findings(job.run)) == 2)  # the next controller finds it anew
        assert _findings(job.run)[1].rank == 1
        stopped.resume()
        job.wait(lambda: bool(_events(job.run, "finding over")))
        assert job.client.status().findings == ()
        assert len(_findings(job.run)) == 2


def test_a_rank_that_holds_the_interpreter_is_the_one_that_is_ended_for_it(job_file: Path) -> None:
    fault = {"kind": "hang", "target": "rank 1", "at": {"step": 30, "phase": "backward"}, "holds_gil": True}
    with _with(job_file, [fault], "restarts=0", "hang.idle_s=6") as job:
        job.wait(lambda: bool(_events(job.run, "failed")))
        (finding,) = _findings(job.run)
        assert (finding.kind, finding.rank) == ("hang", 1)
        failed = _events(job.run, "failed")[0].text
        assert failed.startswith("worker 1 hangs in step 30: no rank has computed anything for ")
        assert finding.text.split(";")[0] in failed
        job.wait(lambda: bool(_events(job.run, "finding over")))


def test_a_slow_rank_is_found(job_file: Path) -> None:
    fault = {"kind": "slow", "target": "rank 2", "at": {"step": 15}, "sleep_s": 0.2, "steps": 100_000}
    with _with(job_file, [fault], *_ALONE, "workers=4") as job:
        job.wait(lambda: bool(_findings(job.run)))
        finding = _findings(job.run)[0]
        assert (finding.kind, finding.rank) == ("slow rank", 2)
        assert finding.evidence["cause"] == "computes"


def test_nobody_is_blamed_for_the_long_sequence_that_the_plan_gave_it(job_file: Path) -> None:
    """Sequences are not cut, so the longest of every batch is on one rank, and the other has little to do."""
    costs = {"token_s": 1e-4, "pair_s": 1e-9, "micro_batch_s": 1e-5, "ring_step_s": 10.0, "ring_token_s": 1e-3}
    changes = (
        "layout.capacity=320",
        "data.batch_tokens=360",
        "model.hidden=128",
        "model.ffn=512",
        f"cost={json.dumps(costs)}",
    )
    with launched(job_file, *_ENDLESS, *_ALONE, *(f"train.{change}" for change in changes)) as job:
        job.wait_training()
        job.wait(lambda: len(job.losses) > 40)
        time.sleep(5.0)
        joined = join(read_job(job.run.directory)[0])
        train_ns = np.median(survey(joined).of_step[:, :, kernels.TRAIN_NS], axis=1)
        assert train_ns[0] > 2 * train_ns[1], "it looks like a slow rank"
        assert _findings(job.run) == []


def test_without_records_nothing_is_watched_and_a_stopped_rank_is_ended_as_before(job_file: Path) -> None:
    with launched(job_file, *_ENDLESS, "record=off", "restarts=0") as job:
        psutil.Process(job.wait_training().ranks[1].pid).suspend()
        assert job.end()[0] == 1
        assert "worker 1 has been stopped for 2." in _events(job.run, "failed")[0].text
        assert _findings(job.run) == []
