"""What carries a job to where it runs: a batch script for Slurm, an image and services for Docker, manifests for Kubernetes
with and without KubeRay; and what Prometheus and Grafana need to watch it.

``launcher`` fills a ``Deployment`` from a job file; everything here is text made of it. Imports no other room.
"""

from evermesh.deploy.docker import render_docker
from evermesh.deploy.kuberay import render_kuberay
from evermesh.deploy.kubernetes import render_kubernetes
from evermesh.deploy.model import Deployment
from evermesh.deploy.monitoring import render_monitoring
from evermesh.deploy.slurm import render_slurm

__all__ = [
    "Deployment",
    "render_docker",
    "render_kuberay",
    "render_kubernetes",
    "render_monitoring",
    "render_slurm",
]
