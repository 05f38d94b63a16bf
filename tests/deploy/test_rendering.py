"""What carries a job elsewhere is valid where it goes, holds no secret, and starts what the job file says."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from evermesh.deploy import Deployment, render_docker, render_kuberay, render_kubernetes, render_slurm
from evermesh.launcher import load_job
from tests.launcher.slurm import slurm_cluster, why_no_slurm
from tests.launcher.test_cli import evermesh

DEPLOYMENT = Deployment(
    name="job-small",
    job_file="/shared/my jobs/job.yaml",
    job="name: small\n",
    runs="/shared/runs",
    nodes=4,
    spares=1,
    workers=8,
    device="cuda",
    grace_s=25.0,
    version="0.1.0",
    torch="2.13.0",
)
ON_CPU = DEPLOYMENT.model_copy(update={"device": "cpu", "threads": 2})
JOB = Path(__file__).resolve().parents[2] / "deploy" / "jobs" / "quickstart.yaml"


def documents(text: str) -> dict[str, Any]:
    """The manifests of a file by their kind."""
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def shell_accepts(script: str) -> None:
    """Fail unless bash can read the script."""
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_batch_script_is_read_by_bash_and_asks_for_all_nodes_and_gpus() -> None:
    (script,) = render_slurm(DEPLOYMENT, time_limit="1:00:00").values()
    shell_accepts(script)
    lines = script.splitlines()
    for wanted in ("--nodes=5", "--gpus-per-node=8", "--time=1:00:00", "--no-kill", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {wanted}" in lines
    assert lines[-1] == "exec evermesh launch '/shared/my jobs/job.yaml' --on slurm --nodes 4 --set requeue=true"
    assert "gpus" not in "".join(render_slurm(ON_CPU).values())


@pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm())
def test_slurm_itself_accepts_the_batch_script(tmp_path: Path) -> None:
    fits = ON_CPU.model_copy(update={"nodes": 1, "spares": 0, "workers": 1, "threads": 1})
    (text,) = render_slurm(fits, time_limit="10").values()
    script = tmp_path / "job.sbatch"
    script.write_text(text)
    with slurm_cluster(1) as cluster:
        cluster.call("sbatch", "--test-only", str(script))
        script.write_text(text.replace("--nodes=1", "--nodes=2"))
        with pytest.raises(AssertionError, match="allocation failure"):
            cluster.call("sbatch", "--test-only", str(script))


@pytest.mark.parametrize("deployment", [DEPLOYMENT, ON_CPU], ids=["cuda", "cpu"])
def test_the_manifests_fit_together_and_retry_only_what_helps(deployment: Deployment) -> None:
    (text,) = render_kubernetes(deployment, image="registry/evermesh:1", claim="shared").values()
    found = documents(text)
    assert found.keys() == {"ConfigMap", "Service", "Job"}
    job = found["Job"]["spec"]
    pod = job["template"]["spec"]
    (node,) = pod["containers"]
    assert found["Service"]["spec"]["selector"].items() <= job["template"]["metadata"]["labels"].items()
    assert pod["subdomain"] == found["Service"]["metadata"]["name"]
    assert job["completions"] == job["parallelism"] == 5
    (final, evicted) = job["podFailurePolicy"]["rules"]
    assert final["action"] == "FailJob"
    assert final["onExitCodes"] == {
        "containerName": node["name"],
        "operator": "In",
        "values": [2, 93],
    }  # so 75 is retried
    assert evicted["action"] == "Ignore"
    assert pod["restartPolicy"] == "Never", "a failure policy needs that"
    assert pod["terminationGracePeriodSeconds"] > deployment.grace_s
    mounts = {mount["name"] for mount in node["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert ("nvidia.com/gpu" in node["resources"]["limits"]) == (deployment.device == "cuda")
    shell_accepts(node["command"][-1])


def test_the_token_is_a_file_and_in_no_manifest() -> None:
    (text,) = render_kubernetes(DEPLOYMENT, image="registry/evermesh:1").values()
    assert "Secret" not in documents(text)
    pod = documents(text)["Job"]["spec"]["template"]["spec"]
    (node,) = pod["containers"]
    told = {entry["name"]: entry.get("value") for entry in node["env"]}
    assert told["RAY_AUTH_TOKEN_PATH"] == "/token/token"
    assert "RAY_AUTH_TOKEN" not in told
    assert next(volume for volume in pod["volumes"] if volume["name"] == "token")["secret"]["defaultMode"] == 0o400


@pytest.mark.parity
def test_the_schemas_of_kubernetes_accept_every_manifest() -> None:
    validating = pytest.importorskip("kubernetes_validate")  # 110 MB of schemas: not among what development needs
    for deployment in (DEPLOYMENT, ON_CPU):
        (text,) = render_kuberay(deployment, image="registry/evermesh:1", ray="2.60.0").values()
        cluster = documents(text)["RayJob"]["spec"]["rayClusterSpec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            pod = {
                "apiVersion": "v1",
                "kind": "PodTemplate",
                "metadata": {"name": "node"},
                "template": group["template"],
            }
            validating.validate(pod, "1.33", strict=True)
        (text,) = render_kubernetes(deployment, image="registry/evermesh:1").values()
        for document in documents(text).values():
            validating.validate(document, "1.33", strict=True)
        broken = documents(text)["Job"]
        broken["spec"]["completion"] = 5
        with pytest.raises(validating.ValidationError):
            validating.validate(broken, "1.33", strict=True)


@pytest.mark.parametrize("deployment", [DEPLOYMENT, ON_CPU], ids=["cuda", "cpu"])
def test_the_image_is_for_the_device_and_the_service_waits_until_the_job_is_saved(deployment: Deployment) -> None:
    files = render_docker(deployment)
    assert ("whl/cpu" in files["Dockerfile"]) == (deployment.device == "cpu")
    assert files["Dockerfile"].rstrip().endswith('ENTRYPOINT ["evermesh"]')
    service = yaml.safe_load(files["compose.yaml"])["services"]["job"]
    assert int(service["stop_grace_period"].removesuffix("s")) > deployment.grace_s
    assert ("deploy" in service) == (deployment.device == "cuda")
    assert service["volumes"][1] == "/shared/runs:/runs"
    alone = render_docker(deployment, monitoring=False)
    assert alone.keys() == {"Dockerfile", "job.yaml", "compose.yaml"}
    assert yaml.safe_load(alone["compose.yaml"])["services"].keys() == {"job"}


def test_compose_runs_prometheus_and_grafana_beside_the_job_and_opens_nothing_but_the_loopback() -> None:
    files = render_docker(DEPLOYMENT)
    compose = yaml.safe_load(files["compose.yaml"])
    services = compose["services"]
    assert services.keys() == {"job", "prometheus", "grafana"}
    published = {name: service.get("ports", []) for name, service in services.items()}
    assert published == {"job": ["127.0.0.1:8470:8470"], "prometheus": [], "grafana": ["127.0.0.1:3000:3000"]}
    for service in services.values():
        assert set(service["secrets"]) <= compose["secrets"].keys()
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            is_rendered = any(f"./{name}".startswith(f"{source}") for name in files)
            assert source in compose["volumes"] or source == DEPLOYMENT.runs or is_rendered, volume
    settings = dict(word.split("=", 1) for word in services["job"]["command"] if "=" in word)
    told = {name.removeprefix("api."): value for name, value in settings.items() if name.startswith("api.")}
    assert told == {"host": "job", "port": "8470", "token_file": "/run/secrets/token", "targets": "/targets"}
    (job,) = yaml.safe_load(files["monitoring/prometheus/prometheus.yml"])["scrape_configs"]
    assert job["authorization"]["credentials_file"] == told["token_file"]
    assert job["file_sd_configs"][0]["files"] == [f"{told['targets']}/*.json"]
    (source,) = yaml.safe_load(files["monitoring/grafana/provisioning/datasources/evermesh.yaml"])["datasources"]
    assert source["url"] == "http://prometheus:9090"
    load_job(JOB, [f"{name}={value}" for name, value in settings.items()])


@pytest.mark.parametrize("monitoring", [True, False])
@pytest.mark.parametrize("deployment", [DEPLOYMENT, ON_CPU], ids=["cuda", "cpu"])
def test_docker_compose_itself_accepts_the_file(deployment: Deployment, monitoring: bool, tmp_path: Path) -> None:
    compose = shutil.which("docker-compose")
    if compose is None:
        pytest.skip("no docker-compose (Debian: apt-get install docker-compose)")
    for name, text in render_docker(deployment, monitoring=monitoring).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    done = subprocess.run([compose, "config", "--quiet"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


RAY_JOB = {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
RAY_CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
HEAD = {"rayStartParams", "template"}
WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
"""Fields of ray.io/v1 that we use, as the reference of KubeRay 1.6 documents them."""


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
    fake = tmp_path / "evermesh"
    fake.write_text(f"#!/bin/bash\necho >> {tmp_path}/starts\nset -- {' '.join(map(str, codes))}\n"
                    f"n=$(wc -l < {tmp_path}/starts)\nexit ${{!n}}\n")  # fmt: skip
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, timeout=30, check=False)
    assert done.returncode == ends_with
    assert len((tmp_path / "starts").read_text().splitlines()) == len(codes)


def test_a_head_that_is_told_to_end_lets_the_launcher_save_and_does_not_launch_again(tmp_path: Path) -> None:
    (text,) = render_kuberay(DEPLOYMENT, image="registry/evermesh:1", ray="2.60.0").values()
    script = documents(text)["ConfigMap"]["data"]["launch.sh"]
    fake = tmp_path / "evermesh"
    fake.write_text(f"#!/bin/bash\ntrap 'touch {tmp_path}/saved; exit 75' TERM\ntouch {tmp_path}/up\n"
                    "while :; do sleep 0.05; done\n")  # fmt: skip
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen(["bash", "-c", script], env=environment, start_new_session=True) as head:
        while not (tmp_path / "up").exists():
            time.sleep(0.01)
        os.killpg(head.pid, signal.SIGTERM)  # as Ray ends a job
        assert head.wait(20) == 75
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("place", ["slurm", "docker", "kubernetes"])
def test_the_command_writes_files_whose_job_is_the_one_that_was_given(place: str, tmp_path: Path) -> None:
    options = ["--image", "registry/evermesh:1"] if place == "kubernetes" else []
    done = evermesh("deploy", place, JOB, "--output", tmp_path, *options)
    assert done.returncode == 0, done.stderr
    assert {Path(line) for line in done.stdout.split()} == {path for path in tmp_path.rglob("*") if path.is_file()}
    if place == "slurm":
        return
    text = (tmp_path / "job.yaml").read_text() if place == "docker" else ""
    text = text or documents((tmp_path / "job-quickstart.yaml").read_text())["ConfigMap"]["data"]["job.yaml"]
    (tmp_path / "again.yaml").write_text(text)
    assert load_job(tmp_path / "again.yaml") == load_job(JOB)


def test_deploy_loads_no_torch() -> None:
    program = "import sys, evermesh.deploy, evermesh.launcher.commands.deploy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
