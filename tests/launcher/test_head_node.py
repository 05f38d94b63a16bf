"""F23: the node of the controller is lost; another node's agent starts a controller from its copy of the journal.

Nodes are processes of this machine, each counts as a machine. Losses are compared bit for bit with those of a clean run.
"""

import re
import signal
from functools import partial
from pathlib import Path

import psutil
import pytest

from evermesh import checkpoint
from evermesh.launcher.succession.office import read_views
from evermesh.launcher.succession.replica import folder_of
from tests.launcher.jobs import Job, launched
from tests.processes import still_alive

pytestmark = pytest.mark.timeout(900)
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


def wait_training(job: Job, generation: int) -> None:
    """Wait for the first step of an attempt."""
    job.wait(
        lambda: any(one.generation == generation and one.fields.get("to") == "training" for one in job.journal),
        PATIENT_S,
    )


def kill_head_node(job: Job) -> None:
    """SIGKILL the controller, the agent of its node, and all below that; they are gone when this returns."""
    agent = psutil.Process(job.agents["node-0"])
    controller = psutil.Process(job.run.state().pid)
    victims = [controller, agent, *agent.children(recursive=True)]
    for victim in victims:
        victim.suspend()  # at once: nobody sees another die
    for victim in victims:
        victim.kill()
    assert still_alive(victims, 5) == []


def terms(job: Job) -> list[tuple[int, str]]:
    """Every term that the journal tells of, with its node."""
    return [(int(str(one.fields["term"])), str(one.fields["node"])) for one in job.journal if one.kind == "term"]


def test_the_head_node_and_the_journal_are_lost_and_the_losses_are_those_of_a_clean_run(
    job_file: Path, expected: list[float]
) -> None:
    with launched(job_file, *JOB) as job:
        protected(job)
        wait_training(job, 1)
        job.wait(lambda: checkpoint.latest(job.run.checkpoints) is not None, PATIENT_S)
        before = job.journal
        kill_head_node(job)
        job.run.journal.unlink()  # all that is left of it are the copies
        job.wait(lambda: len(terms(job)) >= 2, PATIENT_S)
        wait_training(job, 2)
        code, _, stderr = job.end(PATIENT_S)
        assert code == 0, stderr
        assert job.losses == expected
        assert terms(job)[0][0] == 1 < terms(job)[-1][0]
        assert terms(job)[1][1] in ("node-1", "node-2")
        assert job.journal[: len(before)] == before  # nothing that was decided is lost


def test_a_dead_controller_goes_on_in_its_term_a_stopped_one_is_replaced_and_nothing_it_says_later_is_obeyed(
    job_file: Path,
) -> None:
    with launched(job_file, *JOB, "train.steps=100000") as job:
        protected(job)
        wait_training(job, 1)
        agents, first = job.agents, psutil.Process(job.run.state().pid)
        first.kill()  # F22: the agent of its node starts it again
        job.wait(lambda: job.run.state().pid != first.pid, PATIENT_S)
        job.client.status()
        assert [term for term, _ in terms(job)] == [1]
        old = psutil.Process(job.run.state().pid)
        old.suspend()  # it keeps its lock, its port and its connections
        job.wait(lambda: len(terms(job)) >= 2, PATIENT_S)
        job.wait(lambda: job.run.state().pid != old.pid, PATIENT_S)
        old.resume()
        assert still_alive([old], 20) == []
        told = (job.run.logs / "controller.log").read_text()
        assert re.search(r"the agents obey the controller of term \d+; this one, of term 1, ends", told)
        steps = len(job.losses)
        job.wait(lambda: len(job.losses) > steps + 5, PATIENT_S)
        job.process.send_signal(signal.SIGTERM)  # who shows the job finds the new one
        code, _, stderr = job.end(PATIENT_S)
        assert code == 143, stderr
        given = [
            term for term, _ in terms(job)
        ]  # a vote may be split, or a new controller be late: its term is left out
        assert given == sorted(set(given))
        assert given[0] == 1 < given[-1]
        assert job.agents == agents  # none was lost, and none was killed by the old one
        assert job.run.state().attempt == 1
        assert [path.exists() for path in map(partial(folder_of, job.run.directory), agents)] == [False] * 3
