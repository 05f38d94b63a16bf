"""Jobs on a Ray cluster that grows: its autoscaler adds and replaces nodes, which are processes of one host."""

import json
import os
import secrets
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from tests.launcher.jobs import clean_losses, launched
from tests.processes import still_alive, variables

pytest.importorskip("ray")
from tests.launcher.hosts import Host, Hosts, can_make_hosts, on, start_head

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.soak,
    pytest.mark.skipif(not can_make_hosts(), reason="network namespaces cannot be made here (root and iproute2)"),
]
_IDLE_S = 3.0
_HEAD = 51 * "f" + "00000"
"""By which Ray's provider of such nodes knows the head."""


def _cluster_config(head: Host) -> dict[str, object]:
    """A head without processors, and up to four nodes that begin when something asks for them."""
    # one worker fills a node: where a node that is left had room, this autoscaler would not see that the job wants another
    node = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 4}
    unused = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "grows",
        "max_workers": 4,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"{head.address}:6390",
            "launch_multiple": True,
            "use_node_id_as_ip": True,  # all nodes have one address
            "disable_node_updaters": True,  # as on Kubernetes: a silent node is replaced, not repaired by ssh
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "node": node,
        },
        "head_node_type": "ray.head.default",
        "upscaling_speed": 4.0,
        "idle_timeout_minutes": _IDLE_S / 60,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "rsync_exclude": [],
        "rsync_filter": [],
        "file_mounts_sync_continuously": False,
        **{f"{name}_commands": [] for name in unused},
    }


@pytest.fixture
def grown(tmp_path: Path) -> Iterator[Hosts]:
    """A host with the head of a cluster that grows."""
    with _growing(tmp_path) as hosts:
        yield hosts


@contextmanager
def _growing(folder: Path) -> Iterator[Hosts]:
    hosts = Hosts(1)
    with ExitStack() as stack:
        stack.callback(hosts.remove)
        hosts.make()
        ray_folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)
        )
        config = folder / "cluster.json"
        config.write_text(json.dumps(_cluster_config(hosts.hosts[0])))
        authentication = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        fake = {"RAY_FAKE_CLUSTER": "1", "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD}
        fake |= {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "AUTOSCALER_HEARTBEAT_TIMEOUT_S": "5"}
        start_head(hosts, 0, ray_folder, {**os.environ, **authentication, **fake}, "--autoscaling-config", str(config))
        with variables(**authentication):
            yield hosts


def _raylets(hosts: Hosts) -> list[psutil.Process]:
    return [process for process in hosts.hosts[0].processes if process.name() == "raylet"]


def test_nodes_come_when_a_job_asks_a_lost_one_is_replaced_and_all_go_when_it_is_over(
    grown: Hosts, job_file: Path
) -> None:
    [head] = _raylets(grown)
    settings = ("train.steps=100000", "nodes=2", "train.checkpoint.every=null", "join_timeout_s=120")
    began_s = time.time()
    with launched(job_file, *settings, on(grown), within=grown.hosts[0].command()) as job:
        job.wait(job.has_trained, 120.0)
        print(f"the first step {time.time() - began_s:.1f} s after the launch, with no node there")
        assert len(_raylets(grown)) == 3
        job.wait(lambda: "snapshots protected" in job.events)
        agent = psutil.Process(job.agents["node-1"])
        raylet = next(parent for parent in agent.parents() if parent.name() == "raylet")
        family = [raylet, *raylet.children(recursive=True)]
        killed_s = time.time()
        for process in family:
            process.kill()
        assert still_alive(family, 5) == []
        job.wait(lambda: job.has_trained(2), 120.0)
        print(f"the next step {time.time() - killed_s:.1f} s after a node was killed")
        job.process.send_signal(signal.SIGTERM)
        code, _, stderr = job.end()
        assert code == 143, stderr
        over_s = time.time()
        job.wait(lambda: _raylets(grown) == [head], 60.0)
        print(f"nodes gone {time.time() - over_s:.1f} s after the job, {_IDLE_S} s of which they may idle")
        losses = job.losses
    assert losses == clean_losses(job_file, 100_000, "nodes=2", f"train.stop_at={len(losses)}")
