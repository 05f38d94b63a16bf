"""``ray job submit -- evermesh launch``: Ray's own job server on two hosts starts it, follows it, and stops it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from evermesh import checkpoint
from evermesh.launcher import Run
from tests.launcher.jobs import Job, clean_losses, end_for_certain
from tests.launcher.test_cli import EVERMESH
from tests.processes import still_alive

pytest.importorskip("ray")
from tests.launcher.hosts import Hosts, can_make_hosts, ray_hosts

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.soak,
    pytest.mark.skipif(not can_make_hosts(), reason="network namespaces cannot be made here (root and iproute2)"),
]
WAIT_S = 120.0


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    pytest.importorskip("aiohttp_cors", reason="Ray's job server is part of ray[default]")
    with ray_hosts(2, head=("--dashboard-host", "10.77.0.1")) as made:
        yield made


def ray_job(hosts: Hosts, *words: str) -> list[str]:
    """``ray job`` on the head."""
    ray = str(Path(sys.executable).with_name("ray"))
    return hosts.hosts[0].command(ray, "job", *words, "--address", "http://10.77.0.1:8265")


def call(hosts: Hosts, *words: str) -> str:
    """What ``ray job`` tells."""
    done = subprocess.run(ray_job(hosts, *words), capture_output=True, text=True, check=False, timeout=WAIT_S)
    return done.stdout + done.stderr


def submission(hosts: Hosts, folder: Path, name: str, *command: str, **variables: str) -> list[str]:
    """``ray job submit`` of ``folder``, in which this command of ``evermesh`` is run."""
    env = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "EVERMESH_CLUSTER": str(folder.parent), **variables}
    submit = ray_job(hosts, "submit", "--submission-id", name, "--working-dir", str(folder))
    return [*submit, "--runtime-env-json", json.dumps({"env_vars": env}), "--", *EVERMESH, *command]


@pytest.fixture
def folder(job_file: Path) -> Path:
    """A folder with the job file, and without runs."""
    (made := job_file.with_name("work")).mkdir()
    shutil.copy(job_file, made)
    return made


def test_a_submission_reaches_all_nodes_is_saved_however_hard_ray_stops_it_and_goes_on_in_the_next(
    hosts: Hosts, job_file: Path, folder: Path
) -> None:
    run = Run(job_file.parent / "runs" / "small")
    endless = ("--nodes", "2", "--set", "train.steps=100000", "--set", "train.checkpoint.every=null")
    at_once = {"MARK": "from the submission", "RAY_JOB_STOP_WAIT_TIME_S": "0"}  # SIGKILL right after SIGTERM
    submitted = submission(hosts, folder, "first", "launch", "job.yaml", "--on", "auto", *endless, **at_once)
    with subprocess.Popen(submitted, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        job = Job(process, run)
        try:
            job.wait(lambda: (run.directory / "journal.jsonl").is_file() and job.has_trained(), WAIT_S)
            assert run.config().on == "ray"
            agents = [psutil.Process(pid) for pid in job.agents.values()]
            ranks = [rank for agent in agents for rank in agent.children(recursive=True)]
            members = [*job.processes(), *ranks]
            assert len({host.name for host in hosts.hosts for found in host.processes if found in agents}) == 2
            assert {agent.environ().get("MARK") for agent in agents} == {at_once["MARK"]}
            assert all("_ray_pkg_" in agent.cwd() for agent in agents)
            assert "was stopped" in call(hosts, "stop", "first")
            job.wait(lambda: run.state().state == "stopped", WAIT_S)
            told, _ = process.communicate(timeout=WAIT_S)
        finally:
            end_for_certain(job)
    assert "| loss " in told, "what the launcher shows is streamed"
    assert still_alive(members, 10.0) == []
    [saved] = checkpoint.checkpoints(run.checkpoints)
    assert saved.step == len(job.losses)
    assert "stopped" in call(hosts, "status", "first")

    done = len(job.losses) + 5
    again = subprocess.run(
        submission(hosts, folder, "second", "resume", str(run.directory), "--set", f"train.stop_at={done}"),
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_S,
    )
    assert again.returncode == 0, again.stdout
    assert "succeeded" in call(hosts, "status", "second")
    assert job.losses == clean_losses(job_file, 100_000, "nodes=2", f"train.stop_at={done}")


def test_a_submission_whose_runs_would_be_in_its_copy_fails_with_the_way_out(hosts: Hosts, folder: Path) -> None:
    relative = submission(hosts, folder, "third", "launch", "job.yaml", "--on", "ray", "--set", "runs=runs")
    failed = subprocess.run(relative, capture_output=True, text=True, check=False, timeout=WAIT_S)
    assert failed.returncode == 1
    assert "the runs would be in " in failed.stdout
    assert "Put them on storage that every node mounts" in failed.stdout
    told = call(hosts, "status", "third")
    assert "failed" in told
    assert "exit code 2" in told
