"""An image, and a compose file that runs a job on one machine, with Prometheus and Grafana beside it."""

from typing import Any

import yaml

from evermesh.deploy.model import Deployment
from evermesh.deploy.monitoring import render_monitoring

_PROMETHEUS = "prom/prometheus:v3.5.0"
_GRAFANA = "grafana/grafana:12.1.1"
_API_PORT = 8470
_TOKEN_FILE = "/run/secrets/token"
_TARGETS = "/targets"
_SECRETS = """# before it, once; nobody else on this machine can enter the folder, and containers see the files alone:
#   mkdir -m 700 -p secrets && umask 022
#   openssl rand -hex 32 > secrets/token && openssl rand -hex 16 > secrets/grafana-password
"""
_TORCH_FOR_CPU = "https://download.pytorch.org/whl/cpu"


def render_docker(deployment: Deployment, *, monitoring: bool = True) -> dict[str, str]:
    """By file name: a Dockerfile for the device of the job, its job file, and a compose file.

    ``monitoring``: with Prometheus and Grafana, and what they are configured with.
    """
    compose = _monitored(deployment) if monitoring else _compose(deployment)
    found = {
        "Dockerfile": dockerfile(deployment),
        "job.yaml": deployment.job,
        "compose.yaml": (_SECRETS if monitoring else "") + yaml.safe_dump(compose, sort_keys=False),
    }
    if monitoring:
        files = render_monitoring(targets=_TARGETS, token_file=_TOKEN_FILE, prometheus="http://prometheus:9090")
        found |= {f"monitoring/{name}": text for name, text in files.items()}
    return found


def dockerfile(deployment: Deployment) -> str:
    """The image of a job: torch for its device, and Evermesh. No secret and no job is in it."""
    index = f" --index-url {_TORCH_FOR_CPU}" if deployment.device == "cpu" else ""
    return f"""FROM python:3.11-slim
# a compiler: the recorder of collectives and the kernels of the planner are built once, into the image; wget: for KubeRay
RUN apt-get update && apt-get install -y --no-install-recommends g++ wget && rm -rf /var/lib/apt/lists/*
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


def _monitored(deployment: Deployment) -> dict[str, Any]:
    """The job tells Prometheus by a file where it is; its own address is that of its container, in no other network."""
    compose = _compose(deployment)
    job = compose["services"]["job"]
    told = {"host": "job", "port": _API_PORT, "token_file": _TOKEN_FILE, "targets": _TARGETS}
    job["command"] += [word for name, value in told.items() for word in ("--set", f"api.{name}={value}")]
    job["volumes"].append(f"targets:{_TARGETS}")
    job |= {"secrets": ["token"], "ports": [f"127.0.0.1:{_API_PORT}:{_API_PORT}"]}
    compose["services"] |= {"prometheus": _prometheus(), "grafana": _grafana()}
    return compose | {
        "volumes": {"targets": {}, "prometheus": {}, "grafana": {}},
        "secrets": {name: {"file": f"./secrets/{name}"} for name in ("token", "grafana-password")},
    }


def _prometheus() -> dict[str, Any]:
    """No port of the machine leads to it: it asks nobody for a password."""
    arguments = {
        "config.file": "/etc/prometheus/prometheus.yml",
        "storage.tsdb.path": "/prometheus",
        "storage.tsdb.retention.time": "90d",
    }
    return {
        "image": _PROMETHEUS,
        "command": [f"--{name}={value}" for name, value in arguments.items()],
        "restart": "unless-stopped",
        "volumes": [
            "./monitoring/prometheus:/etc/prometheus:ro",
            f"targets:{_TARGETS}:ro",
            "prometheus:/prometheus",
        ],
        "secrets": ["token"],
    }


def _grafana() -> dict[str, Any]:
    return {
        "image": _GRAFANA,
        "restart": "unless-stopped",
        "environment": {
            "GF_SECURITY_ADMIN_PASSWORD__FILE": "/run/secrets/grafana-password",
            "GF_USERS_ALLOW_SIGN_UP": "false",
            "GF_ANALYTICS_REPORTING_ENABLED": "false",
            "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        },
        "volumes": [
            "./monitoring/grafana/provisioning:/etc/grafana/provisioning:ro",
            "./monitoring/grafana/dashboards:/etc/grafana/dashboards:ro",
            "grafana:/var/lib/grafana",
        ],
        "ports": ["127.0.0.1:3000:3000"],
        "depends_on": ["prometheus"],
        "secrets": ["grafana-password"],
    }
