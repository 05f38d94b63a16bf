"""What pods of a job have in common, whoever starts them."""

from typing import Any

from evermesh.deploy.model import Deployment

RUNS = "/runs"
"""Where pods see the folder of the runs."""


def labels(deployment: Deployment) -> dict[str, str]:
    """Of everything that belongs to the job."""
    return {"app.kubernetes.io/name": "evermesh", "app.kubernetes.io/instance": deployment.name}


def metadata(deployment: Deployment) -> dict[str, Any]:
    """Name and labels."""
    return {"name": deployment.name, "labels": labels(deployment)}


def config_map(deployment: Deployment, **files: str) -> dict[str, Any]:
    """The job file, and others beside it."""
    data = {"job.yaml": deployment.job, **files}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata(deployment), "data": data}


def resources(deployment: Deployment) -> dict[str, Any]:
    """Of a node that trains."""
    wanted: dict[str, Any] = {"cpu": deployment.cpus}
    if deployment.device == "cuda":
        wanted["nvidia.com/gpu"] = deployment.workers
    return {"requests": wanted, "limits": wanted}


def mounts() -> list[dict[str, Any]]:
    """Where a container sees the job file, the runs, and memory for snapshots and records."""
    return [
        {"name": "job", "mountPath": "/job", "readOnly": True},
        {"name": "runs", "mountPath": RUNS},
        {"name": "memory", "mountPath": "/dev/shm"},
    ]


def volumes(deployment: Deployment, claim: str) -> list[dict[str, Any]]:
    """What ``mounts`` mounts; ``claim`` is the PersistentVolumeClaim of the runs."""
    return [
        {"name": "job", "configMap": {"name": deployment.name}},
        {"name": "runs", "persistentVolumeClaim": {"claimName": claim}},
        {"name": "memory", "emptyDir": {"medium": "Memory"}},
    ]
