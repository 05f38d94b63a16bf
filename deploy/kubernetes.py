"""Manifests for Kubernetes: an indexed Job whose pods are the nodes of one Ray cluster; the first one launches.

The token of that cluster is a Secret that the manifests name and do not hold; it is mounted as a file.
"""

from typing import Any

import yaml

from evermesh.deploy.model import Deployment, how_to_watch
from evermesh.deploy.pods import RUNS, config_map, labels, metadata, mounts, resources, volumes

_PORT = 6379
_TOKEN = "/token/token"
_MANY_STARTS = 100
"""A job that is preempted again and again is no failure; the launcher ends with 93 where starts do not help."""
_HEAD = """set -eu
ray start --head --port={port} --node-ip-address="$POD_IP" --include-dashboard=false --disable-usage-stats
exec evermesh launch /job/job.yaml --resume --on ray://"$POD_IP":{port} --nodes {nodes} --spares {spares} \\
  --set runs=/runs --set requeue_on_term=true
"""
_OTHER = """set -eu
until getent hosts {head} >/dev/null; do sleep 1; done
exec ray start --address={head}:{port} --node-ip-address="$POD_IP" --disable-usage-stats --block
"""
_SCRIPT = 'if [ "$JOB_COMPLETION_INDEX" = 0 ]; then\n{head}else\n{other}fi\n'


def render_kubernetes(deployment: Deployment, *, image: str, claim: str = "runs") -> dict[str, str]:
    """By file name: a ConfigMap with the job file, a headless Service and the Job, for ``kubectl apply``.

    ``claim`` is the PersistentVolumeClaim of the runs, which all pods must be able to write at once.
    """
    documents = [config_map(deployment), _service(deployment), _job(deployment, image, claim)]
    secret = f"kubectl create secret generic {deployment.name}-token --from-literal=token=$(openssl rand -hex 32)"
    return {
        f"{deployment.name}.yaml": f"# before it, once: {secret}\n# {how_to_watch(RUNS)}\n"
        + yaml.safe_dump_all(documents, sort_keys=False)
    }


def _service(deployment: Deployment) -> dict[str, Any]:
    """Gives every pod a name: NAME-INDEX.NAME."""
    spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": labels(deployment)}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata(deployment), "spec": spec}


def _job(deployment: Deployment, image: str, claim: str) -> dict[str, Any]:
    pods = deployment.nodes + deployment.spares
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(deployment),
        "spec": {
            "completionMode": "Indexed",
            "completions": pods,
            "parallelism": pods,
            "backoffLimit": _MANY_STARTS,
            "podFailurePolicy": {"rules": _failure_rules()},
            # the job is done when the pod that launched it is; the others are ended
            "successPolicy": {"rules": [{"succeededIndexes": "0"}]},
            "template": {"metadata": {"labels": labels(deployment)}, "spec": _pod(deployment, image, claim)},
        },
    }


def _failure_rules() -> list[dict[str, Any]]:
    """93 and a wrong request would fail again alike; an evicted pod is nobody's failure; the rest, 75 too, is retried."""
    final = {"containerName": "node", "operator": "In", "values": [2, 93]}
    evicted = [{"type": "DisruptionTarget", "status": "True"}]
    return [{"action": "FailJob", "onExitCodes": final}, {"action": "Ignore", "onPodConditions": evicted}]


def _pod(deployment: Deployment, image: str, claim: str) -> dict[str, Any]:
    names = {"head": f"{deployment.name}-0.{deployment.name}", "port": _PORT}
    head = _HEAD.format(port=_PORT, nodes=deployment.nodes, spares=deployment.spares)
    node = {
        "name": "node",
        "image": image,
        "command": ["/bin/bash", "-c", _SCRIPT.format(head=head, other=_OTHER.format(**names))],
        "env": [
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "RAY_AUTH_MODE", "value": "token"},
            {"name": "RAY_AUTH_TOKEN_PATH", "value": _TOKEN},
        ],
        "resources": resources(deployment),
        "volumeMounts": [*mounts(), {"name": "token", "mountPath": "/token", "readOnly": True}],
    }
    token = {"name": "token", "secret": {"secretName": f"{deployment.name}-token", "defaultMode": 0o400}}
    return {
        "subdomain": deployment.name,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": deployment.stop_s,
        "automountServiceAccountToken": False,
        "containers": [node],
        "volumes": [*volumes(deployment, claim), token],
    }
