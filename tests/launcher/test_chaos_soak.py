"""The slower half of the fault matrix as data, and many random faults over many steps; ``make soak``."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from evermesh import checkpoint
from evermesh.fault.events import read_events
from evermesh.launcher import Run
from evermesh.launcher.chaos.report import ChaosReport
from evermesh.launcher.controller.journal import read_journal
from evermesh.runtime.telemetry import read_telemetry
from tests.launcher.jobs import chaos, launched, with_faults
from tests.launcher.test_cli import EVERMESH, evermesh
from tests.launcher.test_full_disk import can_mount
from tests.processes import still_alive

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
FAULTS = int(os.environ.get("FAULTS", "30"))
SEED = int(os.environ.get("SEED", "0"))


def rank_fault(kind: str, rank: int, step: int, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "target": f"rank {rank}", "at": {"step": step}, **more}


def test_many_random_faults_leave_the_parameters_of_a_clean_run(job_file: Path) -> None:
    report = chaos(
        job_file,
        "nodes=2",
        f"train.steps={5 * (2 * FAULTS + 1)}",
        "train.checkpoint.every=5",
        options=("--seed", str(SEED), "--faults", str(FAULTS), "--compare"),
        timeout_s=3000,
    )
    told = {
        "faults": len(report.faults),
        "attempts": report.attempts,
        "steps": report.steps,
        "trained again": report.steps_lost,
        "goodput": round(report.goodput, 3),
        "slowest restart_s": max((fault.training_after_s or 0.0 for fault in report.faults), default=0.0),
        "verdict": report.comparison.verdict if report.comparison else None,
    }
    print(f"\n{json.dumps(told)}")
    assert report.passed, report.problems
    assert report.comparison is not None
    assert report.comparison.verdict == "bit-equal"


def test_f7_where_nobody_looks_a_rank_that_stops_or_hangs_is_found_by_the_ranks_that_wait(
    job_file: Path,
) -> None:
    faults = [rank_fault("stop", 1, 5), rank_fault("hang", 0, 11), rank_fault("hang", 1, 17, holds_gil=True)]
    report = with_faults(
        job_file,
        "train.steps=24",
        "train.timeout_s=5",
        "restarts=9",
        "nodes=2",
        "hang=off",
        faults=faults,
        compared=True,
    )
    assert report.passed, report.problems
    assert [fault.outcome for fault in report.faults] == ["restarted"] * 3
    log = Run(Path(report.run)).logs / "controller.log"
    told = [event.text for event in read_events(Path(report.run) / "events.jsonl") if event.kind == "failed"]
    for rank, text in zip((1, 0, 1), told, strict=True):
        assert f"Not a word came from rank {rank}: stopped, or hanging." in text, log


def test_f16_a_node_that_is_cut_off_from_the_controller_trains_on_and_is_taken_back(job_file: Path) -> None:
    cut = {"kind": "cut", "target": "node 1", "at": {"step": 5}, "for_s": 5}
    slow = rank_fault("slow", 0, 6, sleep_s=0.1, steps=100)  # long enough to be seen
    report = with_faults(job_file, "train.steps=120", "nodes=2", faults=[cut, slow], compared=True)
    assert report.passed, report.problems
    assert report.attempts == 1
    assert report.faults[0].outcome == "survived"
    assert report.faults[0].cause is not None
    assert "node-1 was not heard" in report.faults[0].cause
    assert "node back" in [event.kind for event in read_events(Path(report.run) / "events.jsonl")]


def test_f24_sigterm_to_who_shows_the_job_saves_and_ends_with_143(job_file: Path) -> None:
    faults = [{"kind": "kill", "signal": "SIGTERM", "target": "launcher", "at": {"step": 5}}]
    report = with_faults(job_file, "train.steps=100000", "train.checkpoint.every=null", faults=faults, expect_exit=143)
    assert report.passed, report.problems
    assert report.faults[0].outcome == "ended the job"
    assert report.faults[0].cause == "asked to stop after a checkpoint (SIGTERM)"
    run = Run(Path(report.run))
    assert checkpoint.checkpoints(run.checkpoints)[-1].step == read_telemetry(run.telemetry)[-1].step


def test_f27_a_job_of_which_every_process_is_killed_goes_on_from_its_newest_checkpoint(job_file: Path) -> None:
    faults = [{"kind": "kill", "target": "job", "at": {"step": 9}}]
    report = with_faults(job_file, "train.steps=20", "nodes=2", faults=faults, compared=True)
    assert report.passed, report.problems
    assert report.faults[0].outcome == "restarted"
    assert report.attempts == 2


def test_f30_a_rank_that_is_killed_while_it_restores_is_one_more_restart(job_file: Path) -> None:
    faults = [
        {"kind": "kill", "target": "rank 1", "at": {"step": 9}},
        {"kind": "kill", "target": "rank 0", "at": {"step": 1, "phase": "restore"}},
    ]
    report = with_faults(job_file, "train.steps=20", "restarts=9", faults=faults, compared=True)
    assert report.passed, report.problems
    assert report.attempts == 3


def test_a_poisoned_batch_is_skipped_by_all_ranks_and_a_flipped_bit_is_seen_in_the_comparison(job_file: Path) -> None:
    faults = [
        rank_fault("poison", 1, 3),
        rank_fault("flip", 0, 5, bit=22),
        rank_fault("flip", 1, 7, what="gradient", bit=22),
    ]
    report = with_faults(job_file, "train.steps=12", faults=faults, compared=True)
    assert report.passed, report.problems  # nobody promises the same numbers
    assert report.comparison is not None
    assert report.comparison.verdict == "different"
    assert report.attempts == 1
    assert [fault.outcome for fault in report.faults] == ["survived"] * 3
    steps = {step.step: step.committed for step in read_telemetry(Path(report.run) / "telemetry.jsonl")}
    assert [step for step, committed in steps.items() if not committed] == [3]


def test_a_run_that_is_resumed_is_given_no_faults(job_file: Path) -> None:
    faults = [{"kind": "raise", "target": "rank 0", "at": {"step": 5}}, rank_fault("kill", 1, 6)]
    report = with_faults(job_file, "restarts=0", faults=faults, expect_exit=1)
    assert report.problems == ("not injected: kill rank 1 at step 6, forward",)
    run = Run.open(Path(report.run))
    found = evermesh("resume", run.directory)
    assert found.returncode == 0, found.stderr
    assert run.status() == "finished"
    assert [event.kind for event in read_events(run.events)].count("injected") == 1


def test_ctrl_c_ends_a_job_with_a_stopped_agent_and_leaves_nothing_stopped(job_file: Path) -> None:
    schedule = job_file.with_name("faults.json")
    schedule.write_text(json.dumps({"faults": [{"kind": "stop", "target": "agent 0", "at": {"step": 2}}]}))
    command = ("chaos", "--schedule", str(schedule))
    with launched(job_file, "train.steps=100000", command=command) as job:
        job.wait(lambda: "injected" in job.events)
        agent = psutil.Process(job.agents["node-0"])
        job.wait(lambda: agent.status() == psutil.STATUS_STOPPED)
        members = job.processes()
        job.process.send_signal(2)
        code, _, stderr = job.end()
        assert code == 130
        assert "there is no report" in stderr
        assert still_alive(members, 3) == []
        assert checkpoint.checkpoints(job.run.checkpoints)


def test_a_disk_that_fills_up_ends_the_job_with_the_numbers_and_it_goes_on_when_there_is_room(
    job_file: Path, tmp_path: Path
) -> None:
    mountpoint = tmp_path / "small-disk"
    mountpoint.mkdir()
    if not can_mount(mountpoint):
        pytest.skip("mounting a tmpfs in a user namespace is not permitted here (unshare -Urm)")
    fill = {"kind": "fill", "free_bytes": 100_000, "at": {"step": 2}, "for_s": 60}
    faults = job_file.with_name("faults.json")
    faults.write_text(json.dumps({"expect_exit": 1, "faults": [fill]}))
    run = mountpoint / "small"
    script = (
        f"mount -t tmpfs -o size=16m none {mountpoint} && "
        f'"$@" chaos {job_file} --schedule {faults} --set runs={mountpoint} --set train.steps=40 --json '
        f'&& "$@" resume {run} >&2'
    )
    found = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script, "sh", *EVERMESH], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    report = ChaosReport.model_validate_json(found.stdout)
    assert report.passed
    assert "No space left on device" in found.stderr
    assert "finished: 40 steps" in found.stderr


def test_f23_the_head_node_is_lost_and_then_the_next_one(job_file: Path) -> None:
    faults = [{"kind": "kill", "target": "head", "at": {"step": 20}, "times": 2, "every": 40}]
    report = with_faults(job_file, "workers=3", "nodes=3", "train.steps=100", faults=faults, compared=True)
    assert report.passed, report.problems
    assert report.attempts == 3
    assert report.comparison is not None
    assert report.comparison.verdict == "bit-equal"
    journal = read_journal(Run(Path(report.run)).journal)
    assert [entry.fields["term"] for entry in journal if entry.kind == "term"] == [1, 2, 3]
