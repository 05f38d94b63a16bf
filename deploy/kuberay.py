"""A RayJob for KubeRay: a Ray cluster whose head launches the job and whose workers are its nodes and spares.

The head trains nothing, so that no node that trains takes the controller, or the cluster, with it. KubeRay (1.5.1 or later,
with Ray 2.52 or later) makes the token of every cluster and gives it to all of its containers.
"""

from typing import Any

import yaml

from evermesh.deploy.model import Deployment, how_to_watch
from evermesh.deploy.pods import RUNS, config_map, labels, metadata, mounts, resources, volumes

_LOST_CLUSTERS = 3
"""Times that a new cluster is made, because the head was lost, or because the job ended otherwise than with 0 or 75."""
_KEPT_S = 600
"""How long the cluster stays for a look at it when the job is over."""
_HEAD_CPUS = 2
_AGAIN_S = 10
_HAS_AGENT = "grep -aqs 'ray::RayAgen[t]' /proc/[0-9]*/cmdline"
"""The actor that runs an agent; the brackets keep grep from finding itself."""
_SCRIPT = f"""# what the head runs; 75 (nodes are missing, or were taken away) is tried again in the same cluster
set -u
ending=
trap 'ending=1' TERM INT
while :; do
  evermesh launch /job/job.yaml --resume --on ray --nodes {{nodes}} --spares {{spares}} \\
    --set runs=/runs --set requeue_on_term=true
  code=$?
  if [ "$code" != 75 ] || [ -n "$ending" ]; then exit "$code"; fi
  sleep {_AGAIN_S}
done
"""


def render_kuberay(deployment: Deployment, *, image: str, ray: str, claim: str = "runs") -> dict[str, str]:
    """By file name: a ConfigMap with the job file and what the head runs, and the RayJob, for ``kubectl apply``.

    Args:
        deployment: the job.
        image: of all pods, with ``evermesh[kuberay]``.
        ray: version of Ray in it.
        claim: the PersistentVolumeClaim of the runs, which all pods must be able to write at once.
    """
    script = _SCRIPT.format(nodes=deployment.nodes, spares=deployment.spares)
    documents = [config_map(deployment, **{"launch.sh": script}), _ray_job(deployment, image, ray, claim)]
    built = "docker build --build-arg EVERMESH='evermesh[kuberay]' ... with the Dockerfile of `evermesh deploy docker`"
    text = f"# the image: {built}\n# {how_to_watch(RUNS)}\n" + yaml.safe_dump_all(documents, sort_keys=False)
    return {f"{deployment.name}-kuberay.yaml": text}


def _ray_job(deployment: Deployment, image: str, ray: str, claim: str) -> dict[str, Any]:
    pods = deployment.nodes + deployment.spares
    workers = {
        "groupName": "nodes",
        "replicas": pods,
        "minReplicas": pods,
        "maxReplicas": pods,
        "rayStartParams": {},
        "template": _pod(deployment, claim, _node(deployment, image)),
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata(deployment),
        "spec": {
            "entrypoint": "bash /job/launch.sh",
            "backoffLimit": _LOST_CLUSTERS,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": _KEPT_S,
            "rayClusterSpec": {
                "rayVersion": ray,
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "num-gpus": "0"},
                    "template": _pod(deployment, claim, _head(deployment, image)),
                },
                "workerGroupSpecs": [workers],
            },
        },
    }


def _head(deployment: Deployment, image: str) -> dict[str, Any]:
    """Whoever ends the job, or the pod, gives the launcher time to save."""
    small = {"cpu": _HEAD_CPUS, "memory": "8Gi"}
    container = _container(image, {"requests": small, "limits": small}, "evermesh stop --runs /runs || true")
    return container | {"env": [{"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": str(deployment.stop_s)}]}


def _node(deployment: Deployment, image: str) -> dict[str, Any]:
    """Deleting a cluster ends all pods at once, but the head saves first: an agent that is still there is needed for that."""
    waits = f"for second in $(seq {deployment.stop_s - 5}); do {_HAS_AGENT} || break; sleep 1; done"
    return _container(image, resources(deployment), waits)


def _container(image: str, of: dict[str, Any], before_stop: str) -> dict[str, Any]:
    return {
        "name": "node",
        "image": image,
        "resources": of,
        "lifecycle": {"preStop": {"exec": {"command": ["/bin/sh", "-c", before_stop]}}},
        "volumeMounts": mounts(),
    }


def _pod(deployment: Deployment, claim: str, container: dict[str, Any]) -> dict[str, Any]:
    spec = {
        "terminationGracePeriodSeconds": deployment.stop_s,
        "automountServiceAccountToken": False,
        "containers": [container],
        "volumes": volumes(deployment, claim),
    }
    return {"metadata": {"labels": labels(deployment)}, "spec": spec}
