"""Jobs on a real Ray cluster: three nodes on this machine, with Ray's own settings, so that it is slow to notice deaths."""

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from evermesh.fault.snapshot.keeper.area import area_of, identity_in
from evermesh.launcher import admission
from evermesh.launcher.agent.spec import AgentSpec
from evermesh.launcher.contact import read_token
from evermesh.launcher.errors import ClusterMissing, RunNotSeen
from evermesh.launcher.job_file import load_job
from tests.launcher.jobs import Job, clean_losses, launched
from tests.launcher.test_cli import evermesh
from tests.processes import still_alive, variables, who_shows

ray = pytest.importorskip("ray")
from evermesh.launcher.placement.ray_agent import RayAgent, Surroundings  # noqa: E402

ENDLESS = "train.steps=100000"
pytestmark = pytest.mark.timeout(180)


@dataclass
class RayCluster:
    """A head and two nodes, each of them a raylet with processes of its own."""

    cluster: Any
    nodes: dict[str, Any] = field(default_factory=dict)
    """By Ray's name; not the head."""

    @property
    def on(self) -> str:
        return f"on=ray://{self.cluster.address}"

    def raylet_of(self, process: psutil.Process) -> str | None:
        """Ray's name of the node to which a process belongs; None for the head."""
        above = {parent.pid for parent in process.parents()}
        return next((name for name, node in self.nodes.items() if _raylet(node) in above), None)

    def power_off(self, name: str) -> list[psutil.Process]:
        """End everything that runs on a node, with nothing said to anybody; returns what it was."""
        node = self.nodes.pop(name)
        raylet = psutil.Process(_raylet(node))
        family = [raylet, *raylet.children(recursive=True)]
        for process in family:
            process.kill()
        self.cluster.remove_node(node, allow_graceful=False)
        return family

    def power_off_one_of(self, job: Job) -> tuple[str, list[psutil.Process]]:
        """Power off a node, not the head, whose agent takes part; returns what the job calls it, and what ran there."""
        taking_part = next(entry for entry in job.journal if entry.kind == "attempt").fields["nodes"]
        assert isinstance(taking_part, list)
        for node in map(str, taking_part):
            ray_node = self.raylet_of(psutil.Process(job.agents[node]))
            if ray_node is not None:
                return node, self.power_off(ray_node)
        raise AssertionError("every agent that takes part is on the head")

    def remains(self) -> tuple[list[Any], list[Any]]:
        """Actors and placement groups that are left."""
        groups = ray.util.placement_group_table().values()
        return ray.util.list_named_actors(all_namespaces=True), [
            group for group in groups if group["state"] != "REMOVED"
        ]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="ray-") as folder, variables(RAY_TMPDIR=folder):
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        found, before = RayCluster(started), signal.getsignal(signal.SIGTERM)  # which the driver takes
        try:
            for _ in range(2):
                node = started.add_node(num_cpus=2)
                found.nodes[node.node_id] = node
            ray.init(address=started.address, log_to_driver=False, logging_level="ERROR")
            yield found
        finally:
            ray.shutdown()
            signal.signal(signal.SIGTERM, before)
            started.shutdown()


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def wait_agents(job: Job, number: int) -> None:
    """Wait until that many agents have joined."""
    job.wait(lambda: len(job.agents) >= number)


def test_a_spare_takes_the_place_of_a_lost_node_and_the_run_goes_on_with_the_two_that_remain(
    cluster: RayCluster, job_file: Path
) -> None:
    with launched(job_file, ENDLESS, "nodes=2", "spares=1", "train.checkpoint.every=10", cluster.on) as job:
        wait_agents(job, 3)
        job.wait_checkpoint()
        assert who_shows(read_token(job.run.directory).encode()) == []
        killed_s = time.time()
        victim, family = cluster.power_off_one_of(job)
        assert still_alive(family, 2) == []
        job.wait_training(2)
        again = next(entry for entry in job.journal if entry.fields.get("to") == "training" and entry.generation == 2)
        assert again.time_s - killed_s < 10  # about 2.5; 15 is how long Ray takes to notice it
        job.process.send_signal(signal.SIGINT)
        code, stdout, stderr = job.end()
        assert code == 130, stderr
        assert f"lost {victim}. Going on from step" in stdout
        steps = len(job.losses)
        assert job.losses == clean_losses(job_file, 100_000, "nodes=2", f"train.stop_at={steps}")

    more = ["--nodes", "2", "--spares", "0", "--workers", "4", "--set", f"train.stop_at={steps + 5}"]
    resumed = evermesh("resume", job.run.directory, *more)
    assert resumed.returncode == 0, resumed.stderr
    assert "4 workers of 2 nodes" in resumed.stdout
    assert len(job.losses) == steps + 5
    assert cluster.remains() == ([], [])
    assert still_alive(job.processes(), 2) == []


@pytest.mark.soak
def test_controller_and_agents_may_die_and_nothing_is_left_after_sigterm(cluster: RayCluster, job_file: Path) -> None:
    marked = "ray.runtime_env.env_vars.MARK=from the job file"
    with launched(job_file, ENDLESS, "nodes=2", "train.checkpoint.every=10", marked, cluster.on) as job:
        job.wait_training()
        first = job.run.state().pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        job.wait(lambda: job.run.is_alive() and job.run.state().pid != first)
        job.wait(lambda: all(node.state == "ready" for node in job.client.status().nodes))
        assert job.client.status().generation == 1

        job.wait_checkpoint()
        agent = psutil.Process(job.agents["node-1"])
        keeper = identity_in(area_of(job.run.directory, "node-1"))
        assert keeper is not None
        family = [process for process in agent.children(recursive=True) if process.pid != keeper.pid]
        agent.kill()
        assert still_alive(family, 2) == []
        assert psutil.pid_exists(keeper.pid), "its memory stays"
        job.wait_training(2)
        assert job.agents["node-1"] != agent.pid
        assert {psutil.Process(pid).environ()["MARK"] for pid in job.pids.values()} == {"from the job file"}

        members, controller = job.processes(), job.run.state().pid
        assert controller is not None
        os.kill(controller, signal.SIGTERM)  # Ray answers it too, by ending the process, unless it is told not to
        code, stdout, stderr = job.end()
        assert code == 143, stderr
        assert "lost node-1. Going on from step" in stdout
        assert still_alive(members, 2) == []
        assert cluster.remains() == ([], [])


def test_too_few_nodes_end_with_75_and_what_is_missing(cluster: RayCluster, job_file: Path) -> None:
    with launched(job_file, "workers=4", "nodes=4", "join_timeout_s=2", cluster.on) as job:
        code, _, stderr = job.end()
    assert code == 75
    assert "0 of 4 nodes were there after 2 s (join_timeout_s). The job asks the Ray cluster for 1 CPU" in stderr
    assert "nodes have that much. Wait for nodes and resume the run" in stderr
    assert cluster.remains() == ([], [])


def test_an_address_where_no_cluster_is_ends_with_2_and_the_way_out(job_file: Path) -> None:
    with launched(job_file, "on=ray://127.0.0.1:9") as job:
        code, _, stderr = job.end()
    assert code == 2
    assert "no Ray cluster was reached with --on ray://127.0.0.1:9: [Errno 111] Connection refused" in stderr
    assert "usually port 6379 of the head" in stderr


def test_without_ray_the_package_to_install_is_named(job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "find_spec", lambda name: None)
    with pytest.raises(ClusterMissing, match=r"pip install 'evermesh\[ray\]'"):
        admission.check_place(load_job(job_file, ["on=ray"]))


def test_a_node_that_sees_another_directory_than_the_controller_says_so(tmp_path: Path) -> None:
    spec = AgentSpec(run=tmp_path, node="node-0", address="", slots=1, warm_module="evermesh.launcher.agent.training")
    around = Surroundings(host="elsewhere", folder=tmp_path, variables={})
    with pytest.raises(RunNotSeen, match="Put the runs on storage that every node mounts at the same path"):
        RayAgent().run(spec.model_dump_json(), "token", around.model_dump_json())
