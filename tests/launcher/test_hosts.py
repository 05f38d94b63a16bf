"""Jobs on three hosts with addresses of their own, which are the nodes of a real Ray cluster: what cut cables and lost
hosts do, and what the API of a job tells meanwhile."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from evermesh.fault.events import Finding, read_events
from evermesh.fault.snapshot.keeper.area import area_of, identity_in
from evermesh.launcher import Run
from evermesh.launcher.controller.status import NodeStatus
from tests.fault.suite.links import lose, lose_no_more
from tests.launcher.jobs import Job, clean_losses, launched
from tests.launcher.test_cli import EVERMESH
from tests.processes import still_alive

pytest.importorskip("ray")
from tests.launcher.hosts import Host, Hosts, can_make_hosts, on, ray_hosts
from tests.launcher.told import Told

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not can_make_hosts(), reason="network namespaces cannot be made here (root and iproute2)"),
]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with ray_hosts(3) as made:
        yield made


def _host_of(hosts: Hosts, job: Job, node: str) -> Host:
    return next(host for host in hosts.hosts if job.agents[node] in {process.pid for process in host.processes})


def _workers(job: Job, node: str) -> list[psutil.Process]:
    """The ranks of a node and what these have started: who writes into the log of a rank."""
    family = psutil.Process(job.agents[node]).children(recursive=True)
    return [process for process in family if any("rank-" in opened.path for opened in process.open_files())]


def _members(job: Job) -> list[str]:
    nodes = [entry.fields["nodes"] for entry in job.journal if entry.kind == "attempt"][-1]
    assert isinstance(nodes, list)
    return list(map(str, nodes))


def test_the_doctor_looks_at_every_host_and_names_the_link_that_nothing_passes(hosts: Hosts) -> None:
    head, one, other = hosts.hosts
    asked = [*EVERMESH, "doctor", "--cluster", on(hosts).removeprefix("on="), "--quick", "--json"]
    with hosts.apart(one, other):
        done = subprocess.run(head.command(*asked), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2, done.stderr
    found = json.loads(done.stdout)
    looked_at = {row["node"] for row in found if row["check"] == "memory"}
    assert len(looked_at) == 3
    assert all(any(host.address in node for node in looked_at) for host in hosts.hosts)
    [bad] = [row for row in found if row["state"] == "bad"]
    assert bad["node"] == "the cluster"
    assert one.address in bad["check"]
    assert other.address in bad["check"]
    assert "No route to host" in bad["reason"]


@pytest.mark.parametrize("token", ["wrong", ""])
def test_a_wrong_token_or_none_is_one_sentence_with_the_way_out(hosts: Hosts, job_file: Path, token: str) -> None:
    asked = [*EVERMESH, "doctor", "--cluster", on(hosts).removeprefix("on="), "--quick"]
    environment = {**os.environ, "HOME": str(job_file.parent), "RAY_AUTH_TOKEN": token}
    done = subprocess.run(
        hosts.hosts[0].command(*asked), capture_output=True, text=True, check=False, timeout=60, env=environment
    )
    assert done.returncode == 2
    assert "wants a token, and this machine has none, or another one. Set RAY_AUTH_MODE=token" in done.stderr
    assert len(done.stderr.splitlines()) < 4


def test_f15_a_node_whose_cable_is_cut_ends_its_ranks_and_is_a_spare_when_it_is_back(
    hosts: Hosts, job_file: Path
) -> None:
    elastic = ("train.steps=100000", "nodes=2", "spares=1", "train.checkpoint.every=null", "train.snapshot.every=1")
    head = hosts.hosts[0]
    with launched(job_file, *elastic, on(hosts), within=head.command()) as job:
        job.wait(job.has_trained)
        job.wait(lambda: "snapshots protected" in job.events)
        job.wait(lambda: len(job.agents) == 3)
        victim = next(node for node in _members(job) if _host_of(hosts, job, node) != head)
        host, ranks = _host_of(hosts, job, victim), _workers(job, victim)
        agent = psutil.Process(job.agents[victim])
        keeper = identity_in(area_of(job.run.directory, victim))
        assert keeper is not None
        assert ranks
        cut_s = time.time()
        hosts.cut(host)
        job.wait(lambda: job.has_trained(2))
        assert victim not in _members(job)
        job.wait(lambda: still_alive(ranks, 0.1) == [], 40.0)  # outside of a step they are given three times as long
        print(f"ranks of the cut node gone {time.time() - cut_s:.1f} s after the cut")
        assert psutil.pid_exists(keeper.pid), "its memory stays"
        again = next(entry for entry in job.journal if entry.fields.get("to") == "training" and entry.generation == 2)
        print(f"trained on after {again.time_s - cut_s:.1f} s")
        log = (job.run.logs / f"agent-{victim}.log").read_text()
        assert "ending the ranks: " in log
        hosts.mend(host)
        job.wait(lambda: job.agents[victim] != agent.pid)  # a new one has joined, as a spare
        assert still_alive([agent], 10.0) == []
        (resumed,) = [event for event in read_events(job.run.events) if event.kind == "resumed"]
        step = len(job.losses)
        job.wait(lambda: len(job.losses) > step + 3)
        assert job.run.state().attempt == 2, "who comes back disturbs nobody"
        assert _workers(job, victim) == []
        job.process.send_signal(signal.SIGTERM)
        code, _, stderr = job.end()
        assert code == 143, stderr
        assert resumed.fields["source"] == "memory"
        losses = job.losses
    assert losses == clean_losses(job_file, 100_000, "nodes=2", f"train.stop_at={len(losses)}")


def _findings(job: Job) -> list[Finding]:
    events = read_events(job.run.events) if job.run.events.is_file() else ()
    return [Finding.model_validate(event.fields["finding"]) for event in events if event.kind == "finding"]


def _rank_on(job: Job, host: Host) -> int:
    pids = {process.pid for process in host.processes}
    logs = {rank: (job.run.logs / f"rank-{rank}.log").read_text() for rank in range(3)}
    [rank] = [rank for rank, log in logs.items() if int(log.split("process ")[1].split(",")[0]) in pids]
    return rank


def test_a_way_that_lets_nothing_pass_is_named_and_no_rank_instead_of_it(hosts: Hosts, job_file: Path) -> None:
    settings = ("train.steps=100000", "nodes=3", "workers=3", "train.checkpoint.every=null", "train.snapshot=off")
    ends = ("restarts=0", "hang.idle_s=15")
    head, one, other = hosts.hosts
    with launched(job_file, *settings, *ends, on(hosts), within=head.command()) as job:
        job.wait(job.has_trained)
        job.wait(lambda: len(job.losses) > 20)
        ranks = _rank_on(job, one), _rank_on(job, other)
        before = len(_findings(job))
        lose(one, other)
        try:
            job.wait(lambda: any(finding.link is not None for finding in _findings(job)))
            finding = next(finding for finding in _findings(job) if finding.link is not None)
            job.wait(lambda: "failed" in job.events, 90.0)
        finally:
            lose_no_more(one, other)
        assert (finding.kind, finding.link) == ("communication hang", (min(ranks), max(ranks)))
        assert {(found.kind, found.rank) for found in _findings(job)[before:]} == {(finding.kind, None)}, (
            "no rank is blamed"
        )
        failed = next(event.text for event in read_events(job.run.events) if event.kind == "failed")
        assert f"worker {min(ranks)} hangs in step" in failed
        assert f"as does rank {max(ranks)}" in failed
        assert any(f"does not arrive at rank {rank}" in failed for rank in ranks)


@pytest.fixture
def story_file(job_file: Path) -> Path:
    """A job on two nodes, with a spare, that never writes a checkpoint by itself."""
    values = yaml.safe_load(job_file.read_text())
    values |= {"nodes": 2, "spares": 1, "ray": {"runtime_env": {"env_vars": {"MARK": "from the job file"}}}}
    values["train"] |= {"steps": 100_000, "checkpoint": {"every": None}, "snapshot": {"every": 1}}
    job_file.write_text(yaml.safe_dump(values))
    return job_file


def _power_off(hosts: Hosts, run: Run, node: NodeStatus) -> list[psutil.Process]:
    """End everything on the host of ``node`` at once, cut its cable, and forget its memory; returns what ran there."""
    host = next(host for host in hosts.hosts if host.address == node.address)
    family = host.processes
    hosts.cut(host)
    for process in family:
        process.kill()
    assert still_alive(family, 5) == []
    shutil.rmtree(area_of(run.directory, node.node))
    return family


def _of_the_job(hosts: Hosts) -> list[psutil.Process]:
    """What runs on the hosts besides Ray: launchers, controllers, agents, keepers and ranks."""
    found = []
    for process in (process for host in hosts.hosts for process in host.processes):
        with suppress(psutil.NoSuchProcess):
            if "evermesh" in (told := " ".join(process.cmdline())) or told.startswith("ray::RayAgent"):
                found.append(process)
    return found


def _stop(told: Told, number: signal.Signals) -> None:
    """Ask for the end, and wait until it is told."""
    assert told.ask("stop", {"signal": number, "grace_s": 30.0}).status_code == 202
    told.wait(lambda: told.states[-1] == "stopped")


# the last one here: it takes a host away
def test_a_job_outlives_its_terminal_and_a_host_and_goes_on_with_two_as_its_api_tells(
    hosts: Hosts, story_file: Path
) -> None:
    head, run = hosts.hosts[0], Run(story_file.parent / "runs" / "small")
    with launched(story_file, on(hosts), within=head.command()) as job, Told(run, head) as told:
        told.wait_steps(3)
        assert told.ask("status", token="wrong").status_code == 401
        status = told.status()
        assert (status.state, status.workers, status.generation) == ("training", 2, 1)
        told.wait(lambda: [node.state for node in told.status().nodes] == ["ready"] * 3)
        nodes = told.status().nodes
        assert {node.address for node in nodes} == {host.address for host in hosts.hosts}
        assert sorted(len(node.ranks) for node in nodes) == [0, 1, 1]
        assert [node.node for node in nodes if node.is_spare] == [node.node for node in nodes if not node.ranks]
        assert all("process " in told.ask(f"logs/{rank}").json()["text"] for rank in range(2))

        os.killpg(job.process.pid, signal.SIGHUP)  # as sshd does when the connection is gone
        assert job.end()[0] == 128 + signal.SIGHUP
        told.wait_steps(3)
        told.wait(lambda: "snapshots protected" in told.events())
        [spare] = [node.node for node in told.status().nodes if node.is_spare]
        victim = next(node for node in told.members() if node.address != head.address)
        lost = _power_off(hosts, run, victim)
        told.wait(lambda: told.status().generation == 2 and told.status().state == "training")
        told.wait_steps(3)
        assert spare in [node.node for node in told.members()]
        assert victim.node not in [node.node for node in told.members()]
        [resumed] = told.events()["resumed"]
        assert resumed["fields"]["source"] == "memory"
        [incident] = told.board["recovery"]["incidents"]
        assert victim.node in incident["cause"]
        assert told.numbers()["evermesh_restarts_total",] == 1
        assert told.numbers()["evermesh_node_state", "", victim.node, "joining"] == 1, "it would be a spare"
        assert {psutil.Process(rank.pid).environ()["MARK"] for rank in told.status().ranks} == {"from the job file"}
        _stop(told, signal.SIGTERM)
        assert still_alive([process for process in _of_the_job(hosts) if process not in lost], 10.0) == []

        more = ["resume", str(run.directory), "--spares", "0"]
        with subprocess.Popen(head.command(*EVERMESH, *more), start_new_session=True) as again:
            told.wait_steps(3)
            assert {node.address for node in told.members()} == {
                host.address for host in hosts.hosts if host.address != victim.address
            }
            _stop(told, signal.SIGINT)
            assert again.wait(30) == 128 + signal.SIGINT
        assert still_alive(_of_the_job(hosts), 10.0) == []
        losses = [told.losses[step] for step in sorted(told.losses)]
    assert losses == clean_losses(story_file, 100_000, f"train.stop_at={len(losses)}")
