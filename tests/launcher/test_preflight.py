"""Nodes are looked at before ranks start, and while they run. Disks turn read-only for real, in a mount namespace."""

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from evermesh.fault.events import read_events
from evermesh.launcher.succession.replica import folder_of
from tests.launcher.jobs import Job, launched

APART = ("unshare", "-Urm", "sh", "-c")


def read_only(*folders: Path) -> list[str]:
    """What a command is run by that is to find nothing but read-only disks in these folders."""
    mounts = " && ".join(f"mkdir -p {folder} && mount -t tmpfs -o ro none {folder}" for folder in folders)
    return [*APART, f'{mounts} && exec "$@"', "sh"]


@pytest.fixture(autouse=True)
def _may_mount(tmp_path: Path) -> None:
    done = subprocess.run([*read_only(tmp_path / "tried"), "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here (unshare -Urm): {done.stderr}")


def told(job: Job, kind: str) -> list[dict[str, Any]]:
    """Fields of the events of a kind, with their text."""
    return [{**event.fields, "text": event.text} for event in read_events(job.run.events) if event.kind == kind]


def _wait_told(job: Job, check: str, state: str) -> None:
    job.wait(lambda: (check, state) in [(found["check"], found["state"]) for found in told(job, "health")])


def test_a_node_with_a_broken_disk_is_refused_before_ranks_start_and_a_spare_takes_its_place(job_file: Path) -> None:
    own = folder_of(job_file.parent / "runs" / "small", "node-1", job_file.parent / "own-disks")
    overrides = ("nodes=2", "spares=1", f"journal_folder={own.parent}")
    with launched(job_file, *overrides, within=read_only(own)) as job:
        code, _, stderr = job.end()
        assert code == 0, stderr
        [refused] = told(job, "node refused")
        assert refused["node"] == "node-1"
        assert f"disk of the journal: {own} is mounted read-only. Way out: " in refused["text"]
        attempts = [entry.fields["nodes"] for entry in job.journal if entry.kind == "attempt"]
        assert attempts == [["node-0", "node-2"]]
        assert [found["check"] for found in told(job, "health") if found["state"] == "bad"] == ["disk of the journal"]


def test_without_enough_other_nodes_the_job_is_refused_at_once_with_the_way_out(job_file: Path) -> None:
    run = job_file.parent / "runs" / "small"
    own = [folder_of(run, f"node-{number}", job_file.parent / "own-disks") for number in (1, 2)]
    overrides = ("nodes=2", "spares=1", f"journal_folder={own[0].parent}", "join_timeout_s=600")
    with launched(job_file, *overrides, within=read_only(*own)) as job:
        code, _, _ = job.end()
        assert code == 1
        error = job.run.state().error
        assert error is not None
        assert error.startswith("1 nodes are left, but the job needs 2. node-1")
        assert "set preflight to off" in error
        assert not any(entry.kind == "attempt" for entry in job.journal)


@pytest.mark.parity
def test_with_preflight_off_the_same_nodes_are_used(job_file: Path) -> None:
    run = job_file.parent / "runs" / "small"
    own = [folder_of(run, f"node-{number}", job_file.parent / "own-disks") for number in (1, 2)]
    overrides = ("nodes=2", "spares=1", f"journal_folder={own[0].parent}", "preflight=off", "health_every_s=null")
    with launched(job_file, *overrides, within=read_only(*own)) as job:
        code, _, stderr = job.end()
        assert code == 0, stderr
        assert told(job, "health") == told(job, "node refused") == []
        [nodes] = [entry.fields["nodes"] for entry in job.journal if entry.kind == "attempt"]
        assert isinstance(nodes, list)
        assert {"node-1", "node-2"} & set(nodes)


def test_a_disk_that_turns_read_only_while_the_job_runs_is_an_event_and_so_is_its_recovery(
    job_file: Path,
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as own:  # sockets in it must have short names
        _turns_read_only_and_back(job_file, own)


def _turns_read_only_and_back(job_file: Path, own: str) -> None:
    within = [*APART, f'mount -t tmpfs none {own} && exec "$@"', "sh"]
    overrides = ("train.steps=1000000", "health_every_s=0.2")
    with launched(job_file, *overrides, within=within, TMPDIR=own) as job:
        job.wait_training()
        [agent] = job.agents.values()
        for option, state in (("ro", "bad"), ("rw", "ok")):
            inside = ["nsenter", "-t", str(agent), "-U", "-m", "--preserve-credentials"]
            subprocess.run([*inside, "mount", "-o", f"remount,{option}", own], check=True)
            _wait_told(job, "disk of temporary files", state)
        assert told(job, "node refused") == [], "who decides about nodes that train is told, and nothing else is done"
        assert len([entry for entry in job.journal if entry.kind == "attempt"]) == 1
