"""Jobs in allocations of a real Slurm cluster: three nodes, each a host with an address of its own."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from evermesh import checkpoint
from evermesh.fault.events import read_events
from evermesh.launcher import Run
from evermesh.launcher.contact import read_token
from evermesh.launcher.controller.journal import read_journal
from evermesh.runtime.telemetry import read_telemetry
from tests.launcher.jobs import clean_losses
from tests.launcher.slurm import SlurmCluster, slurm_cluster, why_no_slurm
from tests.launcher.test_cli import EVERMESH
from tests.processes import still_alive

pytestmark = [pytest.mark.timeout(300), pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm())]
WAIT_S = 120.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with slurm_cluster(3) as made:
        yield made


def test_a_step_knows_the_leaf_switch_of_its_node(cluster: SlurmCluster) -> None:
    program = "import os; from evermesh.fault.hardware.rack import find_rack; print(*find_rack(os.environ, {}))"
    for node, leaf in (("em0", "leaf0"), ("em2", "leaf1")):
        told = cluster.call("srun", f"--nodelist={node}", "--mem=0", sys.executable, "-c", program)
        assert told == f"{leaf} SLURM_TOPOLOGY_ADDR\n"


def batch_script(job_file: Path, options: str, *overrides: str) -> Path:
    """A script for sbatch that launches the job."""
    script = job_file.with_name("job.sh")
    given = [part for value in ("train.steps=100000", "nodes=2", *overrides) for part in ("--set", value)]
    command = shlex.join([*EVERMESH, "launch", str(job_file), "--on", "auto", *given])
    script.write_text(
        f"#!/bin/bash\n#SBATCH --exclusive --no-kill --requeue --open-mode=append {options}\nexec {command}\n"
    )
    return script


def wait(holds: Callable[[], bool], cluster: SlurmCluster, script: Path) -> None:
    until = time.monotonic() + WAIT_S
    while not holds():
        output = cluster.output(script)
        told = output.read_text()[-2000:] if output.is_file() else cluster.call("squeue", "--long")
        assert time.monotonic() < until, f"not in {WAIT_S} s: {told}"
        time.sleep(0.1)


def losses(run: Run) -> list[float]:
    return [report.loss for report in read_telemetry(run.telemetry)] if run.telemetry.is_file() else []


def joined(run: Run) -> set[object]:
    """The nodes whose agents have joined."""
    return {entry.fields["node"] for entry in read_journal(run.journal) if entry.kind == "node"}


def members(run: Run) -> list[str]:
    """The nodes of the latest attempt."""
    nodes = [entry.fields["nodes"] for entry in read_journal(run.journal) if entry.kind == "attempt"][-1]
    assert isinstance(nodes, list)
    return list(map(str, nodes))


def all_of(cluster: SlurmCluster) -> list[psutil.Process]:
    """What runs on the hosts besides Slurm."""
    found = [process for host in cluster.hosts.hosts for process in host.processes]
    return [process for process in found if "evermesh" in " ".join(process.cmdline())]


def test_a_warned_job_saves_is_queued_again_and_goes_on_until_it_is_cancelled(
    cluster: SlurmCluster, job_file: Path
) -> None:
    script = batch_script(job_file, "--nodes=2 --time=10", "requeue=true", "train.checkpoint.every=null")
    job, run = cluster.submit(script), Run(job_file.parent / "runs" / "small")
    wait(lambda: len(losses(run)) > 5, cluster, script)
    cluster.call("scancel", "--batch", "--signal=USR1", job)  # as `#SBATCH --signal=B:USR1@120` does before the limit
    wait(lambda: checkpoint.latest(run.checkpoints) is not None, cluster, script)
    saved = next(info.step for info in checkpoint.checkpoints(run.checkpoints))
    wait(lambda: cluster.job(job)["Restarts"] == "1", cluster, script)
    assert f"Slurm job {job} is back in the queue" in cluster.output(script).read_text()
    wait(lambda: len(losses(run)) > saved + 5, cluster, script)

    cluster.call("scancel", job)
    wait(lambda: cluster.job(job)["JobState"] == "CANCELLED", cluster, script)
    wait(lambda: run.state().state == "stopped", cluster, script)
    wait(lambda: all_of(cluster) == [], cluster, script)
    steps = max(info.step for info in checkpoint.checkpoints(run.checkpoints))
    assert steps == len(losses(run)) > saved + 5, "it was saved before it was killed"
    assert cluster.job(job)["Restarts"] == "1", "nobody puts back what was cancelled"
    assert [found.name for found in Run.all(run.directory.parent)] == ["small"]
    assert losses(run) == clean_losses(job_file, 100_000, "nodes=2", f"train.stop_at={steps}")


def test_a_spare_of_the_allocation_takes_the_place_of_a_lost_node_and_a_warning_ends_the_job_with_75(
    cluster: SlurmCluster, job_file: Path
) -> None:
    script = batch_script(job_file, "--nodes=3 --time=10", "train.checkpoint.every=10")
    job, run = cluster.submit(script), Run(job_file.parent / "runs" / "small")
    wait(lambda: len(losses(run)) > 20 and len(joined(run)) == 3, cluster, script)
    victim = next(node for node in members(run) if node != "node-0")  # where the batch script runs
    told = " ".join(word for process in all_of(cluster) for word in (*process.cmdline(), *process.environ().values()))
    assert read_token(run.directory) not in told
    host = cluster.host_of(f"em{victim.rpartition('-')[2]}")
    family = host.processes
    cluster.hosts.cut(host)
    for process in family:
        process.kill()
    assert still_alive(family, 5) == []
    wait(lambda: victim not in members(run), cluster, script)
    killed_at = len(losses(run))
    wait(lambda: len(losses(run)) > killed_at + 5, cluster, script)
    assert any(event.kind == "resumed" for event in read_events(run.events))

    cluster.call("scancel", "--batch", "--signal=USR1", job)
    wait(lambda: run.state().state == "stopped", cluster, script)
    wait(
        lambda: cluster.job(job)["ExitCode"] == "75:0", cluster, script
    )  # it is "completing" until Slurm gives the node up
    assert "`requeue: true` in the job file would put it back" in cluster.output(script).read_text()
    steps = len(losses(run))
    assert losses(run) == clean_losses(job_file, 100_000, "nodes=2", f"train.stop_at={steps}")


@pytest.mark.soak
def test_a_job_that_nobody_warns_stops_before_its_time_limit(cluster: SlurmCluster, job_file: Path) -> None:
    # 60 of 120 seconds are kept for saving
    script = batch_script(job_file, "--nodes=2 --time=2", "grace_s=50", "train.checkpoint.every=null")
    job, run = cluster.submit(script), Run(job_file.parent / "runs" / "small")
    wait(lambda: cluster.job(job)["JobState"] == "FAILED", cluster, script)
    assert cluster.job(job)["ExitCode"] == "75:0"
    steps = max(info.step for info in checkpoint.checkpoints(run.checkpoints))
    assert steps == len(losses(run))
    assert "until the time limit: stopping" in (run.logs / "controller.log").read_text()
