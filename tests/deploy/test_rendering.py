"""What carries a job elsewhere is valid where it goes, holds no secret, and starts what the job file says."""

import subprocess
import sys
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
