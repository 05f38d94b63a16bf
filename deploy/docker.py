"""An image, and a service of Docker Compose that runs a job on one machine."""

from typing import Any

import yaml

from evermesh.deploy.model import Deployment

_TORCH_FOR_CPU = "https://download.pytorch.org/whl/cpu"


def render_docker(deployment: Deployment) -> dict[str, str]:
    """By file name: a Dockerfile for the device of the job, its job file, and a compose file."""
    return {
        "Dockerfile": dockerfile(deployment),
        "job.yaml": deployment.job,
        "compose.yaml": yaml.safe_dump(_compose(deployment), sort_keys=False),
    }


def dockerfile(deployment: Deployment) -> str:
    """The image of a job: torch for its device, and Evermesh. No secret and no job is in it."""
    index = f" --index-url {_TORCH_FOR_CPU}" if deployment.device == "cpu" else ""
    return f"""FROM python:3.11-slim
# a compiler: the recorder of collectives and the kernels of the planner are built once, into the image
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir torch=={deployment.torch}{index}
# what pip is to install: a release, a path in the build context, or a repository
ARG EVERMESH=evermesh[ray]=={deployment.version}
RUN pip install --no-cache-dir "$EVERMESH" \\
 && python -m evermesh.parallelism.planner \\
 && python -m evermesh.fault.recorder.native \\
 && python -m evermesh.fault.detectors
WORKDIR /work
# the launcher is process 1: it gets SIGTERM, saves, and ends with 75
ENTRYPOINT ["evermesh"]
"""


def _compose(deployment: Deployment) -> dict[str, Any]:
    command = ["launch", "/job/job.yaml", "--resume", "--on", "local"]
    service: dict[str, Any] = {
        "build": ".",
        "image": f"evermesh-{deployment.device}:{deployment.version}",
        "command": [*command, "--set", "runs=/runs", "--set", "requeue_on_term=true"],
        "init": True,
        "stop_grace_period": f"{deployment.stop_s}s",
        "restart": "no",
        "shm_size": "8gb",
        "volumes": ["./job.yaml:/job/job.yaml:ro", f"{deployment.runs}:/runs"],
    }
    if deployment.device == "cuda":
        wanted = {"driver": "nvidia", "count": deployment.workers * deployment.nodes, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [wanted]}}}
    return {"name": deployment.name, "services": {"job": service}}
