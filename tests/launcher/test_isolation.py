"""Nodes that jobs leave, and do not use: drained by people, cordoned for all jobs, set aside by the policy."""

import json
import re
import signal
from pathlib import Path

import psutil
import pytest

from evermesh.fault.cluster.identity import full_name
from evermesh.fault.events import Event, read_events
from tests.launcher.jobs import Job, clean_losses, launched
from tests.launcher.test_cli import evermesh

pytestmark = pytest.mark.timeout(900)
COMPARED = 12
PATIENT_S = 300.0
NODES = ("train.steps=100000", "nodes=2", "train.checkpoint.every=null", "train.snapshot.every=1", "join_timeout_s=600")


def told(job: Job, kind: str) -> list[Event]:
    return [event for event in read_events(job.run.events) if event.kind == kind] if job.run.events.is_file() else []


def members(job: Job) -> list[list[str]]:
    """The nodes of every attempt, by rank."""
    return [[str(node) for node in entry.fields["nodes"]] for entry in job.journal if entry.kind == "attempt"]  # type: ignore[union-attr]


def stop(job: Job) -> None:
    job.client.stop(signal.SIGTERM)
    code, _, stderr = job.end(PATIENT_S)
    assert code == 143, stderr


def all_ready(job: Job, number: int) -> bool:
    return [node.state for node in job.client.status().nodes].count("ready") == number


def test_a_drained_node_is_left_behind_a_step_and_not_used_again(job_file: Path) -> None:
    settings = ("nodes=2", "train.snapshot=off", "train.checkpoint.every=null")
    expected = clean_losses(job_file, 100000, f"train.stop_at={COMPARED}", *settings)
    with launched(job_file, *NODES, "spares=1") as job:
        job.wait_training()
        job.wait(lambda: all_ready(job, 3))
        (first,) = members(job)
        leaving, staying = first[1], first[0]
        spare = ({"node-0", "node-1", "node-2"} - set(first)).pop()
        done = evermesh("drain", leaving, "--run", job.run.directory, "--because", "fan 3")
        assert done.returncode == 0, done.stderr
        assert f"small goes on without {leaving}" in done.stdout
        assert f"no job uses it until: evermesh uncordon {full_name(leaving)}" in done.stdout
        assert members(job) == [first, [staying, spare]]
        status = job.client.status()
        assert status.restarts == 0
        aside = {node.node: node.aside for node in status.nodes}
        assert aside[leaving] is not None
        assert "fan 3" in str(aside[leaving])
        assert aside[staying] is aside[spare] is None
        for command in (("status",), ("top", "--once")):
            shown = evermesh(command[0], job.run.directory, *command[1:]).stdout
            assert f"aside: {aside[leaving]}"[:60] in shown
            assert re.search(rf"{leaving} +\w+ aside ", shown)
        (event,) = told(job, "isolation")
        assert (event.fields["node"], event.fields["action"], event.fields["carried_out"]) == (leaving, "drain", True)
        refused = evermesh("drain", staying, "--run", job.run.directory)
        assert refused.returncode == 2
        assert "1 of 3 nodes could be used, but small needs 2, and min_nodes is not set" in refused.stderr
        job.kill_rank(0)
        job.wait_training(3)
        assert members(job)[-1] == [staying, spare], "no failure brings it back"
        job.wait(lambda: len(job.losses) >= COMPARED)
        sources = [event.fields["source"] for event in told(job, "resumed")]
        assert sources == ["memory"] * 2, "nothing was read from storage"
        (left,) = told(job, "stopped")
        assert told(job, "resumed")[0].step == left.step, "and no step was trained again"
        stop(job)
        losses = job.losses
    assert losses[:COMPARED] == expected[:COMPARED]


def test_a_cordoned_node_gets_no_rank_and_too_few_are_refused_with_the_numbers(job_file: Path) -> None:
    store = ("--store", str(job_file.with_name("cluster")))
    assert evermesh("cordon", "node-1", *store, "--because", "disk", "--for", "2h").returncode == 0
    table = json.loads(evermesh("nodes", "--cluster", *store, "--json").stdout)
    assert [(row["node"], row["state"], row["cordon"]["because"]) for row in table] == [
        (full_name("node-1"), "cordoned", "disk")
    ]
    with launched(job_file, "nodes=2", "train.steps=2", name="refused") as job:
        code, _, stderr = job.end(PATIENT_S)
    assert code == 75
    assert "1 of 2 nodes may be used, but the job needs 2: node-1" in stderr
    assert "disk" in stderr
    lifted = evermesh("uncordon", "node-1", *store)
    assert lifted.stdout.strip() == f"{full_name('node-1')} may be used again"


def lose(job: Job, node: str) -> None:
    """Kill the agent of a node, and its ranks with it; another agent takes its place."""
    attempts = len(members(job))
    psutil.Process(job.agents[node]).kill()
    job.wait_training(attempts + 1)
    job.wait(lambda: all_ready(job, 3))


@pytest.mark.parity
def test_a_node_that_is_lost_in_two_jobs_is_not_used_by_the_third(job_file: Path) -> None:
    given = (*NODES, "spares=1", "isolation={mode: act, false_alarm_s: 0}")
    store = ("--store", str(job_file.with_name("cluster")))
    with launched(job_file, *given, name="first") as job:
        job.wait_training()
        job.wait(lambda: all_ready(job, 3))
        first = members(job)[0]
        node, third = first[1], ({"node-0", "node-1", "node-2"} - set(first)).pop()
        lose(job, node)
        stop(job)
        assert not told(job, "isolation"), "once is never"
    assert evermesh("cordon", third, *store, "--because", "to have the others used").returncode == 0
    with launched(job_file, *given, name="second") as job:
        job.wait_training()
        assert set(members(job)[0]) == set(first)
        assert evermesh("uncordon", third, *store).returncode == 0
        job.wait(lambda: all_ready(job, 3) and not any(found.aside for found in job.client.status().nodes))
        lose(job, node)
        job.wait(lambda: told(job, "isolation")[-1].fields["node"] == node)
        event = told(job, "isolation")[-1]
        assert (event.fields["action"], event.fields["carried_out"]) == ("drain", True)
        assert f"going on without {node}: 0.64 (crash 0.64) that it is at fault" in event.text
        stop(job)
    with launched(job_file, *given[1:], "train.steps=2", name="third") as job:
        code, _, stderr = job.end(PATIENT_S)
        assert code == 0, stderr
        assert node not in members(job)[0]
        assert f"{node} ({full_name(node)}) is cordoned by the policy of second" in told(job, "isolation")[0].text
    why = evermesh("nodes", "--why", full_name(node), *store).stdout
    assert f"{full_name(node)}: cordoned; 0.64 (crash 0.64) that it is at fault" in why
    assert [line.split("  ")[-1].strip() for line in why.splitlines()[2:]] == [
        f"{name}: {node} was lost" for name in ("first", "second")
    ]
