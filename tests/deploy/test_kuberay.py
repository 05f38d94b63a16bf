"""A RayJob corresponds to the nodes of the job; its head launches again only where that helps, and saves before it ends."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evermesh.deploy import Deployment, render_kuberay
from evermesh.launcher.commands.app import app
from tests.deploy.test_rendering import DEPLOYMENT, JOB, ON_CPU, documents, shell_accepts

RAY_JOB = {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
RAY_CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
HEAD = {"rayStartParams", "template"}
WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
"""Fields of ray.io/v1 that we use, as the reference of KubeRay (1.6) documents them."""


@pytest.mark.parametrize("deployment", [DEPLOYMENT, ON_CPU], ids=["cuda", "cpu"])
def test_a_ray_job_has_a_head_that_launches_and_a_worker_for_every_node_and_spare(deployment: Deployment) -> None:
    (text,) = render_kuberay(deployment, image="registry/evermesh:1", ray="2.60.0", claim="shared").values()
    found = documents(text)
    assert found.keys() == {"ConfigMap", "RayJob"}
    spec = found["RayJob"]["spec"]
    cluster = spec["rayClusterSpec"]
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert (spec.keys(), cluster.keys(), head.keys(), workers.keys()) == (RAY_JOB, RAY_CLUSTER, HEAD, WORKERS)
    assert found["RayJob"]["apiVersion"] == "ray.io/v1"
    assert (cluster["rayVersion"], cluster["authOptions"]) == ("2.60.0", {"mode": "token"})
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 5
    assert all(isinstance(value, str) for group in (head, workers) for value in group["rayStartParams"].values())
    assert head["rayStartParams"]["num-cpus"] == "0", "no node of the job is placed there"
    script = found["ConfigMap"]["data"]["launch.sh"]
    assert "--on ray --nodes 4 --spares 1" in script
    assert spec["entrypoint"] == "bash /job/launch.sh"
    for group in (head, workers):
        pod = group["template"]["spec"]
        (node,) = pod["containers"]
        assert {mount["name"] for mount in node["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert pod["terminationGracePeriodSeconds"] > deployment.grace_s
        shell_accepts(node["lifecycle"]["preStop"]["exec"]["command"][-1])
    gpus = workers["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
    assert gpus == (8 if deployment.device == "cuda" else None)
    shell_accepts(script)


@pytest.mark.parametrize(("codes", "ends_with"), [([75, 75, 0], 0), ([75, 93], 93), ([2], 2)])
def test_the_head_launches_again_only_where_that_helps(codes: list[int], ends_with: int, tmp_path: Path) -> None:
    (text,) = render_kuberay(DEPLOYMENT, image="registry/evermesh:1", ray="2.60.0").values()
    script = documents(text)["ConfigMap"]["data"]["launch.sh"].replace("sleep 10", "sleep 0")
    launcher = tmp_path / "evermesh"
    launcher.write_text(f"#!/bin/bash\necho >> {tmp_path}/starts\nset -- {' '.join(map(str, codes))}\n"
                    f"n=$(wc -l < {tmp_path}/starts)\nexit ${{!n}}\n")  # fmt: skip
    launcher.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, timeout=30, check=False)
    assert done.returncode == ends_with
    assert len((tmp_path / "starts").read_text().splitlines()) == len(codes)


def test_a_head_that_is_told_to_end_lets_the_launcher_save_and_does_not_launch_again(tmp_path: Path) -> None:
    (text,) = render_kuberay(DEPLOYMENT, image="registry/evermesh:1", ray="2.60.0").values()
    script = documents(text)["ConfigMap"]["data"]["launch.sh"]
    launcher = tmp_path / "evermesh"
    launcher.write_text(f"#!/bin/bash\ntrap 'touch {tmp_path}/saved; exit 75' TERM\ntouch {tmp_path}/up\n"
                    "while :; do sleep 0.05; done\n")  # fmt: skip
    launcher.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen(["bash", "-c", script], env=environment, start_new_session=True) as head:
        while not (tmp_path / "up").exists():
            time.sleep(0.01)
        os.killpg(head.pid, signal.SIGTERM)  # as Ray ends a job
        assert head.wait(20) == 75
    assert (tmp_path / "saved").exists()


def test_a_ray_without_tokens_is_refused(tmp_path: Path) -> None:
    options = ("--image", "registry/evermesh:1", "--output", str(tmp_path), "--ray")
    for version in ("2.51.9", "nightly"):
        refused = CliRunner().invoke(app, ["deploy", "kuberay", str(JOB), *options, version])
        assert refused.exit_code == 2
        assert "2.52.0 or later" in refused.output
    assert not any(tmp_path.iterdir())
