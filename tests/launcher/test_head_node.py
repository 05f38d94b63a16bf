"""F23: the node of the controller is lost; another node's agent starts a controller from its copy of the journal.

Nodes are processes of this machine, each counts as a machine. Losses are compared bit for bit with those of a clean run.
"""

import time
from pathlib import Path

import psutil
import pytest

from evermesh.launcher.succession.office import read_views
from tests.launcher.jobs import Job, launched
from tests.processes import still_alive

STEPS = 300
JOB = (f"train.steps={STEPS}", "workers=3", "nodes=3", "train.checkpoint.every=20", "join_timeout_s=600")
PATIENT_S = 400.0
"""Three agents load torch, on a machine that does other things too."""


@pytest.fixture(scope="module")
def expected(job_file_of_module: Path) -> list[float]:
    with launched(job_file_of_module, f"train.steps={STEPS}", "workers=3", "join_timeout_s=600", name="clean") as job:
        code, _, stderr = job.end(PATIENT_S)
        assert code == 0, stderr
        return job.losses


def protected(job: Job) -> None:
    """Wait until another node could take over."""

    def is_protected() -> bool:
        views = read_views(job.run.directory)
        return views is not None and views.view == views.before and len(views.view.holders) == 2

    job.wait(is_protected, PATIENT_S)


def kill_head_node(job: Job) -> float:
    """SIGKILL the controller, the agent of its node, and all below that; returns when, monotonic."""
    agent = psutil.Process(job.agents["node-0"])
    controller = psutil.Process(job.run.state().pid)
    victims = [controller, agent, *agent.children(recursive=True)]
    for victim in victims:
        victim.suspend()  # at once: nobody sees another die
    for victim in victims:
        victim.kill()
    assert still_alive(victims, 5) == []
    return time.monotonic()


def terms(job: Job) -> list[tuple[int, str | None]]:
    """Every term that the journal tells of, with its node."""
    return [(entry.fields["term"], entry.fields["node"]) for entry in job.journal if entry.kind == "term"]


def test_the_head_node_is_lost_and_another_node_takes_over_with_the_losses_of_a_clean_run(
    job_file: Path, expected: list[float]
) -> None:
    with launched(job_file, *JOB) as job:
        protected(job)
        job.wait_training()
        job.wait_checkpoint()
        before = job.journal
        killed_s = kill_head_node(job)
        job.wait(lambda: len(terms(job)) == 2, PATIENT_S)
        print("another controller after", time.monotonic() - killed_s)
        job.wait(lambda: any(e.generation == 2 and e.fields.get("to") == "training" for e in job.journal), PATIENT_S)
        print("training again after", time.monotonic() - killed_s)
        code, _, stderr = job.end(PATIENT_S)
        assert code == 0, stderr
        assert job.losses == expected
        assert [term for term, _ in terms(job)] == [1, 2]
        assert terms(job)[1][1] in ("node-1", "node-2")
        assert job.journal[: len(before)] == before  # nothing that was decided is lost
