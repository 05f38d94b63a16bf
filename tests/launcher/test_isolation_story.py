"""A slow node is seen, loses work in the plan, is left while the job runs, and throughput returns; a frozen node is replaced
without anybody; and the report of the run tells both stories."""

import json
import os
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from evermesh.fault.cluster.identity import full_name
from evermesh.fault.cluster.records import Cordon, Uncordon
from evermesh.fault.cluster.store import ClusterStore
from evermesh.launcher.report.gathering import gather
from evermesh.launcher.report.incidents import Incident
from evermesh.parallelism.batch_plan import BatchPlan
from tests.launcher.jobs import Job, launched
from tests.launcher.test_cli import evermesh
from tests.launcher.test_isolation import PATIENT_S, members, told

pytestmark = pytest.mark.timeout(900)
SLOW_FROM, SLOW, SPARE = 40, "node-1", "node-2"
FAULT = {"kind": "slow", "target": "node 1", "at": {"step": SLOW_FROM}, "sleep_s": 0.1, "steps": 10_000_000}
"""A node that stands still for a moment in every step, whatever it has to do: less work for it does not help enough."""
TRAINING = ("train.steps=10000000", "train.dtype=float64", "train.checkpoint.every=null", "nodes=2")
"""Longer than the policy looks ahead, so waiting is dear."""
WHOLE = ("train.layout.capacity=160", "train.data.context=128")
"""No sequence has to be shared by two ranks, and there are enough for a slow one, too."""
AFTER_STEPS = 20


@contextmanager
def with_slow_node(job_file: Path, isolation: str, spares: int) -> Iterator[Job]:
    """A job on nodes 0 and 1, of which one becomes slow; spares are free to take a place from its first step on."""
    store = ClusterStore(job_file.with_name("cluster"))
    store.add([Cordon(time_s=time.time(), node=full_name(SPARE), by="me", because="to have the others used")])
    path = job_file.with_name("faults.yaml")
    path.write_text(yaml.safe_dump({"faults": [FAULT]}))
    given = (
        *TRAINING,
        *WHOLE,
        "train.snapshot.every=1",
        f"spares={spares}",
        "join_timeout_s=600",
        "restarts=20",
        f"isolation={isolation}",
    )
    with launched(job_file, *given, command=("chaos", "--json", "--schedule", str(path))) as job:
        job.wait_training()
        assert set(members(job)[-1]) == {"node-0", SLOW}
        store.add([Uncordon(time_s=time.time(), node=full_name(SPARE), by="me")])
        yield job


def actions(job: Job) -> list[tuple[object, object]]:
    return [(event.fields["action"], event.fields["node"]) for event in told(job, "isolation")]


def share(job: Job, rank: int, from_step: int, plans: int = 4) -> float:
    """Of the tokens of so many plans of this step and later ones, as the controller is told of them."""
    found: dict[int, list[int]] = {}
    until = time.monotonic() + PATIENT_S
    while len(found) < plans and time.monotonic() < until:
        values = job.client._ask("GET", "plan").json()
        if values is not None and values["step"] >= from_step:  # a new controller has not heard of one
            plan = BatchPlan.from_json(json.dumps(values["plan"]))
            found[values["step"]] = [sum(part.num_tokens for part in of_rank) for of_rank in plan.ranks]
        time.sleep(0.1)
    assert len(found) == plans
    return sum(of[rank] for of in found.values()) / sum(map(sum, found.values()))


def stop(job: Job) -> None:
    """Somebody stops it, so the faults are not over and there is no report of them."""
    job.client.stop(signal.SIGTERM)
    assert job.end(PATIENT_S)[0] == 143


def step_s(job: Job, first: int, last: int | None = None) -> float:
    return statistics.median(step.report.step_s for step in gather(job.run)[1].steps[first:last])


def kinds(incident: Incident) -> list[str]:
    return [moment.kind for moment in incident.story]


def in_order(wanted: Sequence[str], found: Sequence[str]) -> bool:
    left = iter(found)
    return all(kind in left for kind in wanted)


def test_a_slow_node_gets_less_of_every_batch_whoever_controls_the_job(job_file: Path) -> None:
    with with_slow_node(job_file, "act", spares=0) as job:
        rank = members(job)[-1].index(SLOW)
        job.wait(lambda: bool(told(job, "speeds")), PATIENT_S)
        assert told(job, "finding")[0].fields["finding"]["node"] == SLOW  # type: ignore[index, call-overload]
        assert actions(job)[-1] == ("degrade", SLOW)
        (event,) = told(job, "speeds")
        from_step = int(str(event.fields["from_step"]))
        assert share(job, rank, from_step) < 0.3, "half of it before"
        controller = job.run.state().pid or 0
        os.kill(controller, signal.SIGKILL)
        job.wait(lambda: job.run.state().pid != controller, PATIENT_S)
        assert share(job, rank, len(job.losses) + 1) < 0.3
        assert len(told(job, "speeds")) == 1, "the next controller knows them, and ranks were not told other ones"
        stop(job)
    (incident,) = [found for found in gather(job.run)[0].incidents if found.kind == "isolation"]
    assert (incident.node, incident.outcome) == (SLOW, "its ranks have less to do")
    assert in_order(["injected", "finding", "isolation", "speeds"], kinds(incident))


@pytest.mark.soak
def test_a_slow_node_is_left_and_a_frozen_one_replaced_and_the_report_tells_it(job_file: Path) -> None:
    with with_slow_node(job_file, "{mode: act, persist_s: 5, false_alarm_s: 60}", spares=1) as job:
        before = members(job)[-1]
        job.wait(lambda: ("drain", SLOW) in actions(job), PATIENT_S)
        left = len(job.losses)
        job.wait(lambda: len(job.losses) > left + AFTER_STEPS, PATIENT_S)
        after = [SPARE if node == SLOW else node for node in before]
        assert members(job)[-1] == after
        from_step = int(str(told(job, "speeds")[0].fields["from_step"]))
        slow_s, returned_s = step_s(job, SLOW_FROM + 1, left - 2), step_s(job, left + 5)
        assert slow_s > 0.1
        assert slow_s > 1.5 * returned_s, "as fast as others again"

        attempts, agent = len(members(job)), psutil.Process(job.agents[SPARE])
        for process in (agent, *agent.children(recursive=True)):
            process.suspend()  # the node that has its place freezes
        job.wait(lambda: job.has_trained(attempts + 1), PATIENT_S)
        frozen = len(job.losses)
        job.wait(lambda: len(job.losses) > frozen + AFTER_STEPS, PATIENT_S)
        assert members(job)[-1] == after, "by another agent, for no other node is left"
        assert not agent.is_running()
        written = evermesh("report", job.run.directory)
        assert written.returncode == 0, written.stderr
        stop(job)
        losses = job.losses
        report = gather(job.run)[0]
        assert report.training.trained_again <= 20, "those behind the last snapshot of the node that froze"

    (isolated,) = [found for found in report.incidents if found.kind == "isolation"]
    frozen_too = next(found for found in report.incidents if found.time_s > isolated.time_s)
    assert (isolated.kind, isolated.node, isolated.steps_lost, isolated.source) == ("isolation", SLOW, 0, "memory")
    assert isolated.outcome == "given less to do, then drained; trains again without it"
    story = ["injected", "finding", "isolation", "speeds", "isolation", "regrouping", "stopped", "placed", "resumed"]
    assert in_order(story, kinds(isolated)), isolated.story
    assert f"{SPARE} has the place of {SLOW}" in next(line.text for line in isolated.story if line.kind == "placed")
    rates = dict(isolated.throughput)
    assert rates["after"] > 1.5 * rates["with less work for it"]
    assert rates["before"] > 1.5 * rates["found"]
    assert (frozen_too.kind, frozen_too.cause, frozen_too.source) == ("failure", f"lost {SPARE}", "memory")
    assert in_order(["node lost", "restarted", "node joined", "placed", "resumed"], kinds(frozen_too)), frozen_too.story
    page = (job.run.directory / "report.html").read_text()
    for text in (
        f"{SPARE} has the place of {SLOW}",
        f"lost {SPARE}",
        "given less to do, then drained",
        "with less work",
    ):
        assert text in page

    compared = min(len(losses), from_step + 150)
    settings = (*TRAINING[1:], *WHOLE, f"train.stop_at={compared}", "train.snapshot=off")
    with launched(job_file, TRAINING[0], *settings, name="clean") as clean:
        assert clean.end(PATIENT_S)[0] == 0
        expected = clean.losses
    assert losses[: from_step - 1] == expected[: from_step - 1], "bit for bit while plans are the same"
    assert losses[:compared] == pytest.approx(expected, rel=1e-9)
